"""The step loop on a real UNet in torch: what it computes against diffusers' pipeline, and how it batches."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_sampler.conditioning import Array
from hypergen_sampler.latent_init import LatentInit
from hypergen_sampler.lora import NO_LORAS, LoraSelection
from hypergen_sampler.request import InvalidInputError, NonFiniteError, QueueFullError, Request
from hypergen_sampler.sampling import DenoiserInputs, Trajectory, steps_between
from hypergen_sampler.stepping import POLL_SECONDS, ClientGoneError, Denoiser, IterationStats, LatentsOutput, StepLoop
from support.architectures import architecture_of
from support.scheduler_tables import CLASSES, called_by_diffusers, schedulers_of

ARCHITECTURE = architecture_of(denoiser="unet", denoiser_inputs="encoder_hidden_states")
REQUEST = Request(
    prompt="a red rocket",
    negative_prompt="blue",
    num_images=1,
    width=64,
    height=64,
    num_inference_steps=4,
    guidance_scale=7.5,
    scheduler="ddim",
    seed=11,
)


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def image_of(pipeline: Any, checkpoint: Path) -> Callable[..., Trajectory]:
    """An image of REQUEST with some fields changed, its prompt encoded by the checkpoint's own text encoder."""
    schedulers = schedulers_of(open_checkpoint(str(checkpoint)).scheduler)

    def make(**changes: Any) -> Trajectory:
        request = dataclasses.replace(REQUEST, **changes)
        prompt, negative = pipeline.encode_prompt(request.prompt, "cpu", 1, True, request.negative_prompt)
        embeddings = torch.cat([negative, prompt] if request.guidance_scale > 1 else [prompt]).detach().numpy()
        latent_init = LatentInit((4, request.height // 8, request.width // 8))
        scheduler = schedulers.make(request.scheduler, steps=request.num_inference_steps)
        return Trajectory(request, {"encoder_hidden_states": embeddings}, latent_init, scheduler, ARCHITECTURE)

    return make


async def last(samples: AsyncGenerator[LatentsOutput, None]) -> LatentsOutput:
    """The sample of the final latents."""
    return [sample async for sample in samples][-1]


async def until_called(unet: Any, calls: int) -> None:
    while len(unet.rows_of_calls) < calls:
        await asyncio.sleep(0)


async def until_idle(rounds: list[IterationStats]) -> None:
    """The last round is reported after its images are on their way."""
    while rounds[-1].active or rounds[-1].waiting:
        await asyncio.sleep(0)


def loop_on(unet: Denoiser, report: Callable[[IterationStats], None] = lambda _: None, **limits: int) -> StepLoop:
    sizes = {"max_rows": 16, "max_active": 32, "max_waiting": 8} | limits
    return StepLoop(
        unet,
        max_rows=sizes["max_rows"],
        max_active=sizes["max_active"],
        max_waiting=sizes["max_waiting"],
        report=report,
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("scheduler", sorted(CLASSES))
async def test_latents_equal_those_of_diffusers_pipeline(
    scheduler: str,
    guidance_scale: float,
    pipeline: Any,
    checkpoint: Path,
    unet: Denoiser,
    image_of: Callable[..., Trajectory],
) -> None:
    ours = await last(loop_on(unet).sample(image_of(scheduler=scheduler, guidance_scale=guidance_scale), never))
    pipeline.scheduler = called_by_diffusers(scheduler, PNDMScheduler.from_pretrained(checkpoint / "scheduler"))
    theirs = pipeline(
        REQUEST.prompt,
        negative_prompt=REQUEST.negative_prompt,
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        output_type="latent",
    ).images[0]
    scale = float(theirs.abs().max())
    assert np.abs(ours.latents - theirs.numpy()).max() <= 1e-5 * scale


async def test_different_images_in_one_batch_come_out_as_they_would_alone(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    bodies: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "prompt": "a blue cat", "num_inference_steps": 7},
        {"seed": 3, "guidance_scale": 1.0, "scheduler": "euler_a"},
        {"seed": 4, "width": 72, "height": 40},
        {"seed": 5, "negative_prompt": "", "scheduler": "unipc", "guidance_scale": 2.0},
    ]
    alone = [await last(loop_on(unet).sample(image_of(**fields), never)) for fields in bodies]
    unet.rows_of_calls.clear()
    loop = loop_on(unet)
    together = await asyncio.gather(*(last(loop.sample(image_of(**fields), never)) for fields in bodies))
    for one, other in zip(alone, together, strict=True):
        # A batch of seven rows is summed in another order than one of two. Seen: 1.2e-4; another image would be 1.
        assert np.abs(one.latents - other.latents).max() <= 5e-4 * np.abs(one.latents).max()
    # Four rounds of the square batch beside the odd-sized image, then three of the one with 7 steps.
    assert Counter(unet.rows_of_calls) == Counter([7, 2] * 4 + [2] * 3)


async def test_images_of_different_models_share_no_batch(unet: Any, image_of: Callable[..., Trajectory]) -> None:
    """Two LoRAs that change the UNet; one that does not, and is in a batch with the checkpoint as it is."""
    ink = LoraSelection(models={"unet": "unet.ink@1"})
    clay = LoraSelection(models={"unet": "unet.clay@1"})
    words = LoraSelection(models={"text_encoder": "text_encoder.words@1"})
    calls: list[tuple[str, int]] = []

    def record(rows: DenoiserInputs) -> Mapping[str, Array]:
        calls.append((rows.model, len(rows.sample)))
        answer: Mapping[str, Array] = unet(rows)
        return answer

    loop = loop_on(record)
    selections = [NO_LORAS, ink, words, clay, ink, NO_LORAS]
    bodies = [{"seed": seed, "loras": loras, "num_inference_steps": 2} for seed, loras in enumerate(selections)]
    await asyncio.gather(*(last(loop.sample(image_of(**fields), never)) for fields in bodies))
    assert Counter(calls) == Counter([("unet", 6), ("unet.ink@1", 4), ("unet.clay@1", 2)] * 2)


def test_a_share_of_the_steps_is_what_it_is_on_paper_in_float32_too() -> None:
    for hundredths, steps in product(range(101), range(1, 151)):
        share = float(np.float32(hundredths / 100))
        exact = hundredths * steps // 100
        assert steps_between(share, 1.0, steps) == range(exact, steps), (share, steps)
        assert steps_between(0.0, share, steps) == range(exact), (share, steps)


def test_a_lora_has_a_shallow_unet_of_its_own_where_it_changes_the_unet(image_of: Callable[..., Trajectory]) -> None:
    names = {"unet": "unet.ink@1", "unet_shallow": "unet_shallow.ink@1"}
    ink = LoraSelection(models=names)
    for loras, models in [(ink, list(names.values())), (NO_LORAS, list(names))]:
        image = image_of(loras=loras, cache_interval=2)
        called = []
        for _ in range(4):
            rows = image.denoiser_inputs()
            called.append(rows.model)
            image.advance({name: np.zeros_like(rows.sample) for name in rows.outputs})
        assert called == models * 2


async def test_an_image_joins_between_steps(unet: Any, image_of: Callable[..., Trajectory]) -> None:
    loop = loop_on(unet)
    first = asyncio.create_task(last(loop.sample(image_of(num_inference_steps=6), never)))
    await until_called(unet, 2)
    await last(loop.sample(image_of(num_inference_steps=2), never))
    assert not first.done()
    await first
    assert sorted(unet.rows_of_calls) == [2, 2, 2, 2, 4, 4]


async def test_a_batch_never_exceeds_the_engines_rows(unet: Any, image_of: Callable[..., Trajectory]) -> None:
    loop = loop_on(unet, max_rows=5)
    await asyncio.gather(*(last(loop.sample(image_of(seed=seed, num_inference_steps=1), never)) for seed in range(5)))
    assert Counter(unet.rows_of_calls) == Counter([4, 4, 2])


async def test_images_beyond_max_active_wait_their_turn(unet: Any, image_of: Callable[..., Trajectory]) -> None:
    loop = loop_on(unet, max_active=2)
    await asyncio.gather(*(last(loop.sample(image_of(seed=seed, num_inference_steps=2), never)) for seed in range(3)))
    assert unet.rows_of_calls == [4, 4, 2, 2]


async def test_the_time_that_an_image_waits_is_told_from_that_of_its_steps(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    def slow(rows: DenoiserInputs) -> Mapping[str, Array]:
        time.sleep(0.02)
        answer: Mapping[str, Array] = unet(rows)
        return answer

    loop = loop_on(slow, max_active=1)
    first, second = await asyncio.gather(*(last(loop.sample(image_of(num_inference_steps=2), never)) for _ in range(2)))
    assert first.waited < 0.02 < 0.04 <= first.took
    assert second.waited >= first.took - 0.01
    assert second.took >= 0.04


async def test_previews_come_in_order_and_change_nothing(unet: Denoiser, image_of: Callable[..., Trajectory]) -> None:
    plain = await last(loop_on(unet).sample(image_of(num_inference_steps=8), never))
    samples = [
        sample async for sample in loop_on(unet).sample(image_of(num_inference_steps=8, partial_images=3), never)
    ]
    assert [(sample.step, sample.is_final) for sample in samples] == [(2, False), (4, False), (6, False), (8, True)]
    assert np.array_equal(samples[-1].latents, plain.latents)
    distances = [float(np.abs(sample.latents - plain.latents).mean()) for sample in samples]
    assert distances == sorted(distances, reverse=True), "each preview is nearer to the image"


async def test_the_steps_do_not_wait_for_whoever_looks_at_a_preview(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    samples = loop_on(unet).sample(image_of(num_inference_steps=8, partial_images=3), never)
    assert (await anext(samples)).step == 2
    await asyncio.wait_for(until_called(unet, 8), 10)
    assert [sample.step async for sample in samples] == [4, 6, 8]


async def test_an_image_that_nobody_waits_for_any_longer_takes_no_further_step(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    loop = loop_on(unet)
    samples = loop.sample(image_of(num_inference_steps=50, partial_images=3), never)
    await anext(samples)
    await samples.aclose()
    calls = len(unet.rows_of_calls)
    await last(loop.sample(image_of(num_inference_steps=2), never))
    assert len(unet.rows_of_calls) <= calls + 3


async def test_a_cancelled_image_ends_soon(unet: Any, image_of: Callable[..., Trajectory]) -> None:
    loop = loop_on(unet)
    gone = asyncio.Event()
    sampling = asyncio.create_task(last(loop.sample(image_of(num_inference_steps=500), gone.is_set)))
    await until_called(unet, 3)
    gone.set()
    cancelled = time.monotonic()
    with pytest.raises(ClientGoneError):
        await sampling
    assert time.monotonic() - cancelled < POLL_SECONDS + 0.2
    assert len(unet.rows_of_calls) < 400


async def test_cancellation_is_asked_once_at_a_time_for_all_images_of_a_request(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    asked: list[float] = []

    def cancelled() -> bool:
        asked.append(time.monotonic())
        return False

    def slow(rows: DenoiserInputs) -> Mapping[str, Array]:
        time.sleep(POLL_SECONDS)
        answer: Mapping[str, Array] = unet(rows)
        return answer

    loop = loop_on(slow)
    await asyncio.gather(*(last(loop.sample(image_of(seed=seed), cancelled)) for seed in range(3)))
    assert len(asked) >= 2
    assert min(second - first for first, second in pairwise(asked)) >= 0.9 * POLL_SECONDS


async def test_every_round_is_reported(unet: Denoiser, image_of: Callable[..., Trajectory]) -> None:
    rounds: list[IterationStats] = []
    loop = loop_on(unet, rounds.append, max_active=2)
    bodies: list[dict[str, Any]] = [
        {"num_inference_steps": 2},
        {"num_inference_steps": 3, "width": 72},
        {"num_inference_steps": 1, "guidance_scale": 1.0},
    ]
    await asyncio.gather(*(last(loop.sample(image_of(**fields), never)) for fields in bodies))
    await asyncio.wait_for(until_idle(rounds), 10)
    assert [(done.active, done.waiting) for done in rounds] == [(2, 1), (1, 1), (0, 0)]
    assert [(done.denoiser_calls, done.denoiser_rows, done.steps) for done in rounds] == [
        (2, 4, 2),
        (2, 4, 2),
        (2, 3, 2),
    ]
    assert all(done.denoiser_seconds > 0 and done.saved_steps == 0 for done in rounds)


async def test_steps_that_a_gone_client_saves_are_counted_for_all_its_images(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    rounds: list[IterationStats] = []
    gone = asyncio.Event()
    loop = loop_on(unet, rounds.append, max_active=2)
    images = [image_of(num_inference_steps=500, seed=seed) for seed in range(3)]
    sampling = [asyncio.create_task(last(loop.sample(image, gone.is_set))) for image in images]
    await until_called(unet, 3)
    gone.set()
    results = await asyncio.gather(*sampling, return_exceptions=True)
    assert [type(result) for result in results] == [ClientGoneError] * 3
    await asyncio.wait_for(until_idle(rounds), 10)
    assert rounds[-1] == IterationStats(
        active=0,
        waiting=0,
        denoiser_calls=0,
        denoiser_rows=0,
        denoiser_seconds=0,
        steps=0,
        saved_steps=1500 - 2 * images[0].steps_done,
    )


async def test_a_failing_batch_ends_its_own_images_alone(unet: Any, image_of: Callable[..., Trajectory]) -> None:
    def fails_on_wide(rows: DenoiserInputs) -> Mapping[str, Array]:
        if rows.sample.shape[3] == 9:
            raise RuntimeError("out of memory")
        answer: Mapping[str, Array] = unet(rows)
        return answer

    loop = loop_on(fails_on_wide)
    wide, square = await asyncio.gather(
        last(loop.sample(image_of(width=72), never)), last(loop.sample(image_of(), never)), return_exceptions=True
    )
    assert isinstance(wide, RuntimeError)
    assert isinstance(square, LatentsOutput)
    assert (await last(loop.sample(image_of(), never))).latents.shape == (4, 8, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
async def test_an_image_whose_latents_are_not_finite_fails_and_leaves_the_others_of_its_batch_as_they_are(
    value: float, unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    images = [image_of(seed=seed, num_inference_steps=steps) for seed, steps in [(1, 4), (2, 6), (3, 4)]]
    healthy = [await last(loop_on(unet).sample(image_of(seed=seed), never)) for seed in (1, 3)]

    def breaks_the_second(rows: DenoiserInputs) -> Mapping[str, Array]:
        answer: dict[str, Array] = {name: array.copy() for name, array in unet(rows).items()}
        if len(rows.sample) == 6 and unet.rows_of_calls.count(6) == 3:
            answer["model_output"][3] = value
        return answer

    unet.rows_of_calls.clear()
    loop = loop_on(breaks_the_second)
    first, second, third = await asyncio.gather(
        *(last(loop.sample(image, never)) for image in images), return_exceptions=True
    )
    assert isinstance(second, NonFiniteError)
    assert str(second) == "not finite: the latents after step 3 of 6"
    assert unet.rows_of_calls == [6, 6, 6, 4], "it takes no further step"
    for alone, together in zip(healthy, (first, third), strict=True):
        assert isinstance(together, LatentsOutput)
        assert np.abs(alone.latents - together.latents).max() <= 1e-4 * np.abs(alone.latents).max()


@pytest.mark.parametrize("method", ["scale_model_input", "step"])
async def test_a_scheduler_that_raises_fails_its_own_image_and_leaves_the_others_of_its_batch_as_they_are(
    method: str, unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    alone = [await last(loop_on(unet).sample(image_of(seed=seed), never)) for seed in (1, 3)]
    images = [image_of(seed=seed) for seed in (1, 2, 3)]
    scheduler = images[1]._scheduler
    works, steps = getattr(scheduler, method), 0

    def raises_at_the_third_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise IndexError("index 3 is out of bounds")
        return works(*args, **kwargs)

    setattr(scheduler, method, raises_at_the_third_step)
    loop = loop_on(unet)
    first, second, third = await asyncio.gather(
        *(last(loop.sample(image, never)) for image in images), return_exceptions=True
    )
    assert isinstance(second, IndexError)
    for expected, together in zip(alone, (first, third), strict=True):
        assert isinstance(together, LatentsOutput)
        assert np.abs(expected.latents - together.latents).max() <= 1e-4 * np.abs(expected.latents).max()


async def test_images_whose_inputs_differ_in_shape_share_no_batch(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    """Such as those whose prompts are encoded to other numbers of tokens."""
    images = [image_of(seed=seed, num_inference_steps=2) for seed in range(3)]
    images[1]._conditions = {name: np.concatenate([each, each], axis=1) for name, each in images[1]._conditions.items()}
    loop = loop_on(unet)
    await asyncio.gather(*(last(loop.sample(image, never)) for image in images))
    assert Counter(unet.rows_of_calls) == Counter([4, 2] * 2)


async def test_no_image_waits_for_ever_when_triton_cannot_be_asked(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    def broken() -> bool:
        raise OSError("Triton is gone")

    loop = loop_on(unet, max_active=1)
    images = [image_of(num_inference_steps=500) for _ in range(2)]
    sampling = [asyncio.create_task(last(loop.sample(image, broken))) for image in images]
    results = await asyncio.wait_for(asyncio.gather(*sampling, return_exceptions=True), 10)
    assert [type(result) for result in results] == [OSError, OSError]
    assert (await last(loop.sample(image_of(), never))).latents.shape == (4, 8, 8)


async def test_no_image_waits_for_ever_when_the_loop_itself_fails(
    unet: Any, image_of: Callable[..., Trajectory]
) -> None:
    reports: list[IterationStats] = []

    def report_once(done: IterationStats) -> None:
        reports.append(done)
        if len(reports) == 1:
            raise OSError("Triton is gone")

    loop = loop_on(unet, report_once, max_active=1)
    sampling = [asyncio.create_task(last(loop.sample(image_of(), never))) for _ in range(2)]
    results = await asyncio.wait_for(asyncio.gather(*sampling, return_exceptions=True), 10)
    assert [type(result) for result in results] == [OSError, OSError]
    assert (await last(loop.sample(image_of(), never))).latents.shape == (4, 8, 8)


async def test_the_event_loop_is_free_while_the_unet_works(unet: Any, image_of: Callable[..., Trajectory]) -> None:
    """And batches of one round, which share no call, are in flight together."""
    let_go, in_flight = threading.Event(), threading.Semaphore(0)

    def held(rows: DenoiserInputs) -> Mapping[str, Array]:
        in_flight.release()
        assert let_go.wait(10)
        answer: Mapping[str, Array] = unet(rows)
        return answer

    loop = loop_on(held)
    bodies = [{"width": width, "num_inference_steps": 1} for width in (64, 72, 80)]
    sampling = [asyncio.create_task(last(loop.sample(image_of(**fields), never))) for fields in bodies]
    await asyncio.sleep(0)
    for _ in bodies:
        assert await asyncio.to_thread(in_flight.acquire, timeout=10)
    assert not unet.rows_of_calls
    let_go.set()
    await asyncio.gather(*sampling)
    assert unet.rows_of_calls == [2, 2, 2]


def test_reservations_are_bounded_and_given_back(unet: Denoiser) -> None:
    loop = loop_on(unet, max_active=2, max_waiting=1)
    loop.reserve(3)
    with pytest.raises(QueueFullError, match=r"^queue full"):
        loop.reserve(1)
    loop.release(3)
    loop.reserve(1)


def test_steps_that_the_scheduler_refuses_are_the_requests_fault(image_of: Callable[..., Trajectory]) -> None:
    with pytest.raises(InvalidInputError, match=r"^num_inference_steps: "):
        image_of(scheduler="lcm", num_inference_steps=100)
