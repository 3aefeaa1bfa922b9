"""The model that ships with the project, as `make serve` serves it: no MODEL, no options."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.async_api import Page, expect

import evaluate
from evaluate import colourless_tasks, with_settings
from support.browser import chromium, needs_chromium, opened
from support.emoji_prompts import needs_font, scored, sixteen_tasks
from support.running_server import Pixels, Server, pixels_of, start_server, stop_server
from world import COLOURS

README = Path(__file__).parents[2] / "README.md"
PROMPTS = {
    "yellow": "a rocket on a yellow background",
    "blue": "a dog on a blue background",
    "white": "a red heart on a white background",
    "green": "a pizza on a green background",
}


@pytest.fixture(scope="module")
def shipped(shipped_repository: Path, cache_dir: Path) -> Iterator[Server]:
    assert shipped_repository.parent == cache_dir
    running = start_server("--cache-dir", str(cache_dir), model="", key=None)
    yield running
    assert stop_server(running) == 0


@pytest.fixture(scope="module")
def images(shipped: Server) -> dict[str, Pixels]:
    generated = {}
    with shipped.client(api_key="none") as client:
        for colour, prompt in PROMPTS.items():
            response = client.images.generate(prompt=prompt, extra_body={"seed": 1})
            assert response.data is not None
            generated[colour] = pixels_of(response.data[0])
    return generated


def background(image: Pixels) -> str:
    """The named colour nearest to the image's four corners."""
    corners = [image[:4, :4], image[:4, -4:], image[-4:, :4], image[-4:, -4:]]
    colour = np.median(np.concatenate([corner.reshape(-1, 3) for corner in corners]), axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(colour - np.array(COLOURS[name])).sum()))


def test_it_is_listed_under_its_own_name(shipped: Server) -> None:
    with shipped.client(api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["hypergen/emoji"]


def test_a_prompt_alone_gives_an_image_of_the_models_own_size(images: dict[str, Pixels]) -> None:
    assert {image.shape for image in images.values()} == {(64, 64, 3)}


@pytest.mark.parametrize("colour", PROMPTS)
def test_the_background_is_the_one_asked_for(colour: str, images: dict[str, Pixels]) -> None:
    assert background(images[colour]) == colour


def test_other_prompts_give_visibly_other_things(images: dict[str, Pixels]) -> None:
    """Not by their backgrounds alone: what stands in the middle differs too."""
    middles = [image[16:48, 16:48].astype(int) for image in images.values()]
    assert all(np.abs(one - other).mean() > 20 for one, other in combinations(middles, 2))


@needs_font
@pytest.mark.parametrize(
    ("settings", "least", "rmse"),
    [({}, 15 / 16, 0.07), ({"steps": 4, "scheduler": "dpmpp_2m"}, 12 / 16, 0.09)],
    ids=["defaults", "four steps"],
)
def test_prompts_give_what_they_ask_for(settings: dict[str, Any], least: float, rmse: float, shipped: Server) -> None:
    found = scored(shipped, with_settings(sixteen_tasks(), **settings))
    print(found)
    assert found.both >= least
    assert found.rmse <= rmse


@needs_font
def test_a_colour_in_the_negative_prompt_is_not_the_backgrounds(shipped: Server) -> None:
    """Same prompts, same seeds: the colour an image has without it is what the negative prompt then names."""
    tasks = colourless_tasks(8, 6)
    source = evaluate.Server(f"http://127.0.0.1:{shipped.port}/v1", None)
    assert evaluate.colours_kept(source, tasks) <= 0.25


def test_the_same_seed_gives_the_same_bytes(shipped: Server) -> None:
    with shipped.client(api_key="none") as client:
        one, again, other = (
            client.images.generate(prompt="a rocket on a yellow background", extra_body={"seed": seed}).data
            for seed in (7, 7, 8)
        )
    assert one is not None
    assert again is not None
    assert other is not None
    assert one[0].b64_json == again[0].b64_json != other[0].b64_json


def test_it_generates_at_the_edges_of_its_range(shipped: Server) -> None:
    with shipped.client(api_key="none") as client:
        limits = httpx.get(f"{shipped.url}/v1/capabilities").json()
        low, high = limits["min_size"], limits["max_size"]
        for size in (f"{low}x{low}", f"{high}x{high}", f"{low}x{high}"):
            response = client.images.generate(prompt="a rocket", size=size)
            assert response.data is not None
            width, height = (int(side) for side in size.split("x"))
            assert pixels_of(response.data[0]).shape == (height, width, 3)


def test_the_sizes_that_clients_ask_for_by_default_are_its_own_scaled(shipped: Server) -> None:
    with shipped.client(api_key="none") as client:
        for size, generated in (("1024x1024", "96x96"), ("512x512", "96x96"), ("1536x1024", "96x64")):
            asked, own = (
                client.images.generate(prompt="a rocket", size=each, extra_body={"seed": 7})
                for each in (size, generated)
            )
            assert asked.data is not None
            assert own.data is not None
            width, height = (int(side) for side in size.split("x"))
            scaled = Image.fromarray(pixels_of(own.data[0])).resize((width, height), Image.Resampling.LANCZOS)
            assert np.array_equal(pixels_of(asked.data[0]), np.asarray(scaled))
            assert asked.size == size


def readme_block(beginning: str, server: Server) -> str:
    """The README's block of code that begins so, for the port of this server."""
    blocks = re.findall(r"```\w+\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(beginning)]
    return str(block).replace("localhost:8000", f"127.0.0.1:{server.port}")


@pytest.mark.parametrize(("beginning", "program"), [("curl ", "bash"), ("import base64", sys.executable)])
def test_what_the_readme_shows_generates_an_image(
    beginning: str, program: str, shipped: Server, tmp_path: Path
) -> None:
    code = readme_block(beginning, shipped)
    subprocess.run([program, "-c", code], cwd=tmp_path, check=True, timeout=60)
    with Image.open(tmp_path / "rocket.png") as image:
        assert (image.format, image.size) == ("PNG", (64, 64))
        assert background(np.asarray(image.convert("RGB"))) == "yellow"


@needs_chromium
async def test_the_playground_generates_what_the_api_does_and_regenerates_half_of_it(
    shipped: Server, images: dict[str, Pixels]
) -> None:
    async with chromium() as browser, opened(browser, f"{shipped.url}/") as page:
        await page.evaluate(TAKE_DOWN)
        await page.locator("#form:not([inert]) #prompt").fill(PROMPTS["yellow"])
        await page.locator("#seed").fill("1")
        await page.keyboard.press("Control+Enter")
        before = await generated_on(page)
        np.testing.assert_array_equal(before, images["yellow"])

        await page.get_by_role("button", name="Start from this").click()
        await expect(page.get_by_role("button", name="Paint a mask")).to_be_focused()
        await page.keyboard.press("Enter")
        await page.locator("#brush-size").fill("100")
        await page.get_by_label("Mask", exact=True).focus()
        for key in ("ArrowRight", "Space"):
            await page.keyboard.press(key)
        await page.get_by_role("button", name="Use the mask").click()
        await expect(page.get_by_role("button", name="Change the mask")).to_be_focused()
        await page.locator("#prompt").fill(PROMPTS["blue"])
        await page.locator("#prompt").press("Enter")
        after = await generated_on(page)
    changed = np.abs(after.astype(int) - before.astype(int)).max(axis=2) > 0
    assert not changed[:, :31].any()
    assert changed[8:56, 40:56].mean() > 0.9


# What the status line says goes by in a tenth of a second: the page takes it down.
TAKE_DOWN = """() => {
  const status = document.getElementById("status");
  window.said = [];
  new MutationObserver(() => window.said.push(status.textContent)).observe(
    status, {childList: true, subtree: true, characterData: true});
}"""


async def generated_on(page: Page) -> Pixels:
    """What the page has generated, when it has; it shows previews on the way."""
    said: list[str] = []
    deadline = time.monotonic() + 60
    while not any(line.startswith("Generated in") for line in said):
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.05)
        said += await page.evaluate("() => window.said.splice(0)")
    assert any(line.startswith("Preview") for line in said), said
    async with page.expect_download() as download:
        await page.get_by_role("link", name="Download").click()
    with Image.open(await (await download.value).path()) as image:
        return np.asarray(image.convert("RGB"))
