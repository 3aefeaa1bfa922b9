"""Prometheus metrics of the gateway.

Triton's and the sampler's metrics are scraped from Triton. No label takes its value from a client, as clients could
then create any number of time series.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from hypergen_gateway.errors import DeadlineTooShortError, HyperGenError
from hypergen_gateway.generation.admission import Admission, Slot
from hypergen_gateway.generation.service import EncodedImage
from hypergen_gateway.http.middleware import RequestRecord

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
# From a health check to the largest model on the slowest machine.
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
_RATIOS = (0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5)


class Metrics:
    """The metrics `hypergen_gateway_*`, in a registry of their own, so that several gateways can share a process."""

    def __init__(self, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "HTTP requests", "route", "method", "status")
        self._seconds = self._histogram("request_seconds", "Duration of HTTP requests", "route")
        self._first = self._histogram("first_image_seconds", "Time to the first preview or image", "kind")
        self._phases = self._histogram("phase_seconds", "Time that an image spends in each phase", "phase")
        self._images = self._counter("images", "Generated previews and images", "kind")
        self._steps = self._counter("steps", "Denoising steps of the generated images")
        self._saved = self._counter("saved_steps", "Remaining steps of cancelled images, an estimate for running ones")
        self._refused = self._counter("admission_rejections", "Requests rejected by admission control", "reason")
        self._protocol_rejections = self._counter("protocol_rejections", "Requests rejected before routing", "status")
        self._joined = self._counter("joined", "Requests that joined an earlier request's job", "reason")
        self._ratio = self._histogram("estimate_ratio", "Actual by estimated duration", buckets=_RATIOS)
        self._gauge("queued_requests", "Requests waiting for a slot").set_function(lambda: admission.waiting)
        self._gauge("active_requests", "Requests running in Triton").set_function(lambda: admission.running)
        self._gauge("active_images", "Images running in Triton").set_function(lambda: admission.running_images)
        self._gauge("asyncio_tasks", "Tasks of the asyncio event loop").set_function(_tasks)
        for reason in ("queue_full", "deadline"):
            self._refused.labels(reason)
        for status in (400, 408, 431, 503):
            self._protocol_rejections.labels(str(status))
        for reason in ("idempotency_key", "retry"):
            self._joined.labels(reason)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def responded(self, record: RequestRecord) -> None:
        """A request was answered."""
        self._requests.labels(record.route, record.method, str(record.status)).inc()
        self._seconds.labels(record.route).observe(record.seconds)

    def rejected_by_protocol(self, status: int) -> None:
        """A request was rejected before routing: not HTTP, too slow, too large, or one connection too many."""
        self._protocol_rejections.labels(str(status)).inc()

    def joined(self, reason: str) -> None:
        """A request joined a job."""
        self._joined.labels(reason).inc()

    def rejected(self, error: HyperGenError) -> None:
        """A request was rejected by admission control."""
        self._refused.labels("deadline" if isinstance(error, DeadlineTooShortError) else "queue_full").inc()

    def image_ready(self, encoded: EncodedImage, seconds: float, *, is_first: bool) -> None:
        """A preview or an image is ready, `seconds` after its request was received."""
        image = encoded.image
        kind = "image" if image.is_final else "preview"
        self._images.labels(kind).inc()
        if is_first:
            self._first.labels(kind).observe(seconds)
        if image.is_final:
            self._steps.inc(image.step)
            phases = {**vars(image.timings), "encode_image": encoded.encode_ms}
            for phase, milliseconds in phases.items():
                self._phases.labels(phase).observe(milliseconds / 1000)

    def completed(self, slot: Slot, seconds: float) -> None:
        """All images of a request are generated, `seconds` after it was received."""
        if slot.estimate:
            self._ratio.observe(seconds / slot.estimate)

    def cancelled(self, steps: float) -> None:
        """A request was cancelled, with `steps` denoising steps of its images remaining."""
        self._saved.inc(steps)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hypergen_gateway_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"hypergen_gateway_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(f"hypergen_gateway_{name}", text, labels, registry=self._registry, buckets=buckets)


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # called outside the event loop
        return 0
