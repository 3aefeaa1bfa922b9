"""The transformer that ships with the project, in the precision that its users get."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.emoji_prompts import needs_font, scored, sixteen_tasks
from support.running_server import Pixels, Server, pixels_of, start_server, stop_server

MODEL = "hypergen/emoji-flow"


@pytest.fixture(scope="module")
def server(cache_dir: Path) -> Iterator[Server]:
    running = start_server("--cache-dir", str(cache_dir), model=MODEL, key=None)
    yield running
    assert stop_server(running) == 0


@needs_font
def test_prompts_give_what_they_ask_for(server: Server) -> None:
    found = scored(server, sixteen_tasks())
    print(found)
    assert found.both >= 15 / 16
    assert found.rmse <= 0.09


def test_a_mask_keeps_what_it_covers(server: Server) -> None:
    """As the playground does it: an image of the model's own, of which one half is drawn anew."""
    with server.client(api_key="none") as client:
        drawn = client.images.generate(prompt="a rocket on a yellow background", extra_body={"seed": 1}).data
        assert drawn is not None
        before = pixels_of(drawn[0])
        edited = client.images.edit(
            image=("image.png", png(before), "image/png"),
            mask=("mask.png", png(right_half_to_paint(before)), "image/png"),
            prompt="a dog on a blue background",
            extra_body={"seed": 2},
        ).data
    assert edited is not None
    changed = np.abs(pixels_of(edited[0]).astype(int) - before).max(axis=2) > 0
    assert not changed[:, :31].any()
    assert changed[8:56, 40:56].mean() > 0.9


def right_half_to_paint(image: Pixels) -> Pixels:
    """The image with a transparent right half."""
    alpha = np.full((*image.shape[:2], 1), 255, np.uint8)
    alpha[:, image.shape[1] // 2 :] = 0
    return np.concatenate([image, alpha], axis=2)


def png(image: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
