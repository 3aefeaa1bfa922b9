"""The page at `/` in a real browser, against the gateway under uvicorn; the backend is a fake."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from hatchling.builders.wheel import WheelBuilder
from PIL import Image
from playwright.async_api import Browser, Page, expect

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import InvalidRequestError, UnavailableError
from hypergen_gateway.generation.backend import GenerationRequest, Lora, Quality
from hypergen_gateway.playground import FOLDER
from support.browser import chromium, needs_chromium, opened
from support.fake_backend import MODEL, FakeBackend, in_memory, on_loopback, until

ROOT = Path(__file__).parents[2]
KEY = "s3cr3t"
PHONE = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}
EMOJI = replace(
    MODEL,
    components=(*MODEL.components, "vae_encoder"),
    default_height=64,
    min_size=56,
    max_size=96,
    max_cache_interval=10,
    prompt_weightings=("none", "a1111"),
    max_clip_skip=12,
    loras=(Lora(name="ink", scale=0.8), Lora(name="clay", scale=1.0, is_merged=True)),
    suggestions=("a rocket", "a dog", "a cat", "a fox", "an owl", "a bee"),
)
MEASURED = Quality(
    fields={"cache_interval": 2},
    prompts=8,
    psnr=31.25,
    lowest_psnr=24.0,
    ssim=0.9512,
    lowest_ssim=0.9,
    latents_error=0.05,
    highest_latents_error=0.08,
    time=0.74,
)
# What shells, Python and forms each want to take for their own.
AWKWARD = '@"it\'s" $HOME `x` \\n <é> 🦊 {}%s'
# A browser in which cookies are blocked.
STORES_NOTHING = """Object.defineProperty(window, "sessionStorage", {
  get() { throw new DOMException("The operation is insecure.", "SecurityError"); } });"""

OpenPage: TypeAlias = Callable[..., Awaitable[Page]]


class TestFiles:
    @pytest.mark.parametrize("path", ["/", *(f"/web/{file.name}" for file in sorted(FOLDER.iterdir()))])
    async def test_every_file_comes_without_a_key_and_with_headers_that_keep_it_to_itself(
        self, backend: FakeBackend, path: str
    ) -> None:
        async with in_memory(create_app(Config(api_key=KEY), backend)) as client:
            response = await client.get(path)
        policy = response.headers["content-security-policy"]
        assert response.status_code == 200
        assert policy.startswith("default-src 'none';")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"

    def test_the_page_holds_no_script_no_style_and_no_address_of_another_host(self) -> None:
        page = (FOLDER / "index.html").read_text()
        assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script(?![^>]* src=)", page)
        for file in FOLDER.iterdir():
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text()), file.name

    async def test_a_file_that_did_not_change_is_not_sent_again(self, client: httpx.AsyncClient) -> None:
        first = await client.get("/web/app.js")
        again = await client.get("/web/app.js", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")

    @pytest.mark.parametrize("path", ["/web/", "/web/none.js", "/web/..%2fapp.py", "/web/%2e%2e/app.py", "/web"])
    async def test_nothing_else_can_be_read(self, client: httpx.AsyncClient, path: str) -> None:
        response = await client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")

    @pytest.mark.parametrize("path", ["/", "/web/app.js"])
    async def test_it_is_read_only(self, client: httpx.AsyncClient, path: str) -> None:
        response = await client.post(path)
        assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")

    def test_the_wheel_holds_all_of_it(self) -> None:
        files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
        assert {f"hypergen_gateway/playground/web/{file.name}" for file in FOLDER.iterdir()} <= files


class TestCapabilities:
    async def test_they_are_what_the_model_says(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        backend.description = replace(EMOJI, sizes=("64x64", "64x96"), passport=(MEASURED,))
        body = (await client.get("/v1/capabilities")).json()
        assert body == {
            "object": "capabilities",
            "model": "acme/tiny-emoji",
            "base_model": "",
            "default_size": "64x64",
            "sizes": ["64x64", "64x96"],
            "size_factor": 8,
            "min_size": 56,
            "max_size": 96,
            "size_policy": "fit",
            "max_side": 4096,
            "default_num_inference_steps": 20,
            "max_num_inference_steps": 150,
            "default_guidance_scale": 5.0,
            "min_guidance_scale": 1.0,
            "max_guidance_scale": 20.0,
            "default_image_guidance_scale": 0.0,
            "max_image_guidance_scale": 0.0,
            "negative_prompt": True,
            "guidance_interval": True,
            "guidance_rescale": True,
            "max_cache_interval": 10,
            "max_prompt_tokens": 75,
            "prompt_weightings": ["none", "a1111"],
            "default_prompt_weighting": "none",
            "embeddings": [],
            "max_clip_skip": 12,
            "default_clip_skip": 0,
            "max_skip_layer_guidance_scale": 0.0,
            "default_skip_layer_guidance_scale": 0.0,
            "max_num_images": 10,
            "schedulers": ["ddim", "euler", "euler_a"],
            "edits": True,
            "max_references": 0,
            "loras": [
                {"name": "ink", "default_scale": 0.8, "scales": []},
                {"name": "clay", "default_scale": 1.0, "scales": [1.0]},
            ],
            "suggestions": ["a rocket", "a dog", "a cat", "a fox", "an owl", "a bee"],
            "passport": [asdict(MEASURED)],
        }

    async def test_they_need_the_key(self, backend: FakeBackend) -> None:
        async with in_memory(create_app(Config(api_key=KEY), backend)) as client:
            assert (await client.get("/v1/capabilities")).status_code == 401


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def open_page(browser: Browser, backend: FakeBackend) -> AsyncIterator[OpenPage]:
    """Opens the page of a gateway in front of the test's backend."""
    if backend.description is MODEL:
        backend.description = EMOJI
    async with AsyncExitStack() as stack:

        async def open_one(config: Config | None = None, **context: Any) -> Page:
            url = await stack.enter_async_context(on_loopback(create_app(config or Config(), backend)))
            page = await stack.enter_async_context(opened(browser, f"{url}/", **context))
            if config is None:
                await expect(page.locator("#form:not([inert])")).to_be_visible()
            return page

        yield open_one


async def generated(page: Page, count: int = 1) -> None:
    await expect(page.locator("figure.finished")).to_have_count(count)
    await expect(page.locator("#generate-label")).to_have_text("Generate")


async def choose_range(page: Page, name: str, value: str) -> None:
    await page.locator(f"#{name}").fill(value)


async def unfold(page: Page) -> None:
    await page.get_by_text("More settings").click()


async def downloaded(page: Page, index: int = 0) -> Image.Image:
    async with page.expect_download() as download:
        await page.get_by_role("link", name="Download").nth(index).click()
    return Image.open(await (await download.value).path())


@needs_chromium
@pytest.mark.asyncio(loop_scope="module")
class TestGeneration:
    async def test_what_the_form_says_is_what_is_native(self, open_page: OpenPage, backend: FakeBackend) -> None:
        backend.description = replace(EMOJI, max_skip_layer_guidance_scale=10.0)
        page = await open_page()
        await unfold(page)
        await page.get_by_label("Prompt", exact=True).fill(AWKWARD)
        await page.get_by_label("Negative prompt").fill("rain\nsnow")
        await page.get_by_label("Size", exact=True).select_option("72x56")
        await page.get_by_label("Images", exact=True).select_option("3")
        await choose_range(page, "num_inference_steps", "7")
        await choose_range(page, "guidance_scale", "2.5")
        await choose_range(page, "guidance_start", "0.2")
        await choose_range(page, "guidance_end", "0.75")
        await choose_range(page, "cache_interval", "3")
        await page.get_by_label("LoRAs").fill("ink -0.25, clay")
        await page.get_by_label("Scheduler").select_option("euler")
        await page.get_by_label("Sigmas").select_option("karras")
        await page.get_by_label("Timesteps").select_option("trailing")
        await choose_range(page, "guidance_rescale", "0.7")
        await choose_range(page, "skip_layer_guidance_scale", "2.8")
        await choose_range(page, "skip_layer_guidance_start", "0.05")
        await choose_range(page, "skip_layer_guidance_stop", "0.5")
        await page.get_by_label("Weights in prompts").select_option("a1111")
        await page.get_by_label("CLIP skip").select_option("2")
        await page.get_by_label("Seed", exact=True).fill("9223372036854775800")
        await page.get_by_label("Prompt", exact=True).press("Enter")
        await generated(page, 3)
        assert backend.generations == [
            GenerationRequest(
                prompt=AWKWARD,
                negative_prompt="rain\nsnow",
                num_images=3,
                width=72,
                height=56,
                num_inference_steps=7,
                guidance_scale=2.5,
                guidance_start=0.2,
                guidance_end=0.75,
                cache_interval=3,
                scheduler="euler",
                sigmas="karras",
                timestep_spacing="trailing",
                guidance_rescale=0.7,
                skip_layer_guidance_scale=2.8,
                skip_layer_guidance_start=0.05,
                skip_layer_guidance_stop=0.5,
                prompt_weighting="a1111",
                clip_skip=2,
                seed=9223372036854775800,
                partial_images=3,
                lora=("ink", "clay"),
                lora_scale=(-0.25, 1.0),
            )
        ]
        # No digit of a seed above 2^53 is lost, and the image is the one that the server made.
        await expect(page.locator("figcaption").nth(2)).to_contain_text("72 × 56 · seed 9223372036854775802")
        image = await downloaded(page, 2)
        assert (image.size, image.getpixel((0, 0))) == ((72, 56), (9223372036854775802 % 256,) * 3)

    async def test_a_prompt_alone_gets_the_models_own_settings(self, open_page: OpenPage, backend: FakeBackend) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.keyboard.press("Control+Enter")
        await generated(page)
        (generation,) = backend.generations
        own = (generation.width, generation.height, generation.num_inference_steps, generation.guidance_scale)
        assert own == (64, 64, 20, 5.0)
        unsaid = (generation.scheduler, generation.negative_prompt, generation.guidance_start, generation.guidance_end)
        assert (*unsaid, generation.cache_interval) == (None,) * 5

    async def test_guidance_never_ends_before_it_begins(self, open_page: OpenPage) -> None:
        page = await open_page()
        await unfold(page)
        start, end = page.get_by_label("Guidance from"), page.get_by_label("Guidance to")
        await start.fill("0.4")
        await end.fill("0.3")
        await expect(start).to_have_value("0.3")
        await start.fill("0.9")
        await expect(end).to_have_value("0.9")
        await expect(page.locator("#guidance_end-value")).to_have_text("90 %")
        await choose_range(page, "guidance_scale", "1")
        await expect(start).to_be_hidden()

    async def test_what_a_model_cannot_do_is_not_offered(self, open_page: OpenPage, backend: FakeBackend) -> None:
        more = [
            *("Guidance from", "Guidance to", "Deep features", "Rescaled guidance", "Eta of DDIM", "Timesteps"),
            *("Weights in prompts", "CLIP skip"),
        ]
        page = await open_page()
        await unfold(page)
        for name in more:
            await expect(page.get_by_label(name)).to_be_visible()
        await expect(page.get_by_label("Skip-layer guidance")).to_be_hidden()
        backend.description = replace(
            EMOJI,
            guidance="embedded",
            max_cache_interval=1,
            schedulers=("euler",),
            prompt_weightings=("none",),
            max_clip_skip=0,
        )
        page = await open_page()
        await unfold(page)
        for name in ("Guidance", "Sigmas"):
            await expect(page.get_by_label(name, exact=True)).to_be_visible()
        for name in (*more, "Image guidance", "Scheduler"):
            await expect(page.get_by_label(name)).to_be_hidden()
        backend.description = replace(EMOJI, default_image_guidance_scale=1.5, max_image_guidance_scale=20.0)
        page = await open_page()
        await expect(page.get_by_label("Image guidance")).to_have_value("1.5")

    async def test_what_was_measured_of_the_model_is_a_table(self, open_page: OpenPage, backend: FakeBackend) -> None:
        backend.description = replace(EMOJI, passport=(replace(MEASURED, fields={}), MEASURED))
        page = await open_page()
        await page.get_by_text("Quality beside float32").click()
        rows = page.get_by_role("row")
        await expect(rows).to_have_count(3)
        await expect(rows.nth(1)).to_have_text(re.compile("as served.*31.3.*24.0.*0.951.*0.74"))
        await expect(rows.nth(2)).to_have_text(re.compile("cache_interval 2"))

    async def test_previews_are_shown_while_it_generates(self, open_page: OpenPage, backend: FakeBackend) -> None:
        backend.finishing.clear()
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.get_by_role("button", name="Generate").click()
        await expect(page.locator("figure.begun img")).to_be_visible()
        await expect(page.locator("#status")).to_have_text("Preview 3 of 3.")
        assert await page.locator("progress").evaluate("bar => bar.value") == 0.75
        backend.finishing.set()
        await generated(page)
        await expect(page.locator("#status")).to_contain_text("Generated in ")

    async def test_early_previews_and_images_stay(self, open_page: OpenPage, backend: FakeBackend) -> None:
        backend.finishing.clear()
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.keyboard.press("Enter")
        await expect(page.locator("figure.begun img")).to_be_visible()
        await page.evaluate("new Promise((resolve) => setTimeout(resolve, 400))")
        await expect(page.locator("figure.begun img")).to_be_visible()

    @pytest.mark.parametrize("how", ["Escape", "the button", "leaving"])
    async def test_stopping_ends_the_work_on_the_server(
        self, open_page: OpenPage, backend: FakeBackend, how: str
    ) -> None:
        backend.finishing.clear()
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.keyboard.press("Enter")
        await expect(page.locator("figure.begun")).to_be_visible()
        assert backend.running == 1
        if how == "leaving":
            await page.goto("about:blank")
        else:
            await (
                page.keyboard.press("Escape") if how == "Escape" else page.get_by_role("button", name="Stop").click()
            )
            await expect(page.locator("#status")).to_have_text("Stopped.")
            await expect(page.locator("figure")).to_have_count(0)
        await until(lambda: backend.running == 0)

    async def test_small_images_are_enlarged_by_whole_pixels(self, open_page: OpenPage) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.keyboard.press("Enter")
        await generated(page)
        image = page.locator("figure.finished img")
        width = await image.evaluate("image => image.getBoundingClientRect().width")
        assert width >= 256
        assert width % 64 == 0
        assert await image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"

    async def test_a_suggestion_becomes_the_prompt(self, open_page: OpenPage, backend: FakeBackend) -> None:
        page = await open_page()
        chips = page.locator("#suggestions .chip")
        await expect(chips).to_have_count(4)
        prompt = await chips.first.inner_text()
        await chips.first.click()
        await page.keyboard.press("Enter")
        await generated(page)
        assert backend.generations[0].prompt == prompt
        assert prompt in EMOJI.suggestions


@needs_chromium
@pytest.mark.asyncio(loop_scope="module")
class TestImages:
    async def test_a_file_is_sent_in_a_size_that_the_model_generates(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.locator("#image").set_input_files(halves)
        # Twice as wide as high: the nearest that there is.
        await expect(page.locator("#size")).to_have_value("88x56")
        await page.locator("#strength").fill("0.5")
        await page.locator("#prompt").press("Enter")
        await generated(page)
        (generation,) = backend.generations
        assert (generation.width, generation.height, generation.strength, generation.mask) == (88, 56, 0.5, None)
        assert generation.image is not None
        assert generation.image[28, 4].tolist() == [255, 0, 0]
        assert generation.image[28, 84].tolist() == [0, 0, 255]

    async def test_a_model_that_takes_references_is_shown_several_images_and_given_no_strength(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path, tmp_path: Path
    ) -> None:
        wider = replace(EMOJI, default_width=96, default_height=96, min_size=64, max_size=192)
        backend.description = replace(wider, max_references=3, max_reference_pixels=192 * 192)
        other = tmp_path / "other.png"
        Image.new("RGB", (64, 72), "lime").save(other)
        page = await open_page()
        await page.keyboard.type("a fox")
        await expect(page.locator("#others")).to_be_hidden()
        await page.locator("#image").set_input_files(halves)
        await page.locator("#others").set_input_files([other, other])
        await expect(page.locator("#strength")).to_be_hidden()
        await page.locator("#prompt").press("Enter")
        await generated(page)
        (generation,) = backend.generations
        assert (generation.image, generation.strength) == (None, None)
        assert generation.reference_sizes is not None
        assert generation.reference_sizes.tolist() == [[64, 136], [72, 64], [72, 64]]

    async def test_what_is_painted_over_is_native_anew_and_nothing_else(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await begin_mask(page, halves)
        await paint(page, (0.75, 0.5), (0.75, 0.6))
        await use_mask(page)
        await page.locator("#prompt").press("Enter")
        await generated(page)
        mask = backend.generations[0].mask
        assert mask is not None
        assert mask.shape == (56, 88)
        assert mask[28, 66] == 255
        assert mask[:, :44].max() == 0
        assert 20 < (mask == 255).sum() < 500
        assert backend.generations[0].strength == 1.0

    async def test_the_mask_can_be_painted_taken_back_and_erased_with_the_keyboard(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await begin_mask(page, halves)
        await expect(page.get_by_label("Mask", exact=True)).to_be_focused()
        for key in ("Space", "Control+z", "ArrowUp", "ArrowUp", "Shift+ArrowRight", "Shift+ArrowRight"):
            await page.keyboard.press(key)
        await page.get_by_role("button", name="Eraser").click()
        await page.get_by_label("Mask", exact=True).press("Space")
        await use_mask(page)
        await page.locator("#prompt").press("Enter")
        await generated(page)
        mask = backend.generations[0].mask
        assert mask is not None
        assert mask[28, 44] == 0  # taken back
        painted = mask.nonzero()
        assert painted[0].max() < 28
        assert 40 <= painted[1].min() < painted[1].max() < 56

    @pytest.mark.parametrize("how", ["a click", "a tap", "Space"])
    async def test_a_dot_is_a_disc_of_the_brushs_size(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path, how: str
    ) -> None:
        page = await open_page(has_touch=True)
        await page.keyboard.type("a fox")
        await begin_mask(page, halves)
        (place,) = await places_on_easel(page, (0.5, 0.5))
        if how == "a click":
            await page.mouse.click(*place)
        elif how == "a tap":
            await page.touchscreen.tap(*place)
        else:
            await page.keyboard.press("Space")
        await use_mask(page)
        np.testing.assert_array_equal(await sent_mask(page, backend), stroked((44, 28)))

    async def test_a_quick_stroke_is_a_line_without_gaps(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await begin_mask(page, halves)
        first, second, outside = await places_on_easel(page, (0.25, 0.25), (0.75, 0.5), (0.75, 1.1))
        await page.mouse.move(*first)
        await page.mouse.down()
        await page.mouse.move(*second)
        await page.mouse.move(*outside)
        await page.mouse.up()
        await page.mouse.move(*first)
        await use_mask(page)
        wanted = stroked((22, 14), (66, 28)) | stroked((66, 28), (66, 61.6))
        np.testing.assert_array_equal(await sent_mask(page, backend), wanted)

    async def test_a_second_finger_and_other_buttons_paint_nothing(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path
    ) -> None:
        page = await open_page(has_touch=True)
        await page.keyboard.type("a fox")
        await begin_mask(page, halves)
        points = await places_on_easel(page, (0.25, 0.25), (0.75, 0.75), (0.5, 0.25))
        thumb, finger, further = ({"x": x, "y": y} for x, y in points)
        await page.mouse.click(*points[1], button="right")
        await touch(
            page, ("touchStart", thumb), ("touchStart", thumb, finger), ("touchMove", further, finger), ("touchEnd",)
        )
        await use_mask(page)
        np.testing.assert_array_equal(await sent_mask(page, backend), stroked((22, 14), (44, 14)))

    async def test_a_stroke_that_esc_interrupts_does_not_go_on_later(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await begin_mask(page, halves)
        first, second = await places_on_easel(page, (0.25, 0.25), (0.75, 0.5))
        await page.mouse.move(*first)
        await page.mouse.down()
        await page.keyboard.press("Escape")
        await page.mouse.up()
        await page.get_by_role("button", name="Paint a mask").click()
        await page.mouse.move(*second)
        await page.get_by_role("button", name="Use the mask").press("Enter")
        await expect(page.get_by_role("button", name="Paint a mask")).to_be_focused()
        await page.locator("#prompt").press("Enter")
        await generated(page)
        assert backend.generations[0].mask is None

    async def test_esc_leaves_the_mask_as_it_was(self, open_page: OpenPage, backend: FakeBackend, halves: Path) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await begin_mask(page, halves)
        await page.keyboard.press("Space")
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("button", name="Paint a mask")).to_be_focused()
        await page.locator("#prompt").press("Enter")
        await generated(page)
        assert backend.generations[0].mask is None

    async def test_a_mask_ends_with_the_size_that_it_was_painted_for(
        self, open_page: OpenPage, backend: FakeBackend, halves: Path
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await begin_mask(page, halves)
        await page.keyboard.press("Space")
        await use_mask(page)
        await page.locator("#size").select_option("64x64")
        await expect(page.locator("#status")).to_contain_text("The mask was removed")
        await page.locator("#prompt").press("Enter")
        await generated(page)
        (generation,) = backend.generations
        assert generation.mask is None
        assert generation.image is not None
        # The middle of the image, so that nothing is distorted.
        assert generation.image.shape == (64, 64, 3)
        assert generation.image[32, 2].tolist() == [255, 0, 0]

    async def test_an_image_can_be_gone_on_from_and_its_request_comes_back_from_history(
        self, open_page: OpenPage, backend: FakeBackend
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.locator("#seed").fill("77")
        await page.keyboard.press("Control+Enter")
        await generated(page)
        await page.get_by_role("button", name="Start from this").click()
        await expect(page.get_by_role("button", name="Paint a mask")).to_be_focused()
        await page.keyboard.press("Control+Enter")
        await generated(page)
        await page.locator("#strip button").last.click()
        await expect(page.locator("#start")).to_be_hidden()
        await page.locator("#strip button").first.click()
        await expect(page.locator("#start")).to_be_visible()
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#strip li")).to_have_count(3)
        _, once, again = backend.generations
        assert once.image is not None
        assert again.image is not None
        assert once.image[0, 0].tolist() == again.image[0, 0].tolist() == [77] * 3
        assert replace(once, image=None) == replace(again, image=None)

    async def test_a_file_that_is_no_image_is_told_beside_it(self, open_page: OpenPage, tmp_path: Path) -> None:
        file = tmp_path / "x.png"
        file.write_bytes(b"GIF87a nothing")
        page = await open_page()
        await page.locator("#image").set_input_files(file)
        await expect(page.locator("#image-error")).to_contain_text("not an image")

    async def test_a_model_that_cannot_start_from_images_does_not_offer_it(
        self, open_page: OpenPage, backend: FakeBackend
    ) -> None:
        backend.description = replace(EMOJI, components=MODEL.components)
        page = await open_page()
        await expect(page.locator("#image")).to_be_hidden()


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A photo, red on its left and blue on its right."""
    photo = Image.new("RGB", (640, 320), "red")
    photo.paste("blue", (320, 0, 640, 320))
    photo.save(tmp_path / "halves.png")
    return tmp_path / "halves.png"


async def begin_mask(page: Page, photo: Path) -> None:
    await page.locator("#image").set_input_files(photo)
    await page.get_by_role("button", name="Paint a mask").click()


async def use_mask(page: Page) -> None:
    await page.get_by_role("button", name="Use the mask").press("Enter")
    await expect(page.get_by_role("button", name="Change the mask")).to_be_focused()


async def places_on_easel(page: Page, *points: tuple[float, float]) -> list[tuple[float, float]]:
    """Points in shares of the image's width and height, as the mouse knows them."""
    box = await page.locator("#easel-paint").bounding_box()
    assert box is not None
    return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]


async def paint(page: Page, *points: tuple[float, float]) -> None:
    """Moves the brush through points, in shares of the image's width and height."""
    places = await places_on_easel(page, *points)
    await page.mouse.move(*places[0])
    await page.mouse.down()
    for place in places[1:]:
        await page.mouse.move(*place, steps=4)
    await page.mouse.up()


async def touch(page: Page, *steps: Any) -> None:
    """Fingers on the screen: what happens, and where they are, as Chromium takes it."""
    session = await page.context.new_cdp_session(page)
    for kind, *points in steps:
        fingers = [point | {"id": index} for index, point in enumerate(points)]
        await session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})


async def sent_mask(page: Page, backend: FakeBackend) -> npt.NDArray[np.uint8]:
    """The mask of a request that is sent now."""
    await page.locator("#prompt").press("Enter")
    await generated(page)
    mask = backend.generations[-1].mask
    assert mask is not None
    return mask


def stroked(start: tuple[float, float], end: tuple[float, float] | None = None) -> npt.NDArray[np.uint8]:
    """A mask of 88×56 with one stroke of the brush as it is at first: every pixel whose centre it reaches."""
    x, y = np.meshgrid(np.arange(88) + 0.5, np.arange(56) + 0.5)
    (x0, y0), (x1, y1) = start, end or start
    length = (x1 - x0) ** 2 + (y1 - y0) ** 2 or 1
    share = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length, 0, 1)
    away = np.hypot(x - x0 - share * (x1 - x0), y - y0 - share * (y1 - y0))
    return np.where(away <= 0.3**2 * 0.5 * 56, 255, 0).astype(np.uint8)


@needs_chromium
@pytest.mark.asyncio(loop_scope="module")
class TestErrors:
    async def test_the_servers_words_stand_beside_the_field_they_are_about(
        self, open_page: OpenPage, backend: FakeBackend
    ) -> None:
        page = await open_page()
        await page.keyboard.press("Enter")
        await expect(page.locator("#prompt-error")).to_have_text(
            "'prompt' is missing. It must be a string of 1 to 32,000 characters."
        )
        await expect(page.locator("#prompt")).to_be_focused()
        await expect(page.locator("#prompt")).to_have_attribute("aria-invalid", "true")
        await page.keyboard.type("a fox")
        await expect(page.locator("#prompt-error")).to_be_hidden()
        await page.locator("#seed").fill("abc")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#seed-error")).to_contain_text(
            "Invalid value for 'seed': \"abc\". It must be an integer"
        )
        await expect(page.locator("#seed")).to_be_focused()
        await page.locator("#seed").fill("")
        await page.get_by_label("Size", exact=True).select_option("custom")
        await page.get_by_label("Width").fill("9000")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#size-error")).to_contain_text('"9000x64". It must be')
        await expect(page.get_by_label("Width")).to_be_focused()
        await page.get_by_label("Width").fill("80")
        await page.keyboard.press("Control+Enter")
        await generated(page)
        await expect(page.locator(".error:visible")).to_have_count(0)
        assert [generation.width for generation in backend.generations] == [80]

    async def test_a_size_that_the_model_does_not_generate_is_offered_where_any_may_be_asked_for(
        self, open_page: OpenPage, backend: FakeBackend
    ) -> None:
        backend.description = replace(EMOJI, sizes=("64x64", "96x64"))
        page = await open_page()
        await page.locator("#prompt").fill("a fox")
        await page.get_by_label("Size", exact=True).select_option("custom")
        await page.get_by_label("Width").fill("301")
        await page.get_by_label("Height").fill("200")
        await page.keyboard.press("Control+Enter")
        await generated(page)
        assert (await downloaded(page)).size == (301, 200)
        assert [(made.width, made.height) for made in backend.generations] == [(96, 64)]
        strict = await open_page(Config(sizes="strict"))
        await expect(strict.locator("#size option")).to_have_text(["64 × 64", "96 × 64"])

    async def test_a_field_of_closed_settings_is_opened_for_its_error(
        self, open_page: OpenPage, backend: FakeBackend
    ) -> None:
        backend.failure = InvalidRequestError("The scheduler does not take this spacing.", "sigmas")
        page = await open_page(**PHONE)
        await page.locator("#prompt").fill("a fox")
        await page.locator("#generate").click()
        await expect(page.locator("#sigmas-error")).to_be_visible()
        await expect(page.locator("#sigmas")).to_be_focused()

    @pytest.mark.parametrize(("field", "text"), [("prompt", "🦊" * 32_001), ("seed", "1" * 40)])
    async def test_what_is_too_long_is_refused_and_not_cut(
        self, open_page: OpenPage, backend: FakeBackend, field: str, text: str
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.locator(f"#{field}").evaluate(
            """(control, text) => { control.select(); document.execCommand("insertText", false, text); }""", text
        )
        await page.locator(f"#{field}").press("Control+Enter")
        await expect(page.locator(f"#{field}-error")).to_contain_text("32,000" if field == "prompt" else text)
        assert backend.generations == []

    async def test_other_errors_are_told_with_when_to_try_again(
        self, open_page: OpenPage, backend: FakeBackend
    ) -> None:
        backend.failure = UnavailableError("Triton is away.", retry_after=7)
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("Triton is away. It may be tried again in 7 s.")

    async def test_what_fails_half_way_is_told_and_what_was_shown_before_is_shown_again(
        self, open_page: OpenPage, backend: FakeBackend
    ) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.keyboard.press("Enter")
        await generated(page)
        caption = await page.locator("figcaption").inner_text()
        backend.late_failure = UnavailableError("Triton went away.")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("Triton went away.")
        await generated(page)
        assert await page.locator("figcaption").inner_text() == caption

    async def test_a_model_that_is_not_there_yet_is_waited_for(self, open_page: OpenPage, backend: FakeBackend) -> None:
        backend.description = UnavailableError("Triton is not ready.")
        page = await open_page(Config())
        await expect(page.get_by_role("alert")).to_have_text("Triton is not ready.")
        backend.description = EMOJI
        await expect(page.locator("#model")).to_have_text("acme/tiny-emoji")
        await expect(page.get_by_role("alert")).to_have_count(0)


@needs_chromium
@pytest.mark.asyncio(loop_scope="module")
class TestKey:
    async def test_it_is_asked_for_when_one_is_needed_and_kept_in_the_tab_alone(self, open_page: OpenPage) -> None:
        page = await open_page(Config(api_key=KEY))
        dialog = page.get_by_role("dialog")
        await expect(dialog.get_by_label("API key")).to_be_focused()
        await expect(dialog.get_by_role("alert")).to_have_count(0)
        await page.keyboard.type("wrong")
        await page.keyboard.press("Enter")
        await expect(dialog.get_by_role("alert")).to_have_text("Incorrect API key.")
        await page.keyboard.type(KEY)
        await page.keyboard.press("Enter")
        await expect(dialog).to_be_hidden()
        await page.reload()
        await page.locator("#form:not([inert]) #prompt").fill("a fox")
        await page.keyboard.press("Enter")
        await generated(page)
        assert await page.evaluate("[Object.values(sessionStorage), Object.keys(localStorage), document.cookie]") == [
            [KEY],
            [],
            "",
        ]
        assert KEY not in page.url + await page.content()

    async def test_a_browser_that_stores_nothing_keeps_it_until_the_page_is_left(self, open_page: OpenPage) -> None:
        page = await open_page(Config(api_key=KEY), before=STORES_NOTHING)
        await page.get_by_label("API key", exact=True).fill(KEY)
        await page.keyboard.press("Enter")
        await page.locator("#form:not([inert]) #prompt").fill("a fox")
        await page.keyboard.press("Enter")
        await generated(page)
        await page.reload()
        await expect(page.get_by_label("API key", exact=True)).to_be_focused()

    async def test_a_key_that_is_no_longer_good_is_asked_for_anew_and_generation_goes_on(
        self, open_page: OpenPage
    ) -> None:
        page = await open_page(Config(api_key=KEY))
        await page.get_by_label("API key", exact=True).fill(KEY)
        await page.keyboard.press("Enter")
        await page.locator("#form:not([inert]) #prompt").fill("a fox")
        await page.evaluate("sessionStorage.setItem('hypergen-api-key', 'old')")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog").get_by_role("alert")).to_have_text("Incorrect API key.")
        await page.keyboard.type(KEY)
        await page.keyboard.press("Enter")
        await generated(page)


@needs_chromium
@pytest.mark.asyncio(loop_scope="module")
class TestHistory:
    async def test_an_image_of_it_brings_its_settings_back(self, open_page: OpenPage, backend: FakeBackend) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.locator("#n").select_option("2")
        await choose_range(page, "num_inference_steps", "9")
        await page.keyboard.press("Control+Enter")
        await generated(page, 2)
        await page.get_by_role("button", name="Reset to the model’s defaults").click()
        await page.locator("#prompt").fill("an owl")
        await page.keyboard.press("Enter")
        await generated(page)
        history = page.get_by_role("region", name="History").get_by_role("button", name=", seed")
        await expect(history).to_have_count(3)
        await history.nth(2).click()
        await expect(page.locator("#prompt")).to_have_value("a fox")
        await page.locator("#prompt").press("Enter")
        await expect(history).to_have_count(4)
        first, _, again = backend.generations
        assert again == replace(first, num_images=1, seed=first.seed + 1)

    async def test_it_is_bounded(self, open_page: OpenPage, backend: FakeBackend) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.locator("#n").select_option("10")
        for count in range(1, 6):
            await page.keyboard.press("Control+Enter")
            await expect(page.locator("#strip li")).to_have_count(min(count * 10, 40))
            await generated(page, 10)
        assert len(backend.generations) == 5


@needs_chromium
@pytest.mark.asyncio(loop_scope="module")
class TestCode:
    @pytest.mark.parametrize("language", ["curl", "Python"])
    async def test_it_sends_the_request_that_was_sent(
        self, open_page: OpenPage, backend: FakeBackend, language: str, tmp_path: Path
    ) -> None:
        page = await open_page(Config(api_key=KEY))
        await page.get_by_label("API key", exact=True).fill(KEY)
        await page.keyboard.press("Enter")
        await page.locator("#form:not([inert]) #prompt").fill(AWKWARD)
        await page.locator("#negative_prompt").fill("rain")
        await page.locator("#n").select_option("2")
        await page.keyboard.press("Control+Enter")
        await generated(page, 2)
        code = await shown_code(page, language)
        assert KEY not in code
        await run_code(language, code, tmp_path)
        once, again = backend.generations
        assert once == again
        images = [Image.open(tmp_path / f"image-{index}.png") for index in range(2)]
        assert [image.getpixel((0, 0)) for image in images] == [((once.seed + i) % 256,) * 3 for i in range(2)]

    @pytest.mark.parametrize("language", ["curl", "Python"])
    async def test_it_sends_the_files_that_were_sent(
        self, open_page: OpenPage, backend: FakeBackend, language: str, tmp_path: Path, halves: Path
    ) -> None:
        page = await open_page()
        await page.keyboard.type(AWKWARD)
        await begin_mask(page, halves)
        await page.keyboard.press("Space")
        await use_mask(page)
        await page.locator("#prompt").press("Enter")
        await generated(page)
        code = await shown_code(page, language)
        for name in ("image.png", "mask.png"):
            async with page.expect_download() as download:
                await page.get_by_role("link", name=name).click()
            await (await download.value).save_as(tmp_path / name)
        await run_code(language, code, tmp_path)
        once, again = backend.generations
        assert replace(once, image=None, mask=None) == replace(again, image=None, mask=None)
        for file, its_copy in ((once.image, again.image), (once.mask, again.mask)):
            assert file is not None
            assert its_copy is not None
            np.testing.assert_array_equal(file, its_copy)

    async def test_it_can_be_copied(self, open_page: OpenPage) -> None:
        page = await open_page(permissions=["clipboard-read", "clipboard-write"])
        await page.keyboard.type("a fox")
        await page.keyboard.press("Enter")
        await generated(page)
        code = await shown_code(page, "curl")
        await page.get_by_role("button", name="Copy", exact=True).click()
        await expect(page.locator("#code-status")).to_have_text("Copied.")
        assert await page.evaluate("navigator.clipboard.readText()") == code
        assert "Authorization" not in code


async def shown_code(page: Page, language: str) -> str:
    await page.get_by_role("button", name="Copy as code").click()
    await page.get_by_role("button", name=language, exact=True).click()
    return await page.locator("#code").inner_text()


async def run_code(language: str, code: str, folder: Path) -> None:
    command = ["bash", "-ec", code] if language == "curl" else [sys.executable, "-c", code]
    environment = os.environ | {"HYPERGEN_API_KEY": KEY}
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=environment, stderr=subprocess.PIPE)
    _, error = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, error.decode()


@needs_chromium
@pytest.mark.asyncio(loop_scope="module")
class TestEverybody:
    async def test_the_keyboard_reaches_everything_in_the_order_that_is_seen(self, open_page: OpenPage) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.keyboard.press("Enter")
        await generated(page)
        await unfold(page)
        await page.locator("#prompt").focus()
        reached = []
        for _ in range(40):
            reached.append(await page.evaluate("(e => e.id || e.innerText || e.tagName)(document.activeElement)"))
            await page.keyboard.press("Tab")
        wanted = [
            *("prompt", "others", "generate", "negative_prompt", "image", "size", "n", "num_inference_steps"),
            *("guidance_scale", "loras", "scheduler", "seed", "guidance_start", "guidance_end", "cache_interval"),
            *("reset", "Download", "Start from this", "show-code"),
        ]
        assert [name for name in reached if name in wanted][: len(wanted)] == wanted

    async def test_everything_that_can_be_used_has_a_name(self, open_page: OpenPage) -> None:
        page = await open_page()
        await page.keyboard.type("a fox")
        await page.keyboard.press("Enter")
        await generated(page)
        nameless = await page.evaluate(
            """[...document.querySelectorAll('button, a, input, select, textarea')].filter((control) =>
                 !control.innerText.trim() && !control.labels?.length && !control.ariaLabel
                 && !control.querySelector('img[alt]')).map((control) => control.outerHTML)"""
        )
        assert nameless == []

    async def test_it_fits_on_a_phone(self, open_page: OpenPage) -> None:
        page = await open_page(**PHONE)
        await page.locator("#prompt").fill("a fox")
        await page.locator("#generate").tap()
        await generated(page)
        await page.get_by_text("Settings", exact=True).tap()
        await page.get_by_text("More settings").tap()
        assert await page.evaluate("document.documentElement.scrollWidth") == 375
        small = await page.evaluate(
            """[...document.querySelectorAll('#generate, select, textarea, input:not([type=range])')]
                 .filter((control) => control.offsetParent && control.offsetHeight < 40).map((control) => control.id)"""
        )
        assert small == []

    async def test_it_is_dark_where_the_system_is(self, open_page: OpenPage) -> None:
        shades = []
        for scheme in ("light", "dark"):
            page = await open_page(color_scheme=scheme, viewport={"width": 900, "height": 700})
            image = Image.open(io.BytesIO(await page.screenshot()))
            shades.append(image.convert("L").crop((0, 0, 8, 8)).tobytes()[0])
        assert shades[0] > 200 > 50 > shades[1]
