"""What a gateway counts, for Prometheus.

Knows the metrics' names and units; Triton's and the sampler's own are scraped from Triton, beside these. No label takes
its value from a client, so that nobody can make more of them.
"""

from __future__ import annotations

import asyncio
import functools
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
    """`hypergen_gateway_...`, in a registry of its own: two gateways in one process do not mix."""

    def __init__(self, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "Requests answered", "route", "method", "status")
        self._seconds = self._histogram("request_seconds", "From a request to the end of its answer", "route")
        self._counted_by = functools.cache(self._look_up)  # there are few of them, and they stay
        self._first = self._histogram("first_image_seconds", "From a request to its first preview or picture", "kind")
        self._phases = self._histogram("phase_seconds", "Where a picture's time went", "phase")
        self._images = self._counter("images", "Previews and pictures made", "kind")
        self._steps = self._counter("steps", "Steps of denoising in the pictures made")
        self._saved = self._counter("saved_steps", "Steps not taken, as their client had gone; estimated while at work")
        self._refused = self._counter("refused", "Requests refused by admission", "reason")
        self._unheard = self._counter("unheard_requests", "Requests refused at their head, or at the door", "status")
        self._joined = self._counter("joined", "Requests that joined the work of an earlier one", "reason")
        self._ratio = self._histogram("estimate_ratio", "Time taken by time estimated on arrival", buckets=_RATIOS)
        self._gauge("queued_requests", "Requests that wait for a place").set_function(lambda: admission.waiting)
        self._gauge("active_requests", "Requests at work in Triton").set_function(lambda: admission.running)
        self._gauge("active_images", "Images at work in Triton").set_function(lambda: admission.running_images)
        self._gauge("asyncio_tasks", "Tasks of the event loop").set_function(_tasks)
        for reason in ("queue_full", "deadline"):
            self._refused.labels(reason)
        for status in (400, 408, 431, 503):
            self._unheard.labels(str(status))
        for reason in ("idempotency_key", "retry"):
            self._joined.labels(reason)

    def exposition(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)

    def served(self, served: RequestRecord) -> None:
        """A request was answered."""
        requests, seconds = self._counted_by(served.route, served.method, served.status)
        requests.inc()
        seconds.observe(served.seconds)

    def unheard(self, status: int) -> None:
        """A request was refused by the connection: as no HTTP, too slow, too large or one too many."""
        self._unheard.labels(str(status)).inc()

    def joined(self, reason: str) -> None:
        """A request joined a job."""
        self._joined.labels(reason).inc()

    def rejected(self, error: HyperGenError) -> None:
        """A request was not let in."""
        self._refused.labels("deadline" if isinstance(error, DeadlineTooShortError) else "queue_full").inc()

    def image_ready(self, encoded: EncodedImage, seconds: float, *, is_first: bool) -> None:
        """A preview or a picture is there, `seconds` after its request."""
        image = encoded.image
        kind = "picture" if image.is_final else "preview"
        self._images.labels(kind).inc()
        if is_first:
            self._first.labels(kind).observe(seconds)
        if image.is_final:
            self._steps.inc(image.step)
            phases = {**vars(image.timings), "encode_image": encoded.encode_ms}
            for phase, milliseconds in phases.items():
                self._phases.labels(phase).observe(milliseconds / 1000)

    def completed(self, slot: Slot, seconds: float) -> None:
        """All pictures of a request are drawn, `seconds` after it came."""
        if slot.estimate:
            self._ratio.observe(seconds / slot.estimate)

    def cancelled(self, steps: float) -> None:
        """A request was given up before `steps` of its images' steps."""
        self._saved.inc(steps)

    def _look_up(self, route: str, method: str, status: int) -> tuple[Counter, Histogram]:
        """What counts such requests."""
        return self._requests.labels(route, method, str(status)), self._seconds.labels(route)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hypergen_gateway_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"hypergen_gateway_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(f"hypergen_gateway_{name}", text, labels, registry=self._registry, buckets=buckets)


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # read outside of the loop
        return 0
