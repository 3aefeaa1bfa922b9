"""Traces: what a collector that speaks OTLP gets, and whose trace a request belongs to."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import UnavailableError
from hypergen_gateway.observability.tracing import Tracing
from hypergen_gateway.triton.client import TritonBackend
from support.fake_backend import FakeBackend, in_memory, until
from support.fake_triton import FakeTriton, serving
from support.running_server import start_server, stop_server
from support.span_receiver import SpanReceiver, span_receiver

GENERATIONS = "/v1/images/generations"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
FOX = {"prompt": "a fox", "n": 2, "seed": 5}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpanReceiver]:
    with span_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        yield receiver


async def spans_of(
    receiver: SpanReceiver, backend: FakeBackend, *requests: dict[str, Any], headers: dict[str, str] = HEADERS
) -> list[Span]:
    """The spans that the requests have made, when the gateway has ended."""
    app = create_app(Config(), backend, Tracing())
    async with app.router.lifespan_context(app), in_memory(app) as client:
        for body in requests:
            await client.post(GENERATIONS, json=body, headers=headers)
        await client.get("/health")
    return receiver.spans["hypergen-gateway"]


def attributes_of(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in span.attributes}


async def test_a_request_is_a_span_its_images_are_below_and_their_phases_below_these(
    receiver: SpanReceiver, backend: FakeBackend
) -> None:
    spans = await spans_of(receiver, backend, FOX)
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    (request,) = [span for span in spans if span.name == f"POST {GENERATIONS}"]
    assert request.parent_span_id.hex() == PARENT
    assert attributes_of(request) | {"hypergen.request_id": ""} == {
        "http.request.method": "POST",
        "http.route": GENERATIONS,
        "http.response.status_code": 200,
        "hypergen.request_id": "",
        "hypergen.images": 2,
        "hypergen.steps": 40,
    }
    images = [span for span in spans if span.name == "image"]
    assert {span.parent_span_id for span in images} == {request.span_id}
    assert sorted(attributes_of(span)["hypergen.seed"] for span in images) == [5, 6]
    phases = [span for span in spans if span.parent_span_id == images[0].span_id]
    assert [span.name for span in phases] == ["queue", "text encoder", "denoising", "decoder", "file"]
    lasted = {span.name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 for span in phases}
    assert (lasted["text encoder"], lasted["denoising"], lasted["decoder"]) == pytest.approx((2, 30, 4), abs=0.01)
    assert all(one.end_time_unix_nano == next_.start_time_unix_nano for one, next_ in itertools.pairwise(phases))
    assert len(spans) == 1 + 2 * 6


async def test_failures_and_refusals_are_seen(receiver: SpanReceiver, backend: FakeBackend) -> None:
    backend.failure = UnavailableError("away")
    spans = await spans_of(receiver, backend, FOX, {"prompt": ""})
    assert [(attributes_of(span)["http.response.status_code"], span.status.code) for span in spans] == [
        (503, Status.STATUS_CODE_ERROR),
        (400, Status.STATUS_CODE_UNSET),
    ]


async def test_a_request_without_a_trace_begins_one(receiver: SpanReceiver, backend: FakeBackend) -> None:
    for wrong in ({}, {"traceparent": "nonsense"}, {"traceparent": f"00-{'0' * 32}-{PARENT}-01"}):
        await spans_of(receiver, backend, FOX, headers=wrong)
    roots = [span for span in receiver.spans["hypergen-gateway"] if not span.parent_span_id]
    assert len({span.trace_id for span in roots}) == 3


@pytest.mark.parametrize("traced", [False, True])
async def test_triton_is_told_the_trace(receiver: SpanReceiver, traced: bool) -> None:
    triton = FakeTriton()
    async with serving(triton) as url:
        app = create_app(Config(), TritonBackend(url), Tracing() if traced else None)
        async with app.router.lifespan_context(app), in_memory(app) as client:
            assert (await client.post(GENERATIONS, json=FOX, headers=HEADERS)).status_code == 200
    _, trace, span, flags = triton.headers[-1]["traceparent"].split("-")
    assert (trace, flags) == (TRACE, "01")
    if traced:
        (request,) = [each for each in receiver.spans["hypergen-gateway"] if each.name == f"POST {GENERATIONS}"]
        assert span == request.span_id.hex()
    else:
        assert span == PARENT
        assert receiver.spans == {}


async def test_a_collector_that_is_not_there_disturbs_nobody(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    app = create_app(Config(), backend, Tracing())
    async with app.router.lifespan_context(app), in_memory(app) as client:
        assert (await client.post(GENERATIONS, json=FOX)).status_code == 200


async def test_the_command_sends_traces_where_the_environment_says(receiver: SpanReceiver) -> None:
    server = await asyncio.to_thread(
        start_server, "--triton-url", "127.0.0.1:1", "--log-format", "json", model="", ready=False, key=None
    )
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.post(GENERATIONS, json=FOX, headers=HEADERS)).status_code == 503
    assert await asyncio.to_thread(stop_server, server) == 0
    await until(lambda: "hypergen-gateway" in receiver.spans)
    (span,) = receiver.spans["hypergen-gateway"]
    assert (span.trace_id.hex(), attributes_of(span)["http.response.status_code"]) == (TRACE, 503)
    (line,) = [line for line in map(json.loads, server.lines) if line.get("route") == GENERATIONS]
    assert line["trace_id"] == TRACE
