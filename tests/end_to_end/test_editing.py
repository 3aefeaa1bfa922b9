"""Previews, images to start from and masks, as a plain Triton client asks for them, against diffusers' pipelines."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from tritonclient.utils import InferenceServerException

from support.plain_triton import Response, ask
from support.running_server import Pixels, Server
from support.scheduler_tables import called_by_diffusers

PROMPT = "a red rocket on a blue background"
STEPS = 6
# Of 255, as in test_parity: the engine's rounding differs from torch's.
TOLERANCE = 0.1

ROWS, COLUMNS = np.mgrid[0:72, 0:104]
ORIGINAL: Pixels = np.stack([COLUMNS * 2, ROWS * 3, np.where(COLUMNS > ROWS, 220, 40)], axis=-1).astype(np.uint8)
MASK: Pixels = np.where((ROWS > 11) & (ROWS < 50) & (COLUMNS > 21) & (COLUMNS < 83), 255, 0).astype(np.uint8)


def decoded(server: Server) -> int:
    """How many images the VAE's decoder has made."""
    return server.counts_of("vae_decoder")[0]


def image_of(server: Server, **fields: Any) -> Pixels:
    (response,) = ask(server.triton_url, **{"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 5} | fields)
    assert response["is_final"][0]
    return response["image"]


def by_diffusers(pipeline: Any, scheduler: str, **fields: Any) -> Pixels:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = called_by_diffusers(scheduler, pipeline.scheduler)
    generator = torch.Generator().manual_seed(5)
    image = pipeline(PROMPT, num_inference_steps=STEPS, generator=generator, **fields).images[0]
    return np.asarray(image)


def difference(ours: Pixels, theirs: Pixels) -> float:
    """Mean absolute difference, in steps of 1/255; `pytest -rP` shows it."""
    assert theirs.std() > 10, "a flat image would prove nothing"
    distances = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"mean difference {distances.mean():.4f}/255, largest {distances.max()}/255")
    return float(distances.mean())


def stages_of(responses: list[Response]) -> dict[int, list[tuple[int, bool]]]:
    """Image -> step and finality of what came of it, in order."""
    stages: dict[int, list[tuple[int, bool]]] = {}
    for response in responses:
        step = int(response["step"][0]), bool(response["is_final"][0])
        stages.setdefault(int(response["image_index"][0]), []).append(step)
    return stages


def test_previews_come_in_order_before_their_image_and_cost_a_decode_each(server: Server) -> None:
    fields: dict[str, Any] = {
        "prompt": PROMPT,
        "num_images": 3,
        "num_inference_steps": 20,
        "seed": 5,
        "scheduler": "ddim",
    }
    at_first = decoded(server)
    plain = ask(server.triton_url, **fields)
    # Triton counts a call after it has answered it, so the last decode may be counted after its image has come.
    server.wait_until(lambda: decoded(server) == at_first + 3, 30, "counted")
    responses = ask(server.triton_url, **fields, partial_images=3)
    server.wait_until(lambda: decoded(server) >= at_first + 3 + 3 * 4, 30, "counted")
    assert decoded(server) == at_first + 3 + 3 * 4
    in_order = [(5, False), (10, False), (15, False), (20, True)]
    assert stages_of(responses) == {0: in_order, 1: in_order, 2: in_order}
    finals = {int(response["seed"][0]): response["image"] for response in plain}
    for seed, final in finals.items():
        own = [response["image"] for response in responses if response["seed"][0] == seed]
        distances = [float(np.abs(image.astype(int) - final.astype(int)).mean()) for image in own]
        print(f"seed {seed}: mean distance to the image {[f'{distance:.1f}' for distance in distances]}")
        assert np.abs(own[-1].astype(int) - final.astype(int)).max() <= 1
        assert distances[2] < distances[0]


def test_a_response_tells_of_tokens_and_where_the_time_went(server: Server) -> None:
    began = time.perf_counter()
    (response,) = ask(server.triton_url, prompt="a red rocket", negative_prompt="cat", num_inference_steps=20)
    wall = (time.perf_counter() - began) * 1000
    print(f"{response['timings_ms'].tolist()} of {wall:.0f} ms")
    assert response["prompt_tokens"].tolist() == [4]
    assert all(response["timings_ms"] > 0)
    assert response["timings_ms"].sum() <= wall


@pytest.mark.parametrize(("guidance_scale", "strength"), [(1.0, 0.5), (7.5, 0.8), (7.5, 1.0)])
@pytest.mark.parametrize("scheduler", ["pndm", "euler_a", "heun", "dpmpp_2m", "lcm"])
def test_image_to_image_equals_that_of_diffusers(
    scheduler: str, guidance_scale: float, strength: float, pipeline: Any, server: Server
) -> None:
    fields: dict[str, Any] = {"guidance_scale": guidance_scale, "strength": strength}
    ours = image_of(server, image=ORIGINAL, scheduler=scheduler, **fields)
    image_to_image = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    assert (
        difference(ours, by_diffusers(image_to_image, scheduler, image=Image.fromarray(ORIGINAL), **fields))
        <= TOLERANCE
    )


@pytest.mark.parametrize(("guidance_scale", "strength"), [(1.0, 0.7), (7.5, 1.0)])
@pytest.mark.parametrize("scheduler", ["pndm", "euler_a", "heun"])
def test_inpainting_equals_that_of_diffusers_and_leaves_the_rest_to_the_bit(
    scheduler: str, guidance_scale: float, strength: float, pipeline: Any, server: Server
) -> None:
    fields: dict[str, Any] = {"guidance_scale": guidance_scale, "strength": strength}
    ours = image_of(server, image=ORIGINAL, mask=MASK, scheduler=scheduler, **fields)
    inpainting = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    given = {"image": Image.fromarray(ORIGINAL), "mask_image": Image.fromarray(MASK), "width": 104, "height": 72}
    theirs = by_diffusers(inpainting, scheduler, **given, **fields)
    repainted = MASK == 255
    assert np.array_equal(ours[~repainted], ORIGINAL[~repainted])
    assert difference(ours[repainted], theirs[repainted]) <= TOLERANCE


def test_images_from_one_image_differ_by_their_seeds_as_alone(server: Server) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "image": ORIGINAL, "num_inference_steps": STEPS}
    together = ask(server.triton_url, **fields, seed=20, num_images=3)
    assert sorted(int(response["seed"][0]) for response in together) == [20, 21, 22]
    for response in together:
        alone = image_of(server, image=ORIGINAL, seed=int(response["seed"][0]))
        assert np.abs(response["image"].astype(int) - alone.astype(int)).max() <= 1


def test_the_default_strengths_are_those_of_diffusers(server: Server) -> None:
    assert np.array_equal(image_of(server, image=ORIGINAL), image_of(server, image=ORIGINAL, strength=0.8))
    masked = {"image": ORIGINAL, "mask": MASK}
    assert np.array_equal(image_of(server, **masked), image_of(server, **masked, strength=1.0))


@pytest.mark.parametrize("more", [{}, {"mask": MASK}, {"scheduler": "heun"}], ids=["plain", "masked", "heun"])
@pytest.mark.parametrize("strength", [0.0, 0.01, 0.16])
def test_a_strength_that_leaves_no_step_returns_the_image(
    strength: float, more: dict[str, Any], server: Server
) -> None:
    fields: dict[str, Any] = {"image": ORIGINAL, "num_inference_steps": STEPS, "partial_images": 2}
    responses = ask(server.triton_url, prompt=PROMPT, strength=strength, num_images=2, seed=5, **fields, **more)
    assert [int(response["step"][0]) for response in responses] == [0, 0]
    assert sorted(int(response["seed"][0]) for response in responses) == [5, 6]
    assert all(np.array_equal(response["image"], ORIGINAL) for response in responses)


def test_an_image_in_one_step_is_native_where_no_strength_is_given(server: Server) -> None:
    (response,) = ask(server.triton_url, prompt=PROMPT, image=ORIGINAL, num_inference_steps=1, scheduler="euler")
    assert response["step"].tolist() == [1]
    assert not np.array_equal(response["image"], ORIGINAL)


def test_a_response_tells_what_was_cut_off_of_a_prompt(server: Server) -> None:
    for words, read, cut in ((14, 14, 0), (30, 30, 0), (240, 224, 16)):
        (response,) = ask(server.triton_url, prompt="cat " * words, guidance_scale=1.0, num_inference_steps=2)
        assert (response["prompt_tokens"].tolist(), response["truncated_tokens"].tolist()) == ([read], [cut])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("image", {"image": ORIGINAL, "width": 64}),
        ("image", {"image": ORIGINAL[:64], "height": 72}),
        ("image", {"image": ORIGINAL[:, :0], "width": 64, "height": 64}),
        ("height", {"image": ORIGINAL[:60]}),
        ("mask", {"image": ORIGINAL, "mask": MASK[:64]}),
        ("mask", {"mask": MASK}),
        ("strength", {"image": ORIGINAL, "strength": 1.5}),
        ("strength", {"strength": 0.5}),
        ("partial_images", {"partial_images": 4}),
    ],
)
def test_what_cannot_be_served_is_named(name: str, fields: dict[str, Any], server: Server) -> None:
    with pytest.raises(InferenceServerException, match=rf"^{name}: ") as refused:
        ask(server.triton_url, prompt=PROMPT, **fields)
    print(refused.value)
