"""The API reference as a page: plain HTML, without scripts or external resources.

Renders only those parts of OpenAPI that the module `openapi` produces.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

JsonObject = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: light-dark(#0a6, #3d9); }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 6rem; }
h1 { margin: 0; } h2 { margin: 3rem 0 .3rem; font-size: 1.15rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
nav ul { list-style: none; padding: 0; columns: 18rem; } a { color: inherit; }
code, pre { font: .875em/1.5 ui-monospace, monospace; background: var(--soft); border-radius: .3em; }
code { padding: .1em .3em; } pre { padding: .9em 1em; overflow-x: auto; }
.method { color: var(--accent); font-weight: 600; text-transform: uppercase; margin-right: .5em; }
.wide { overflow-x: auto; margin-bottom: 1.5rem; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4em .8em .4em 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td:first-child { white-space: nowrap; } .required { color: var(--accent); font-size: .85em; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
}


def render(api: JsonObject, base_url: str) -> str:
    """The page as HTML. `base_url` is the server's address as the reader sees it, for the examples."""
    info = api["info"]
    body = "".join(
        [
            f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>",
            f"<p>{_text(info['description'])}",
            ' The same in OpenAPI: <a href="openapi.json">openapi.json</a>.</p>',
            _contents(api),
            _example(api, base_url),
            *(_operation(api, *operation) for operation in _operations(api)),
        ]
    )
    title = escape(f"{info['title']} API")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def _operations(api: JsonObject) -> Iterator[tuple[str, str, JsonObject]]:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def _contents(api: JsonObject) -> str:
    items = (
        f'<li><a href="#{escape(operation["operationId"])}">{_route(method, path)}</a></li>'
        for method, path, operation in _operations(api)
    )
    return f"<nav><ul>{''.join(items)}</ul></nav>"


def _example(api: JsonObject, base_url: str) -> str:
    secured = {} not in api["security"]
    key = " -H 'Authorization: Bearer KEY'" if secured else ""
    note = "Every request except to links and health checks needs the key." if secured else "No key is needed."
    command = (
        f"curl {base_url.rstrip('/')}/v1/images/generations{key} \\\n"
        "  -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps({'prompt': 'a lighthouse at dusk', 'n': 1})}'"
    )
    return f"<p>{escape(note)}</p><pre>{escape(command)}</pre>"


def _operation(api: JsonObject, method: str, path: str, operation: JsonObject) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    return "".join(
        [
            f'<section><h2 id="{escape(operation["operationId"])}">{_route(method, path)}</h2>',
            f"<p>{_text(operation['summary'])}.</p>",
            f"<p>{_text(operation['description'])}</p>" if "description" in operation else "",
            _parameters(operation["parameters"]),
            *(_body(api, media_type, described) for media_type, described in content.items()),
            _responses(api, operation["responses"]),
            "</section>",
        ]
    )


def _route(method: str, path: str) -> str:
    return f'<span class="method">{escape(method)}</span><code>{escape(path)}</code>'


def _parameters(parameters: list[JsonObject]) -> str:
    if not parameters:
        return ""
    rows = ([_name(each["name"], required=True), escape(each["in"]), _text(each["description"])] for each in parameters)
    return "<h3>Parameters</h3>" + _table(["name", "in", ""], rows)


def _body(api: JsonObject, media_type: str, described: JsonObject) -> str:
    return f"<h3>Body: <code>{escape(media_type)}</code></h3>" + _fields(api, _resolve(api, described["schema"]))


def _fields(api: JsonObject, schema: JsonObject) -> str:
    required = schema.get("required", [])
    rows = (
        [
            _name(name, required=name in required),
            f"<code>{escape(_type(api, described))}</code>",
            f"<code>{escape(json.dumps(default))}</code>" if (default := described.get("default")) is not None else "",
            _text(described.get("description", "")),
        ]
        for name, described in schema["properties"].items()
    )
    return _table(["field", "values", "default", ""], rows)


def _responses(api: JsonObject, responses: JsonObject) -> str:
    rows = (
        [
            escape(status),
            _text(response["description"]),
            " ".join(f"<code>{escape(media_type)}</code>" for media_type in response["content"]),
        ]
        for status, response in responses.items()
    )
    table = "<h3>Answers</h3>" + _table(["status", "", "type"], rows)
    success = next(described for status, described in responses.items() if status.startswith("2"))
    schema = success["content"].get("application/json", {}).get("schema")
    return table if schema is None else table + _response_fields(api, _resolve(api, schema))


def _response_fields(api: JsonObject, schema: JsonObject) -> str:
    rows = (
        [f"<code>{escape(name)}</code>", f"<code>{escape(_type(api, described))}</code>"]
        for name, described in schema["properties"].items()
    )
    return _table(["response field", "values"], rows)


def _type(api: JsonObject, schema: JsonObject) -> str:
    """A short description of the values that a schema allows."""
    schema = _resolve(api, schema)
    if "anyOf" in schema:
        return " or ".join(_type(api, each) for each in schema["anyOf"] if each != {"type": "null"})
    if "enum" in schema or "const" in schema:
        return " ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"array of {_type(api, schema['items'])}"
    if "properties" in schema:
        return f"{{{', '.join(schema['properties'])}}}"
    kind = "file" if schema.get("format") == "binary" else str(schema.get("type", "any"))
    return kind + _range(schema)


def _range(schema: JsonObject) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" {int(low):,} to {int(high):,}"
    if low is not None:
        return f" from {int(low):,}"
    longest = schema.get("maxLength")
    return f" of at most {longest:,} characters" if longest is not None else ""


def _resolve(api: JsonObject, schema: JsonObject) -> JsonObject:
    reference = schema.get("$ref")
    resolved: JsonObject = schema if reference is None else api["components"]["schemas"][reference.rpartition("/")[2]]
    return resolved


def _name(name: str, *, required: bool) -> str:
    return f"<code>{escape(name)}</code>" + (' <span class="required">required</span>' if required else "")


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _text(text: str) -> str:
    """Prose as HTML, with the parts in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
