"""A model of the sampler's step time, and forecasts of when work will be done.

Images that are generated at the same time share the sampler's rounds, with one step each per round. A round takes
longer the higher its load; how much longer is learned from finished requests. Does not depend on a clock, so every
result follows from its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypergen_gateway.generation.backend import (
    SKIP_LAYER_GUIDANCE_START,
    SKIP_LAYER_GUIDANCE_STOP,
    GenerationRequest,
    ModelDescription,
)
from hypergen_gateway.generation.request import ClientRequest

# The decay of a measurement's weight with each newer one: the model remembers about ten requests.
_MEMORY = 0.9
# The weight of the only prior: a round without images takes no time. Without it, requests that all ran alone would say
# nothing about how long two take together.
_PRIOR = 0.1
# The cost of a UNet row in a step that reuses deep features, relative to a full step.
_SHALLOW = 0.25


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a request in the sampler.

    `load` is what one of its images adds to a round: rows of the UNet times pixels, relative to the model's default
    size. `nbytes` is the memory taken by its init images.
    """

    images: int
    steps: float
    load: float
    nbytes: int = 0


def work_of(request: ClientRequest) -> Work:
    """The work of a request. An image that starts from an init image takes only the last part of its steps."""
    model, generations = request.model, [sub_request.generation for sub_request in request.sub_requests]
    strengths = [1.0 if generation.strength is None else generation.strength for generation in generations]
    loads = [_load(generation, model) for generation in generations]
    return Work(
        images=request.num_images,
        steps=max(request.num_inference_steps * max(strengths), 1.0),
        load=sum(loads) / len(loads) / (model.default_width * model.default_height),
        nbytes=request.nbytes,
    )


def _load(generation: GenerationRequest, model: ModelDescription) -> float:
    """The rows times pixels that an image adds to a round, on average over its steps.

    The average is exact, since the time of a round is modelled as linear in its load.
    """
    interval = generation.cache_interval or 1
    depth = (1.0 + (interval - 1) * _SHALLOW) / interval
    rows = 1.0
    if generation.guidance_scale > model.min_guidance_scale and model.has_negative_prompt:
        end = 1.0 if generation.guidance_end is None else generation.guidance_end
        begin = generation.guidance_start or 0.0
        # A guided step has a row more, or two if it is guided by an image, too.
        rows += (end - begin) * (2 if model.edits_by_instruction else 1)
        rows += _skipping_share(generation, model, begin, end)  # and a third one in some of them
    pixels = generation.width * generation.height
    # The denoiser works on reference images as on its own. One that is inpainted is a reference, too.
    seen = generation.reference_pixels
    if generation.mask is not None and model.max_references and not (seen and model.masked_image_yields):
        seen = [pixels, *seen]
    return rows * depth * (pixels + sum(seen))


def _skipping_share(generation: GenerationRequest, model: ModelDescription, begin: float, end: float) -> float:
    """The share of the steps, of those from `begin` to `end`, that have skip-layer guidance."""
    scale = generation.skip_layer_guidance_scale
    if not (model.default_skip_layer_guidance_scale if scale is None else scale):
        return 0.0
    start, stop = generation.skip_layer_guidance_start, generation.skip_layer_guidance_stop
    first = max(begin, SKIP_LAYER_GUIDANCE_START if start is None else start)
    return max(0.0, min(end, SKIP_LAYER_GUIDANCE_STOP if stop is None else stop) - first)


class StepTimeModel:
    """The seconds of a round as a linear function of its load, fitted to finished requests by least squares."""

    def __init__(self) -> None:
        self._weight = self._loads = self._seconds = self._squares = self._products = self._overhead = 0.0

    @property
    def is_known(self) -> bool:
        """Whether a request has been measured."""
        return self._weight > 0

    @property
    def overhead(self) -> float:
        """The seconds that a request takes besides its rounds. Requires `is_known`."""
        return self._overhead / self._weight

    def add_measurement(self, load: float, seconds: float, overhead: float = 0.0) -> None:
        """Learns from a finished request.

        Its rounds had a mean load of `load` and took `seconds` each; the rest of its time was `overhead` seconds.
        """
        self._weight = self._weight * _MEMORY + 1.0
        self._loads = self._loads * _MEMORY + load
        self._seconds = self._seconds * _MEMORY + seconds
        self._squares = self._squares * _MEMORY + load * load
        self._products = self._products * _MEMORY + load * seconds
        self._overhead = self._overhead * _MEMORY + overhead

    def round_seconds(self, load: float) -> float:
        """The seconds that a round of this load takes. Requires `is_known`."""
        weight = self._weight + _PRIOR
        slope = (weight * self._products - self._loads * self._seconds) / (
            weight * self._squares - self._loads * self._loads
        )
        fixed = (self._seconds - slope * self._loads) / weight
        if slope < 0:
            return self._seconds / self._weight
        if fixed < 0:
            return self._products / self._squares * load
        return fixed + slope * load


@dataclass(eq=False)
class RemainingWork:
    """The remaining work of a request: its images that run at a time, the load of each, and its rounds."""

    images: int
    load: float
    rounds: float


@dataclass(frozen=True)
class Forecast:
    """The seconds from now until a request starts, and until its last image is done."""

    start: float
    done: float


@dataclass
class _QueueSimulation:
    """A simulation of the queue and the sampler, whose rounds take each running request one step further."""

    step_times: StepTimeModel
    capacity: int
    running: list[RemainingWork]
    now: float = 0.0
    starts: dict[int, float] = field(default_factory=dict)

    def admit(self, waiting: list[RemainingWork]) -> None:
        while waiting and sum(each.images for each in self.running) + waiting[0].images <= self.capacity:
            self.starts[id(waiting[0])] = self.now
            self.running.append(waiting.pop(0))

    def run_until_one_is_done(self) -> None:
        load = sum(each.images * each.load for each in self.running)
        rounds = min(each.rounds for each in self.running)
        self.now += rounds * self.step_times.round_seconds(load)
        for each in self.running:
            each.rounds -= rounds
        self.running = [each for each in self.running if each.rounds > 0]


def forecast(
    step_times: StepTimeModel, capacity: int, running: Sequence[RemainingWork], waiting: Sequence[RemainingWork]
) -> Forecast:
    """When the last request of `waiting` will start and be done, from a simulation of the sampler."""
    simulation = _QueueSimulation(
        step_times, capacity, [RemainingWork(each.images, each.load, max(each.rounds, 1.0)) for each in running]
    )
    queue = [RemainingWork(min(each.images, capacity), each.load, max(each.rounds, 1.0)) for each in waiting]
    last = queue[-1]
    while queue or last in simulation.running:
        simulation.admit(queue)
        simulation.run_until_one_is_done()
    return Forecast(simulation.starts[id(last)], simulation.now + step_times.overhead)
