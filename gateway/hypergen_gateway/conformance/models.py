"""Rules about models and health."""

from __future__ import annotations

import time
from urllib.parse import quote

from hypergen_gateway.conformance.rules import Area, Failed, NotTested, need
from hypergen_gateway.conformance.server import MODELS, Server
from hypergen_gateway.conformance.shapes import excerpt, expect_error, json_of

AREA = Area("models")
HEALTH = Area("health")


@AREA.rule("models are listed in OpenAI's shape")
def _(server: Server) -> str:
    response = server.send("GET", MODELS)
    need(response.status_code == 200, excerpt(response))
    body = json_of(response)
    need(body["object"] == "list" and body["data"], excerpt(response))
    for model in body["data"]:
        kinds = {"id": str, "object": str, "created": int, "owned_by": str}
        wrong = [key for key, kind in kinds.items() if not isinstance(model.get(key), kind)]
        need(not wrong and model["object"] == "model", f"{', '.join(wrong)} of {model}")
    return ", ".join(model["id"] for model in body["data"])


@AREA.rule("`created` is a time in seconds, not in the future")
def _(server: Server) -> str:
    created = json_of(server.send("GET", MODELS))["data"][0]["created"]
    need(isinstance(created, int) and 0 < created <= time.time() + 60, str(created))
    return str(created)


@AREA.rule("a model is retrieved by its id")
def _(server: Server) -> str:
    return _retrieved(server, quote(_some_id(server), safe=""))


@AREA.rule("a model is retrieved by its id with unescaped slashes")
def _(server: Server) -> str:
    id_ = _some_id(server)
    if "/" not in id_:
        raise NotTested(f"{id_} has no slash")
    return _retrieved(server, quote(id_))


@AREA.rule("an unknown model: 404 `model_not_found`")
def _(server: Server) -> str:
    response = server.send("GET", f"{MODELS}/no-such-model")
    seen = expect_error(response, 404)
    code = response.json()["error"]["code"]
    need(code == "model_not_found", f"code {code!r}")
    return seen


@HEALTH.rule("GET /health has status, model, queue_size and device", extension=True)
def _(server: Server) -> str:
    response = server.send("GET", f"{server.root}/health", authorised=False)
    need(response.status_code == 200, excerpt(response))
    body = json_of(response)
    need(body["status"] in ("healthy", "unhealthy"), excerpt(response))
    need(isinstance(body["queue_size"], int) and {"model", "device"} <= body.keys(), excerpt(response))
    return response.text


@HEALTH.rule("there are liveness and readiness probes", extension=True)
def _(server: Server) -> str:
    responses = [server.send("GET", f"{server.root}/health/{probe}", authorised=False) for probe in ("live", "ready")]
    statuses = [response.status_code for response in responses]
    need(statuses == [200, 200], f"live {statuses[0]}, ready {statuses[1]}")
    return "live 200, ready 200"


def _some_id(server: Server) -> str:
    if server.model_id is None:
        raise Failed("no model is listed")
    return server.model_id


def _retrieved(server: Server, path: str) -> str:
    response = server.send("GET", f"{MODELS}/{path}")
    need(response.status_code == 200, excerpt(response))
    body = json_of(response)
    need(body["id"] == server.model_id and body["object"] == "model", excerpt(response))
    return str(body["id"])
