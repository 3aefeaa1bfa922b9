"""Rules about invalid requests: each is rejected at once with an error in OpenAI's shape that names the problem."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from hypergen_gateway.conformance.rules import Area, need
from hypergen_gateway.conformance.server import GENERATIONS, MODELS, Server
from hypergen_gateway.conformance.shapes import describe_images, error_of, excerpt, expect_error, images_of

AREA = Area("errors")
FIELDS = Area("wrong fields")
# Runs last, as some servers do not recover from it.
ABUSE = Area("abuse")

_MEGABYTE = 1 << 20
_JSON = {"Content-Type": "application/json"}
# Parts of tracebacks and paths, which an error message must not reveal.
_INSIDES = ("Traceback (most recent call last)", 'File "/', "site-packages", "/usr/lib/")

_WRONG: dict[str, list[Any]] = {
    "prompt": [None, "", 7, ["a"], "a" * 32_001],
    "n": [0, 11, -1, 1.5, "2", True, 2**70],
    "size": ["64", "axb", 64, ""],
    "quality": ["best", 1],
    "response_format": ["png", 1],
    "output_format": ["gif", 1],
    "output_compression": [101, -1, "x"],
    "background": ["purple"],
    "stream": ["yes", 1],
    "partial_images": [4, -1, "2"],
    "user": [7],
}
_WRONG_EXTENSIONS: dict[str, list[Any]] = {
    "num_inference_steps": [0, 151, 1.5, "20"],
    "guidance_scale": [-1, 21, "x"],
    "seed": [-2, 1.5, 2**63],
    "scheduler": ["no-such-scheduler", 1],
}


@AREA.rule("an unknown route: 404 in OpenAI's shape")
def _(server: Server) -> str:
    return expect_error(server.send("GET", "/no/such/route"), 404)


@AREA.rule("an unsupported method: 405 in OpenAI's shape, with `Allow`")
def _(server: Server) -> str:
    response = server.send("GET", GENERATIONS)
    seen = expect_error(response, 405)
    need("POST" in response.headers.get("allow", ""), f"Allow: {response.headers.get('allow')}")
    need(server.send("DELETE", MODELS).status_code == 405, "DELETE of the models is something else")
    return seen


@AREA.rule("a Content-Type other than JSON: 415 or 400")
def _(server: Server) -> str:
    return _posted(server, b'{"prompt": "a"}', 415, 400, kind="text/plain")


@AREA.rule("an empty body: 400")
def _(server: Server) -> str:
    return _posted(server, b"", 400)


@AREA.rule("malformed JSON: 400")
def _(server: Server) -> str:
    return _posted(server, b'{"prompt": "a rock', 400)


@AREA.rule("JSON that is not an object: 400")
def _(server: Server) -> str:
    return " · ".join(_posted(server, body, 400) for body in (b"[]", b"null", b'"a"', b"7"))


@AREA.rule("a body that is not UTF-8: 400")
def _(server: Server) -> str:
    return _posted(server, b'{"prompt": "\xff\xfe"}', 400)


@AREA.rule("NaN and Infinity, which JSON does not have: 400")
def _(server: Server) -> str:
    return " · ".join(_posted(server, b'{"prompt": "a", "n": %s}' % word, 400) for word in (b"NaN", b"Infinity"))


@AREA.rule("errors contain no internals of the server")
def _(server: Server) -> str:
    bodies = [b"", b"[]", b'{"prompt": 7}', b'{"prompt": "a", "size": "' + b"9" * 5000 + b'"}', b"\x00"]
    responses = [server.send("POST", GENERATIONS, content=body, headers=_JSON) for body in bodies]
    for response in responses:
        text = response.text.replace('\\"', '"')  # undo JSON's escaping
        shown = [word for word in _INSIDES if word in text]
        need(not shown and response.status_code < 500, excerpt(response))
    return f"{len(responses)} errors checked"


@ABUSE.rule("`size` of 0x0, -64x64, 1000000x1000000: 400, param `size`")
def _(server: Server) -> str:
    return _refuses("size", ["0x0", "-64x64", "1000000x1000000"])(server)


@ABUSE.rule("JSON nested 100,000 deep: 400")
def _(server: Server) -> str:
    depth = 100_000
    return _posted(server, b'{"prompt": "a", "x": %s%s}' % (b"[" * depth, b"]" * depth), 400, 413)


@ABUSE.rule("a body of 32 MB: 413 or 400, within ten seconds")
def _(server: Server) -> str:
    began = time.perf_counter()
    seen = _posted(server, b'{"prompt": "%s"}' % (b"a" * 32 * _MEGABYTE), 413, 400)
    seconds = time.perf_counter() - began
    need(seconds < 10, f"after {seconds:.0f} s: {seen}")
    return seen


@ABUSE.rule("after these requests the server still generates images")
def _(server: Server) -> str:
    return describe_images(images_of(server.generate()))


def _posted(server: Server, body: bytes, *statuses: int, kind: str = "application/json") -> str:
    return expect_error(server.send("POST", GENERATIONS, content=body, headers={"Content-Type": kind}), *statuses)


def _refuses(name: str, values: list[Any]) -> Callable[[Server], str]:
    def check(server: Server) -> str:
        for value in values:
            body = {key: kept for key, kept in server.body({}).items() if key != name}
            body |= {} if value is None else {name: value}
            response = server.send("POST", GENERATIONS, content=json.dumps(body), headers=_JSON)
            need(response.status_code == 400, f"{_shown(value)}: {excerpt(response)}")
            error = error_of(response)
            need(error["param"] == name, f"{_shown(value)}: param {error['param']!r}, {error['message']}")
        return str(error["message"])

    return check


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) < 30 else f"{text[:12]}… of {len(text)} characters"


for _name, _values in _WRONG.items():
    _cases = ", ".join(_shown(value) for value in _values)
    FIELDS.rule(f"`{_name}` of {_cases}: 400, param `{_name}`")(_refuses(_name, _values))
for _name, _values in _WRONG_EXTENSIONS.items():
    _cases = ", ".join(_shown(value) for value in _values)
    FIELDS.rule(f"`{_name}` of {_cases}: 400, param `{_name}`", extension=True)(_refuses(_name, _values))
