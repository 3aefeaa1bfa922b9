"""Transformer families through the real Triton, against diffusers' pipelines of their miniatures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from hypergen_export.checkpoints.families import flux2
from hypergen_export.repository.export import export
from hypergen_export.repository.request import ExportRequest
from support.image_files import file_of
from support.parity import input_image, request_of
from support.pipelines import pipeline_of
from support.running_server import (
    KEY,
    Pixels,
    Server,
    generate,
    generate_all,
    generate_together,
    pixels_of,
    start_server,
    stop_server,
)
from support.transformer_miniatures import save_shallow_klein, state_small_default
from support.transformer_pipelines import FROM_IMAGE, image_by_diffusers, pipeline_from_image

pytestmark = pytest.mark.claim("families")

# Family -> the guidance scale to ask for. An export takes most of a test's time: FLUX.1 and Qwen-Image meet Triton with
# nothing that these do not. `tests/test_transformers.py` has all of them.
SCALES = {"chroma": 3.5, "flux2-klein": 1.0, "sana-1.5": 3.5, "stable-diffusion-3": 3.5, "z-image": 3.5}
# Family with classifier-free guidance -> the smallest scale.
SMALLEST_SCALES = {"chroma": 1.0, "sana-1.5": 1.0, "stable-diffusion-3": 1.0, "z-image": 0.0}


@dataclass
class Served:
    family: str
    server: Server
    pipeline: Any

    def by_diffusers(self, fields: dict[str, Any]) -> Pixels:
        width, height = (int(side) for side in fields["size"].split("x"))
        rest = {name: value for name, value in fields.items() if name != "size"}
        return image_by_diffusers(self.pipeline, request_of(**rest, width=width, height=height))[1]


@pytest.fixture(scope="module")
def shallow_klein(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A miniature and its repository. Each layer of its text encoder takes two seconds to export."""
    folder = state_small_default(save_shallow_klein(tmp_path_factory.mktemp("flux2-klein") / "checkpoint"))
    output = folder.with_name("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux2, "_LAST_LAYER", 3)
        export(ExportRequest(model=str(folder), output=output, max_batch_size=8))
    return folder, output


@pytest.fixture(scope="module", params=SCALES)
def served(
    request: pytest.FixtureRequest, family_of: Callable[[str], tuple[Path, Path]], cache_dir: Path
) -> Iterator[Served]:
    if request.param == "flux2-klein":
        folder, repository = request.getfixturevalue("shallow_klein")
        server = start_server("--cache-dir", str(cache_dir), model=str(repository))
    else:
        folder, repository = family_of(request.param)
        assert repository.parent == cache_dir
        server = start_server("--dtype", "float32", "--cache-dir", str(cache_dir), model=str(folder))
    yield Served(request.param, server, pipeline_of(folder))
    assert stop_server(server) == 0, "\n".join(server.lines)


async def test_images_of_other_prompts_at_once_equal_those_of_diffusers(served: Served) -> None:
    scale = SCALES[served.family]
    bodies: list[dict[str, Any]] = [
        {"prompt": "a red rocket", "seed": 1, "num_inference_steps": 6, "size": "96x64", "guidance_scale": scale},
        {"prompt": "a cat", "seed": 2, "num_inference_steps": 5, "size": "96x64", "guidance_scale": scale},
    ]
    if served.family == "stable-diffusion-3":
        skipping = {"skip_layer_guidance_scale": 2.8, "skip_layer_guidance_stop": 0.5}
        bodies.append({**bodies[0], "seed": 4, **skipping})
    images = await generate_all(served.server, bodies)
    for image, fields in zip(images, bodies, strict=True):
        theirs = served.by_diffusers(fields)
        assert theirs.std() > 10, "a flat image would prove nothing"
        levels = np.abs(image.astype(int) - theirs.astype(int))
        print(f"{served.family}: at most {levels.max()}/255, mean {levels.mean():.5f}")
        assert levels.max() <= 1


@pytest.mark.parametrize("served", ["sana-1.5"], indirect=True)
async def test_images_of_other_prompts_steps_and_scales_share_calls(served: Served) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "a red rocket", "seed": 1, "num_inference_steps": 6, "guidance_scale": 3.5},
        {"prompt": "Two CATS", "negative_prompt": "Blue", "seed": 2, "num_inference_steps": 5, "guidance_scale": 2.0},
        {"prompt": "a dog", "seed": 3, "num_inference_steps": 4, "guidance_scale": 1.0},
    ]
    async with served.server.async_client() as client:
        requests = [generate(client, **body, size="96x64") for body in bodies]
        results, executions = await generate_together(served.server, requests, "transformer")
    assert executions == {2 + 2 + 1: 4, 2 + 2: 1, 2: 1}
    for ours, fields in zip(results, bodies, strict=True):
        levels = np.abs(ours.astype(int) - served.by_diffusers({**fields, "size": "96x64"}).astype(int))
        print(f"{served.family}: at most {levels.max()}/255, mean {levels.mean():.5f}")
        assert levels.max() <= 1


@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
async def test_edits_equal_those_of_diffusers(served: Served, masked: bool) -> None:
    """What the mask keeps is the input image itself. FLUX.2-klein has no pipeline without a mask."""
    scale, image = SCALES[served.family], input_image()
    covered = np.zeros((64, 64), dtype=np.uint8)
    covered[16:48, 16:48] = 255
    given = {"seed": 3, "num_inference_steps": 5, "guidance_scale": scale, "strength": 0.6}
    files = {"image": file_of(Image.fromarray(image))}
    if masked:
        files["mask"] = file_of(Image.fromarray(np.dstack([image, 255 - covered])))
    async with served.server.async_client() as client:
        answer = await client.images.edit(prompt="a cat", size=cast(Any, "64x64"), extra_body=given, **cast(Any, files))
    assert answer.data is not None
    ours = pixels_of(answer.data[0])
    if masked:
        assert (ours[covered == 0] == image[covered == 0]).all()
    assert np.abs(ours.astype(int) - image.astype(int)).mean() > 1, "nothing was edited"
    if served.family not in FROM_IMAGE and not masked:
        return
    pipeline = pipeline_from_image(served.family, served.pipeline, masked=masked)
    request = request_of(prompt="a cat", image=image, mask=covered if masked else None, **given)
    theirs = image_by_diffusers(pipeline, request)[1]
    levels = np.abs(ours.astype(int) - theirs.astype(int))[covered == 255 if masked else ...]
    print(f"{served.family}: at most {levels.max()}/255, mean {levels.mean():.5f}")
    assert levels.max() <= 1


@pytest.mark.parametrize("served", ["flux2-klein"], indirect=True)
async def test_edits_with_references_equal_those_of_diffusers(served: Served) -> None:
    """None, one and two, in other sizes, at once: those of as many tokens share calls."""
    images = [input_image(128, 80), input_image(64, 96), input_image(80, 128)[:, ::-1].copy()]
    references = [(), (images[0],), (images[2],), (images[1], images[0])]
    given: list[dict[str, Any]] = [
        {"prompt": f"{number} cats", "seed": number, "num_inference_steps": 5} for number, _ in enumerate(references)
    ]
    requests = [edit(served.server, files, "96x64", **each) for files, each in zip(references, given, strict=True)]
    results, executions = await generate_together(served.server, requests, "transformer")
    assert executions == {2: 5, 1: 2 * 5}
    for ours, files, fields in zip(results, references, given, strict=True):
        theirs = image_by_diffusers(served.pipeline, request_of(**fields, references=files, width=96, height=64))[1]
        levels = np.abs(ours.astype(int) - theirs.astype(int))
        print(f"{len(files)} references: at most {levels.max()}/255, mean {levels.mean():.5f}")
        assert levels.max() <= 1


async def edit(server: Server, references: tuple[Pixels, ...], size: str, *, prompt: str, **fields: Any) -> Pixels:
    """The result for these images, by OpenAI's client; without any, that of a generation."""
    files: Any = [file_of(Image.fromarray(image)) for image in references]
    async with server.async_client() as client:
        if not files:
            answer = await client.images.generate(prompt=prompt, size=cast(Any, size), extra_body=fields)
        else:
            answer = await client.images.edit(image=files, prompt=prompt, size=cast(Any, size), extra_body=fields)
    assert answer.data is not None
    return pixels_of(answer.data[0])


@pytest.mark.parametrize("served", ["flux2-klein"], indirect=True)
async def test_an_edit_has_the_size_of_its_first_image_and_counts_all(served: Served) -> None:
    files: Any = [file_of(Image.fromarray(input_image(*size))) for size in [(100, 75), (64, 64)]]
    async with served.server.async_client() as client:
        answer = await client.images.edit(image=files, prompt="a cat", extra_body={"num_inference_steps": 1})
        assert answer.data is not None
        assert pixels_of(answer.data[0]).shape == (75, 100, 3)
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.image_tokens == (96 * 64 + 64 * 64) // 64
        with pytest.raises(openai.BadRequestError, match=r"5 images\. The model takes at most 4") as refusal:
            await client.images.edit(image=files[:1] * 5, prompt="a cat")
    assert refusal.value.param == "image"


async def test_the_images_of_a_request_share_calls(served: Served) -> None:
    before = served.server.counts_of("transformer")
    async with served.server.async_client() as client:
        await client.images.generate(prompt="a cat", n=3, size="64x64", extra_body={"num_inference_steps": 4})
    rows, executions = (now - then for now, then in zip(served.server.counts_of("transformer"), before, strict=True))
    assert (rows, executions) == (3 * 4 * (2 if served.family in SMALLEST_SCALES else 1), 4)


def test_its_limits_are_stated(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    stated = httpx.get(f"{served.server.url}/v1/capabilities", headers=headers).json()
    assert (stated["default_size"], stated["size_factor"]) == ("256x256", 32 if served.family == "sana-1.5" else 16)
    guidance = [stated[name] for name in ("min_guidance_scale", "max_guidance_scale", "negative_prompt")]
    if served.family in SMALLEST_SCALES:
        assert guidance == [SMALLEST_SCALES[served.family], 20.0, True]
    else:
        assert guidance == [1.0, 1.0, False]


@pytest.mark.parametrize(
    ("field", "value"),
    [("guidance_scale", 2.0), ("negative_prompt", "a cat"), ("skip_layer_guidance_scale", 2.8)],
)
async def test_what_a_model_has_no_use_for_is_refused(served: Served, field: str, value: object) -> None:
    if served.family in SMALLEST_SCALES:
        return
    async with served.server.async_client() as client:
        with pytest.raises(openai.BadRequestError, match="It must be absent") as refusal:
            await generate(client, prompt="x", size="64x64", **{field: value})
        assert refusal.value.param == field
