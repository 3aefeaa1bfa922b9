"""OpenTelemetry traces of requests, sent over OTLP.

Imported only if an endpoint is configured. A request is a span with a child per image, which has a child per phase:
queue, text encoder, denoising, decoder and file. Triton receives the trace context as headers and adds its own spans if
its tracing is on.
"""

from __future__ import annotations

import os
import time

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from hypergen_gateway.errors import HyperGenError
from hypergen_gateway.generation.admission import Slot
from hypergen_gateway.generation.service import EncodedImage
from hypergen_gateway.http.auth import METRICS_PATH, PROBE_PATHS
from hypergen_gateway.http.middleware import RequestRecord
from hypergen_gateway.http.request_id import current_request_id, current_trace

_UNTRACED = PROBE_PATHS | {METRICS_PATH}
# Span names of an image's phases, in order; the encoding of the file comes last.
_PHASES = {"queue": "queue", "encode_text": "text encoder", "denoise": "denoising", "decode": "decoder"}


class Tracing:
    """Exports spans in the background, as configured by the `OTEL_…` variables; belongs to one gateway.

    Creates a middleware, and observes requests and image generation.
    """

    def __init__(self) -> None:
        name = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "hypergen-gateway"}
        self._provider = TracerProvider(resource=Resource.create(name))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("hypergen_gateway")
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Export the remaining spans. Blocks, for some seconds if the collector does not answer."""
        self._provider.shutdown()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Create a span for each request except probes, as a child of the client's span if it sends a `traceparent`."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in _UNTRACED:
                await app(scope, receive, send)
                return
            given = current_trace.get()
            parent = self._propagator.extract(given)
            with self._tracer.start_as_current_span(scope["method"], context=parent, kind=SpanKind.SERVER):
                headers: dict[str, str] = {}
                self._propagator.inject(headers)
                token = current_trace.set(headers)
                try:
                    await app(scope, receive, send)
                finally:
                    current_trace.reset(token)

        return traced

    def responded(self, record: RequestRecord) -> None:
        """The request of the current span was answered."""
        span = trace.get_current_span()
        span.update_name(f"{record.method} {record.route}")
        span.set_attributes(
            {
                "http.request.method": record.method,
                "http.route": record.route,
                "http.response.status_code": record.status,
                "hypergen.request_id": current_request_id.get(),
                "hypergen.images": record.images or 0,
                "hypergen.steps": record.steps or 0,
            }
        )
        if record.status >= 500:
            span.set_status(StatusCode.ERROR)

    def image_ready(self, encoded: EncodedImage, seconds: float, *, is_first: bool) -> None:  # noqa: ARG002
        """An image is ready. Its spans are created retroactively, as the durations are known only now."""
        image = encoded.image
        if not image.is_final:
            return
        phases = {name: getattr(image.timings, phase) for phase, name in _PHASES.items()}
        phases["file"] = encoded.encode_ms
        ended = time.time_ns()
        began = ended - sum(_nanoseconds(milliseconds) for milliseconds in phases.values())
        attributes = {
            "hypergen.image_index": image.index,
            "hypergen.steps": image.step,
            "hypergen.seed": image.seed,
        }
        span = self._tracer.start_span("image", start_time=began, attributes=attributes)
        for name, milliseconds in phases.items():
            child = self._tracer.start_span(name, context=set_span_in_context(span), start_time=began)
            began += _nanoseconds(milliseconds)
            child.end(began)
        span.end(ended)

    def rejected(self, error: HyperGenError) -> None:
        """A request was rejected by admission control."""
        trace.get_current_span().add_event("refused", {"reason": error.code or ""})

    def completed(self, slot: Slot, seconds: float) -> None:
        """All images of a request are generated."""

    def cancelled(self, steps: float) -> None:
        """A request was cancelled."""
        trace.get_current_span().add_event("abandoned", {"hypergen.saved_steps": steps})


def _nanoseconds(milliseconds: float) -> int:
    return round(milliseconds * 1e6)
