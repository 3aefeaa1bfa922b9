"""The sampler's custom metrics in Triton.

An update blocks the step loop for a few round trips to Triton's process, so iterations are accumulated between updates.
"""

from __future__ import annotations

import time
from collections import Counter

import triton_python_backend_utils as pb_utils

from hypergen_sampler.stepping import IterationStats

# Seconds between updates while images are active; the update after the last image is immediate.
INTERVAL = 0.25

GAUGES = {
    "active": ("active_images", "Images that take steps"),
    "waiting": ("waiting_images", "Images that wait in the queue"),
}
# Rows divided by calls is the mean batch size, at most `unet_max_rows`; seconds by calls is the mean duration.
COUNTERS = {
    "denoiser_calls": ("unet_calls_total", "Calls of the denoiser"),
    "denoiser_rows": (
        "unet_rows_total",
        "Rows of all calls of the denoiser; an image takes two under guidance, else one",
    ),
    "denoiser_seconds": ("unet_seconds_total", "Seconds that calls of the denoiser took"),
    "steps": ("steps_total", "Steps taken, of all images"),
    "saved_steps": ("saved_steps_total", "Remaining steps of cancelled images"),
}


class SamplerMetrics:
    """`hypergen_sampler_...` at Triton's /metrics."""

    def __init__(self, max_rows: int) -> None:
        self._families: list[pb_utils.MetricFamily] = []  # kept alive, as their metrics end with them
        kinds = pb_utils.MetricFamily
        self._gauges = {name: self._metric(*texts, kinds.GAUGE) for name, texts in GAUGES.items()}
        self._counters = {name: self._metric(*texts, kinds.COUNTER) for name, texts in COUNTERS.items()}
        self._metric("unet_max_rows", "Rows that a call of the denoiser may have", kinds.GAUGE).set(max_rows)
        self._growth: Counter[str] = Counter()
        self._is_at_work = False
        self._updated = 0.0

    def report(self, done: IterationStats) -> None:
        """Add an iteration of the step loop."""
        self._growth.update({name: getattr(done, name) for name in COUNTERS})
        if not self._is_at_work:
            self._is_at_work, self._updated = True, time.monotonic()
        if not (done.active or done.waiting):
            self._is_at_work = False
            self._update(done)
        elif time.monotonic() - self._updated >= INTERVAL:
            self._update(done)

    def close(self) -> None:
        """Give the metrics back, while Triton can hear of it."""
        self._gauges.clear()
        self._counters.clear()
        self._families.clear()

    def _update(self, done: IterationStats) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(getattr(done, name))
        for name, amount in self._growth.items():
            self._counters[name].increment(amount)
        self._growth.clear()
        self._updated = time.monotonic()

    def _metric(self, name: str, description: str, kind: pb_utils.MetricFamily.MetricKind) -> pb_utils.Metric:
        family = pb_utils.MetricFamily(name=f"hypergen_sampler_{name}", description=description, kind=kind)
        self._families.append(family)
        return family.Metric(labels={})
