"""Rules about response headers, and about the response when the queue is full."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from hypergen_gateway.conformance.rules import Area, NotTested, need
from hypergen_gateway.conformance.server import MODELS, Server
from hypergen_gateway.conformance.shapes import error_of, excerpt, expect_error

AREA = Area("headers")
LOAD = Area("load")


@AREA.rule("every response has a unique `x-request-id`")
def _(server: Server) -> str:
    responses = [server.send("GET", MODELS), server.send("GET", MODELS), server.image]
    ids = [response.headers.get("x-request-id") for response in responses]
    need(None not in ids, "no such header")
    need(len(set(ids)) == len(ids), str(ids))
    return str(ids[0])


@AREA.rule("an error response has an `x-request-id`")
def _(server: Server) -> str:
    id_ = server.send("GET", "/no/such/route").headers.get("x-request-id")
    need(id_, "no such header")
    return str(id_)


@AREA.rule("an `x-request-id` sent by the client is returned", extension=True)
def _(server: Server) -> str:
    id_ = server.send("GET", MODELS, headers={"x-request-id": "mine-7"}).headers.get("x-request-id")
    need(id_ == "mine-7", str(id_))
    return str(id_)


@AREA.rule("`openai-processing-ms` is the processing time")
def _(server: Server) -> str:
    header = server.image.headers.get("openai-processing-ms")
    need(header is not None, "no such header")
    return f"{int(str(header))} ms"


@AREA.rule("`Server-Timing` has the time of each phase", extension=True)
def _(server: Server) -> str:
    header = server.image.headers.get("server-timing", "")
    need("dur=" in header, header or "no such header")
    return str(header)


@AREA.rule("HEAD of the models is like GET without a body")
def _(server: Server) -> str:
    response = server.send("HEAD", MODELS)
    need(response.status_code == 200 and not response.content, excerpt(response))
    return "200"


@LOAD.rule("a full queue: 429 `rate_limit_exceeded` with a time to retry")
def _(server: Server) -> str:
    count = server.options.burst
    if count == 0:
        raise NotTested("no --burst was given")
    with ThreadPoolExecutor(count) as pool:
        responses = list(pool.map(lambda _: server.generate(), range(count)))
    full = [response for response in responses if response.status_code == 429]
    others = [response for response in responses if response.status_code not in (200, 429)]
    need(not others, " · ".join(excerpt(response) for response in others[:2]))
    if not full:
        raise NotTested(f"{count} requests at once were all served")
    seen = expect_error(full[0], 429)
    need(error_of(full[0])["code"] == "rate_limit_exceeded", seen)
    need(full[0].headers.get("retry-after", "").isdecimal(), f"no Retry-After; {seen}")
    return f"{len(full)} of {count}; Retry-After: {full[0].headers['retry-after']}"
