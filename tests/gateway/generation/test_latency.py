"""The sampler's step_times, and the forecasts made of it, against closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hypergen_gateway.api.client_request import to_generation_request
from hypergen_gateway.api.fields import ImageRequest
from hypergen_gateway.api.validation import validate
from hypergen_gateway.generation.backend import GenerationRequest, ModelDescription
from hypergen_gateway.generation.latency import RemainingWork, StepTimeModel, forecast, work_of
from hypergen_gateway.generation.request import ClientRequest, SubRequest
from support.fake_backend import MODEL


def learned(*samples: tuple[float, float]) -> StepTimeModel:
    step_times = StepTimeModel()
    for load, seconds in samples:
        step_times.add_measurement(load, seconds)
    return step_times


def load_of(generation: GenerationRequest, model: ModelDescription) -> float:
    return work_of(ClientRequest(sub_requests=[SubRequest(generation=generation)], model=model)).load


def test_nothing_is_known_before_the_first_request() -> None:
    assert not StepTimeModel().is_known
    assert learned((2, 0.1)).is_known


def test_one_kind_of_load_says_that_twice_the_load_takes_twice_as_long() -> None:
    step_times = learned(*[(2, 0.1)] * 5)
    assert [step_times.round_seconds(load) for load in (1, 2, 4)] == pytest.approx([0.05, 0.1, 0.2])


def test_different_loads_tell_what_a_round_costs_by_itself_and_by_its_load() -> None:
    step_times = learned(*[(load, 0.03 + 0.002 * load) for load in (2, 16, 8, 2, 16, 8, 2, 16, 8, 2, 16, 8)])
    for load in (2, 8, 16):
        assert step_times.round_seconds(load) == pytest.approx(0.03 + 0.002 * load, rel=0.08)


def test_it_follows_a_change_within_some_requests() -> None:
    step_times = learned(*[(2, 1.0)] * 20, *[(2, 0.1)] * 20)
    assert step_times.round_seconds(2) == pytest.approx(0.2, rel=0.5)


@pytest.mark.parametrize("samples", [[(2, 0.2), (16, 0.1)], [(2, 0.01), (4, 0.2)]])
def test_figures_that_contradict_each_other_never_make_a_round_free(samples: list[tuple[float, float]]) -> None:
    step_times = learned(*samples * 3)
    assert all(0 < step_times.round_seconds(load) < 2 for load in (0.5, 2, 16, 32))


def test_requests_together_take_as_long_as_their_rounds_do() -> None:
    step_times = learned((1, 0.01))  # 10 ms per image and round
    alone = forecast(step_times, 4, [], [RemainingWork(1, 1.0, 50)])
    assert [alone.start, alone.done] == pytest.approx([0, 0.5])
    beside = forecast(step_times, 4, [RemainingWork(2, 1.0, 10)], [RemainingWork(1, 1.0, 50)])
    assert [beside.start, beside.done] == pytest.approx([0, 10 * 0.03 + 40 * 0.01])


def test_a_waiting_request_starts_when_there_is_room_for_all_its_images_and_overtakes_none() -> None:
    step_times = learned((1, 0.01))
    running = [RemainingWork(1, 1.0, 10), RemainingWork(1, 1.0, 30)]
    waiting = [RemainingWork(2, 1.0, 20), RemainingWork(1, 1.0, 5)]
    expected = forecast(step_times, 2, running, waiting)
    both_gone = 10 * 0.02 + 20 * 0.01
    assert expected.start == pytest.approx(both_gone + 20 * 0.02)
    assert expected.done == pytest.approx(both_gone + 20 * 0.02 + 5 * 0.01)


def test_a_request_that_should_have_ended_is_given_one_more_round() -> None:
    expected = forecast(learned((1, 0.01)), 1, [RemainingWork(1, 1.0, 0)], [RemainingWork(1, 1.0, 10)])
    assert expected.start == pytest.approx(0.01)


def test_the_forecast_leaves_what_it_was_given_as_it_was() -> None:
    running, waiting = [RemainingWork(1, 1.0, 3)], [RemainingWork(1, 1.0, 4)]
    assert forecast(learned((1, 0.01)), 1, running, waiting) == forecast(learned((1, 0.01)), 1, running, waiting)
    assert (running[0].rounds, waiting[0].rounds) == (3, 4)


def test_overhead_is_not_taken_for_rounds() -> None:
    step_times = StepTimeModel()
    step_times.add_measurement(load=1.0, seconds=0.01, overhead=2.0)  # one step, after reconnecting
    expected = forecast(step_times, 8, [], [RemainingWork(1, 1.0, 100.0)])
    assert expected.done == pytest.approx(100 * 0.01 + 2.0, rel=0.2)


@pytest.mark.parametrize(
    ("fields", "load"),
    [
        ({"guidance_scale": 1.0}, 1.0),
        ({}, 2.0),
        ({"guidance_end": 0.5}, 1.5),
        ({"guidance_start": 0.25, "guidance_end": 0.5}, 1.25),
        ({"guidance_scale": 1.0, "guidance_end": 0.5}, 1.0),
        ({"cache_interval": 3}, 2.0 * (1 + 0.25 + 0.25) / 3),
        ({"cache_interval": 2, "guidance_end": 0.5}, 1.5 * (1 + 0.25) / 2),
        ({"size": "128x96"}, 8.0),
        ({"skip_layer_guidance_scale": 2.8, "guidance_start": 0.1, "skip_layer_guidance_stop": 0.3}, 2.1),
        ({"skip_layer_guidance_scale": 2.8, "guidance_scale": 1.0}, 1.0),
    ],
)
def test_the_load_of_an_image_is_the_mean_over_its_steps(fields: dict[str, Any], load: float) -> None:
    """With time a line over load, requests of unequal steps then tell the truth, and are told it."""
    model = replace(MODEL, max_cache_interval=10, max_skip_layer_guidance_scale=10.0)
    body = validate({"prompt": "a fox"} | fields, ImageRequest, model)
    assert load_of(to_generation_request(body, model, 0), model) == pytest.approx(load)


def test_guidance_inside_the_unet_adds_no_row() -> None:
    model = replace(MODEL, guidance="embedded")
    generation = to_generation_request(ImageRequest(prompt="a fox", guidance_scale=8.0), model, 0)
    assert load_of(generation, model) == 1.0


def test_a_step_works_on_references_as_on_the_image_and_on_a_masked_image_twice() -> None:
    model = replace(MODEL, max_references=4)
    generation = to_generation_request(ImageRequest(prompt="a fox", guidance_scale=1.0), model, 0)
    sizes = np.array([[48, 64], [96, 64]], dtype=np.int32)
    assert load_of(replace(generation, reference_sizes=sizes), model) == 1.0 + 1.0 + 2.0
    masked = replace(generation, mask=np.zeros((48, 64), dtype=np.uint8))
    assert load_of(masked, model) == 1.0 + 1.0
    assert load_of(masked, MODEL) == 1.0
    yielding = replace(model, masked_image_yields=1)
    assert load_of(masked, yielding) == 1.0 + 1.0
    assert load_of(replace(masked, reference_sizes=sizes), yielding) == 1.0 + 1.0 + 2.0
