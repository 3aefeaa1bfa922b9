"""InstructPix2Pix through the real Triton, against diffusers' pipeline, with a decoder for previews beside the VAE."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from support.miniature import save_tiny_vae
from support.parity import input_image, request_of, sampler_of
from support.pipelines import pipeline_of
from support.plain_triton import ask
from support.running_server import Pixels, Server, pixels_of, start_server, stop_server

PROMPT = "a red rocket on a blue background"
# Of 255, as in test_parity: the engine's rounding differs from torch's.
TOLERANCE = 0.1
IMAGE = input_image(104, 72)
FIELDS: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "image_guidance_scale": 1.2}


@dataclass
class Served:
    """The server, the checkpoint's folder and that of the decoder."""

    server: Server
    folder: Path
    preview_vae: Path


@pytest.fixture(scope="module")
def served(
    checkpoint_of: Callable[[str], Path], exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The text encoder and decoder are those of Stable Diffusion 1.x, and taken from its export."""
    folder, tiny = checkpoint_of("instruct-pix2pix"), save_tiny_vae(tmp_path_factory.mktemp("tiny"))
    options = ("--dtype", "float32", "--cache-dir", str(exported.parent), "--preview-vae", str(tiny))
    server = start_server(*options, "--max-batch-size", "1", model=str(folder))
    yield Served(server, folder, tiny)
    assert stop_server(server) == 0, "\n".join(server.lines)


def difference(ours: Pixels, theirs: Pixels) -> float:
    assert theirs.std() > 10, "a flat image would prove nothing"
    distances = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"mean difference {distances.mean():.4f}/255, largest {distances.max()}/255")
    return float(distances.mean())


def png(image: Image.Image) -> tuple[str, bytes]:
    file = io.BytesIO()
    image.save(file, "png")
    return "image.png", file.getvalue()


def test_an_edit_is_that_of_diffusers_and_a_mask_keeps_the_rest(served: Served) -> None:
    image = Image.fromarray(IMAGE)
    mask = Image.new("RGBA", image.size, "black")
    mask.paste((0, 0, 0, 0), (20, 10, 60, 40))
    generator = torch.Generator().manual_seed(5)
    made = pipeline_of(served.folder)(PROMPT, image=image, **FIELDS, generator=generator).images[0]
    with served.server.client() as client:
        edit = client.images.edit(image=png(image), prompt=PROMPT, extra_body={**FIELDS, "seed": 5})
        masked = client.images.edit(image=png(image), mask=png(mask), prompt=PROMPT, extra_body={**FIELDS, "seed": 5})
        with pytest.raises(openai.BadRequestError, match="The model edits images"):
            client.images.generate(prompt=PROMPT)
    said = "\n".join(served.server.lines)
    assert "/v1/images/edits" in said
    assert "--form-string 'prompt=make it snow'" in said
    assert edit.data is not None
    assert masked.data is not None
    whole, part = pixels_of(edit.data[0]), pixels_of(masked.data[0])
    assert difference(whole, np.asarray(made)) <= TOLERANCE
    within = np.asarray(mask)[..., 3:] == 0
    assert np.abs(part.astype(int) - np.where(within, whole, IMAGE)).max() <= 1


async def test_previews_are_decoded_by_the_tiny_decoder_and_the_image_by_the_vae(served: Served) -> None:
    counted = {model: served.server.counts_of(model)[0] for model in ("preview_decoder", "vae_decoder")}
    fields = {"prompt": PROMPT, "image": IMAGE, "seed": 5, "partial_images": 2, **FIELDS}
    *previews, final = ask(served.server.triton_url, **fields)
    expected = await sampler_of(served.folder).outputs(request_of(**fields, width=104, height=72))
    vae = AutoencoderTiny.from_pretrained(served.preview_vae)
    for response, latents in zip(previews, expected, strict=False):
        with torch.no_grad():
            decoded = vae.decode(torch.from_numpy(latents[None])).sample[0].permute(1, 2, 0)
        assert difference(response["image"], ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().numpy()) <= TOLERANCE
    assert [bool(response["is_final"][0]) for response in (*previews, final)] == [False, False, True]
    served.server.wait_until(lambda: served.server.counts_of("vae_decoder")[0] > counted["vae_decoder"], 30, "counted")
    assert served.server.counts_of("preview_decoder")[0] == counted["preview_decoder"] + 2
    assert served.server.counts_of("vae_decoder")[0] == counted["vae_decoder"] + 1
