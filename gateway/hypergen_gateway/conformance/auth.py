"""Rules about API key authentication. They can be tested only with a key."""

from __future__ import annotations

import httpx

from hypergen_gateway.conformance.rules import Area, NotTested, need
from hypergen_gateway.conformance.server import EDITS, GENERATIONS, MODELS, Server
from hypergen_gateway.conformance.shapes import error_of, excerpt, expect_error

AREA = Area("key")
_WRONG = "not-the-key-of-this-server"


@AREA.rule("without a key: 401")
def _(server: Server) -> str:
    return expect_error(_ask(server, None), 401)


@AREA.rule("with a wrong key: 401 `invalid_api_key`")
def _(server: Server) -> str:
    response = _ask(server, f"Bearer {_WRONG}")
    seen = expect_error(response, 401)
    code = error_of(response)["code"]
    need(code == "invalid_api_key", f"401 with code {code!r}")
    return seen


@AREA.rule("with a scheme other than Bearer: 401")
def _(server: Server) -> str:
    return expect_error(_ask(server, f"Basic {server.options.api_key}"), 401)


@AREA.rule("with an empty Bearer token: 401")
def _(server: Server) -> str:
    return expect_error(_ask(server, "Bearer"), 401)


@AREA.rule("no key, a wrong key and a malformed header have different messages")
def _(server: Server) -> str:
    messages = {error_of(_ask(server, value))["message"] for value in (None, f"Bearer {_WRONG}", "Basic x")}
    need(len(messages) == 3, f"one message for several: {' | '.join(sorted(messages))}")
    return " | ".join(sorted(messages))


@AREA.rule("a 401 says how to authenticate (`WWW-Authenticate`)")
def _(server: Server) -> str:
    header = str(_ask(server, None).headers.get("www-authenticate", ""))
    need(header.lower().startswith("bearer"), f"WWW-Authenticate: {header}" if header else "no such header")
    return header


@AREA.rule("the error does not repeat the key that was sent")
def _(server: Server) -> str:
    response = _ask(server, f"Bearer {_WRONG}")
    need(_WRONG not in response.text, excerpt(response))
    return "the key does not appear"


@AREA.rule("image generation checks the key before anything else")
def _(server: Server) -> str:
    _need_key(server)
    for path in (GENERATIONS, EDITS):
        response = server.send(
            "POST", path, authorised=False, content=b"{", headers={"Content-Type": "application/json"}
        )
        need(response.status_code == 401, f"{path}: {excerpt(response)}")
    return "401"


def _ask(server: Server, authorization: str | None) -> httpx.Response:
    _need_key(server)
    headers = {} if authorization is None else {"Authorization": authorization}
    return server.send("GET", MODELS, authorised=False, headers=headers)


def _need_key(server: Server) -> None:
    if server.options.api_key is None:
        raise NotTested("no --api-key was given")
