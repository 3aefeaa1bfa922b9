"""Any size may be asked for: which one is generated for it, and what becomes of the pixels on their way to it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import GeneratedImage, GenerationRequest, ModelDescription, Pixels
from hypergen_gateway.generation.sizes import Size, SizePolicy, crop_box, is_native, nearest_size
from support.fake_backend import MODEL, FakeBackend, in_memory
from support.image_files import file_of, hole, photo, ramp
from support.wire import data_url, error_of

GENERATIONS, EDITS, VARIATIONS = (f"/v1/images/{what}" for what in ("generations", "edits", "variations"))

# As the model that ships with the project.
SMALL = replace(MODEL, default_width=64, default_height=64, min_size=56, max_size=96)
BUILT = replace(MODEL, sizes=("512x512", "768x512", "512x768"), min_size=512, max_size=768)
# Each side from its smallest to its largest alone: no size of other proportions.
SQUARE = replace(MODEL, sizes=("96x96",), min_size=96, max_size=96, default_width=96, default_height=96)
LANCZOS = Image.Resampling.LANCZOS


class PatternBackend(FakeBackend):
    """Generates noise that differs everywhere, by size and seed."""

    async def generate(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        async for image in super().generate(generation):
            yield replace(image, pixels=pattern(generation.width, generation.height, image.seed))


def pattern(width: int, height: int, seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def backend() -> FakeBackend:
    made = PatternBackend()
    made.description = SMALL
    return made


@pytest.fixture
async def strict(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(create_app(Config(sizes="strict"), backend)) as client:
        yield client


def pixels_in(text: str) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def images_in(response: httpx.Response) -> list[Pixels]:
    assert response.status_code == 200, response.text
    return [pixels_in(image["b64_json"]) for image in response.json()["data"]]


def events_in(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return [json.loads(frame.partition("data: ")[2]) for frame in response.text.split("\n\n") if "data: " in frame]


def scaled(pixels: Pixels, size: Size, box: tuple[int, int, int, int] | None = None) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size, LANCZOS, box=box))


@pytest.mark.parametrize(
    ("own", "generated"),
    [
        ((64, 48), (64, 48)),
        ((1536, 32), (1536, 32)),
        ((500, 333), (504, 336)),
        ((3072, 2048), (1536, 1024)),
        ((4000, 3000), (1536, 1152)),
        ((1, 1), (32, 32)),
        ((20, 10), (64, 32)),
        ((4096, 16), (1536, 32)),
    ],
)
def test_the_nearest_size_keeps_proportions_as_far_as_the_model_goes(
    own: tuple[int, int], generated: tuple[int, int]
) -> None:
    assert nearest_size(own, MODEL) == generated


@pytest.mark.parametrize(
    ("own", "generated"),
    [
        ((768, 512), (768, 512)),
        ((1024, 1024), (512, 512)),
        ((4000, 3000), (768, 512)),
        ((300, 400), (512, 768)),
        ((10, 4000), (512, 768)),
    ],
)
def test_of_sizes_that_are_built_in_the_one_of_nearest_proportions_is_taken(
    own: tuple[int, int], generated: tuple[int, int]
) -> None:
    assert nearest_size(own, BUILT) == generated


@pytest.mark.parametrize("model", [MODEL, SMALL, BUILT])
def test_a_size_that_is_native_is_its_own_nearest_and_shown_whole(model: ModelDescription) -> None:
    sides = range(model.min_size, model.max_size + 1, model.size_factor)
    legal = [(width, height) for width in sides for height in sides if is_native((width, height), model)]
    assert len(legal) >= 3
    for size in legal:
        assert nearest_size(size, model) == size
        assert crop_box(size, size) == (0, 0, *size)


@pytest.mark.parametrize(
    ("requested", "generated", "shown"),
    [
        ((1024, 1024), (96, 96), (0, 0, 96, 96)),
        ((512, 512), (96, 96), (0, 0, 96, 96)),
        ((256, 256), (96, 96), (0, 0, 96, 96)),
        ((1536, 1024), (96, 64), (0, 0, 96, 64)),
        ((1792, 1024), (96, 56), (0, 0, 96, 55)),
        ((1024, 1792), (56, 96), (0, 0, 55, 96)),
        ((4096, 8), (96, 56), (0, 27, 96, 28)),
        ((1, 4096), (56, 96), (27, 0, 28, 96)),
        ((1, 1), (56, 56), (0, 0, 56, 56)),
        ((10, 20), (56, 96), (4, 0, 52, 96)),
    ],
)
def test_what_is_native_for_the_sizes_that_clients_ask_for(
    requested: Size, generated: Size, shown: tuple[int, int, int, int]
) -> None:
    assert nearest_size(requested, SMALL) == generated
    assert crop_box(generated, requested) == shown


@pytest.mark.parametrize("requested", [(0, 64), (4097, 64), (64, 4097), (16_383, 16_383)])
def test_what_is_beyond_the_limit_is_refused_with_it(requested: Size) -> None:
    with pytest.raises(InvalidRequestError, match=r"each side from 1 to 4096\.") as refused:
        SizePolicy().check(requested, SMALL)
    assert refused.value.param == "size"


def test_the_limit_is_configured_and_never_below_what_the_model_generates() -> None:
    assert SizePolicy(max_side=2000).limit(SMALL) == 2000
    assert SizePolicy(max_side=50).limit(SMALL) == 96
    SizePolicy(max_side=50).check((70, 96), SMALL)
    with pytest.raises(InvalidRequestError, match="from 1 to 96"):
        SizePolicy(max_side=50).check((97, 96), SMALL)


class TestGenerations:
    @pytest.mark.parametrize("size", ["1024x1024", "512x512", "256x256", "1536x1024", "1024x1536"])
    async def test_what_clients_ask_for_by_default_is_the_generated_image_scaled(
        self, client: httpx.AsyncClient, strict: httpx.AsyncClient, size: str
    ) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a fox", "size": size, "seed": 3, "n": 2})
        width, height = map(int, size.split("x"))
        generated = response.headers["x-hypergen-generated-size"]
        own = images_in(await strict.post(GENERATIONS, json={"prompt": "a", "size": generated, "seed": 3, "n": 2}))
        for image, pixels in zip(images_in(response), own, strict=True):
            assert image.shape == (height, width, 3)
            assert np.array_equal(image, scaled(pixels, (width, height)))
        assert response.json()["size"] == size

    async def test_a_size_that_the_model_generates_is_native_as_it_is(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", "size": "88x56", "seed": 3})
        assert np.array_equal(images_in(response)[0], pattern(88, 56, 3))
        assert "x-hypergen-generated-size" not in response.headers
        assert response.json()["size"] == "88x56"
        auto = await client.post(GENERATIONS, json={"prompt": "a", "seed": 3})
        assert np.array_equal(images_in(auto)[0], pattern(64, 64, 3))
        assert auto.json()["size"] == "64x64"
        assert "x-hypergen-generated-size" not in auto.headers
        assert [(made.width, made.height) for made in backend.generations] == [(88, 56), (64, 64)]

    async def test_where_proportions_differ_the_image_is_cut_rather_than_distorted(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.description = SQUARE
        response = await client.post(GENERATIONS, json={"prompt": "a", "size": "400x200", "seed": 3})
        (image,) = images_in(response)
        assert response.headers["x-hypergen-generated-size"] == "96x96"
        assert np.array_equal(image, scaled(pattern(96, 96, 3), (400, 200), (0, 24, 96, 72)))

    async def test_previews_are_scaled_as_the_image_is(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": "a", "size": "300x300", "seed": 3, "stream": True, "partial_images": 2}
        response = await client.post(GENERATIONS, json=body)
        events = events_in(response)
        assert len(events) == 3
        assert response.headers["x-hypergen-generated-size"] == "96x96"
        for event in events:
            assert event["size"] == "300x300"
            assert np.array_equal(pixels_in(event["b64_json"]), scaled(pattern(96, 96, 3), (300, 300)))

    async def test_usage_is_that_of_the_size_that_is_native(self, client: httpx.AsyncClient) -> None:
        usage = (await client.post(GENERATIONS, json={"prompt": "a", "size": "1024x1024"})).json()["usage"]
        assert usage["output_tokens"] == 12 * 12

    @pytest.mark.parametrize("size", ["0x0", "-64x64", "4097x64", "64x4097", "1000000x1000000", "99999x99999", "64"])
    async def test_an_absurd_size_is_refused(self, client: httpx.AsyncClient, backend: FakeBackend, size: str) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", "size": size})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "size")
        assert "'auto' or WIDTHxHEIGHT in pixels, such as '64x64', each side from 1 to 4096." in str(error["message"])
        assert backend.generations == []

    async def test_the_largest_size_is_served(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": "a", "size": "4096x4096", "output_format": "jpeg", "output_compression": 10}
        (image,) = images_in(await client.post(GENERATIONS, json=body))
        assert image.shape == (4096, 4096, 3)

    @pytest.mark.parametrize("size", ["1024x1024", "97x96", "60x60"])
    async def test_strictly_only_what_is_native_is_taken(self, strict: httpx.AsyncClient, size: str) -> None:
        response = await strict.post(GENERATIONS, json={"prompt": "a", "size": size})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "size")
        assert "both multiples of 8 from 56 to 96." in str(error["message"])


class TestEdits:
    async def test_an_image_of_the_server_s_own_is_edited_in_the_size_it_came_in(
        self, client: httpx.AsyncClient, strict: httpx.AsyncClient
    ) -> None:
        large = await client.post(GENERATIONS, json={"prompt": "a", "size": "320x320", "seed": 3})
        file = base64.b64decode(large.json()["data"][0]["b64_json"])
        for server in (client, strict):
            for fields in ({}, {"size": "320x320"}, {"size": "auto"}):
                response = await server.post(EDITS, data={"prompt": "a", "seed": "4"} | fields, files={"image": file})
                assert np.array_equal(images_in(response)[0], scaled(pattern(96, 96, 4), (320, 320)))
                assert response.headers["x-hypergen-generated-size"] == "96x96"
                assert response.json()["size"] == "320x320"

    @pytest.mark.parametrize("model", [SMALL, SQUARE])
    async def test_what_the_mask_covers_stays_to_the_pixel_at_the_size_that_is_asked_for(
        self, client: httpx.AsyncClient, backend: FakeBackend, model: ModelDescription
    ) -> None:
        backend.description = model
        image, box = photo(640, 400), (100, 51, 401, 230)
        files = {"image": file_of(image), "mask": file_of(hole(640, 400, box))}
        response = await client.post(EDITS, data={"prompt": "a", "seed": "4", "size": "640x400"}, files=files)
        (edited,) = images_in(response)
        (generation,) = backend.generations
        size = generation.width, generation.height
        generated = scaled(pattern(*size, 4), (640, 400), crop_box(size, (640, 400)))
        inside = np.zeros((400, 640, 1), dtype=bool)
        inside[51:230, 100:401] = True
        assert np.array_equal(edited, np.where(inside, generated, ramp(640, 400)))

    async def test_image_and_mask_are_placed_where_the_answer_is_cut_from(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.description = SQUARE
        files = {"image": file_of(photo(192, 96)), "mask": file_of(hole(192, 96, (0, 0, 96, 96)))}
        await client.post(EDITS, data={"prompt": "a"}, files=files)
        (generation,) = backend.generations
        assert generation.image is not None
        assert generation.mask is not None
        assert generation.image.shape == (96, 96, 3)
        own = scaled(ramp(192, 96), (96, 48))
        assert np.array_equal(generation.image[24:72], own)
        # Beyond the image lies its mirror image, and the mask's.
        assert np.array_equal(generation.image[:24], own[:24][::-1])
        assert np.array_equal(generation.image[72:], own[24:][::-1])
        assert np.array_equal(generation.mask > 0, np.arange(96)[None, :].repeat(96, axis=0) < 48)

    async def test_a_stream_and_a_variation_and_json_are_scaled_too(self, client: httpx.AsyncClient) -> None:
        file, expected = file_of(photo()), scaled(pattern(96, 96, 4), (200, 200))
        fields = {"prompt": "a", "seed": 4, "size": "200x200"}
        image = {"images": [{"image_url": data_url(file)}]}
        streamed = await client.post(EDITS, json=fields | image | {"stream": True, "partial_images": 1})
        assert all(np.array_equal(pixels_in(event["b64_json"]), expected) for event in events_in(streamed))
        assert np.array_equal(images_in(await client.post(EDITS, json=fields | image))[0], expected)
        data = {"seed": "4", "size": "200x200", "response_format": "b64_json"}
        varied = await client.post(VARIATIONS, data=data, files={"image": file})
        assert np.array_equal(images_in(varied)[0], expected)
        assert varied.headers["x-hypergen-generated-size"] == "96x96"

    async def test_images_of_several_sizes_are_generated_in_several(self, client: httpx.AsyncClient) -> None:
        files = [("image[]", file_of(photo(960, 640))), ("image[]", file_of(photo(500, 500)))]
        response = await client.post(EDITS, data={"prompt": "a", "n": "3"}, files=files)
        assert [image.shape for image in images_in(response)] == [(640, 960, 3), (500, 500, 3), (640, 960, 3)]
        assert response.headers["x-hypergen-generated-size"] == "96x64, 96x96"
        assert "size" not in response.json()

    async def test_another_size_than_the_image_s_is_held_to_the_limit(self, client: httpx.AsyncClient) -> None:
        files = {"image": file_of(photo(5000, 100))}
        own = await client.post(EDITS, data={"prompt": "a", "size": "5000x100"}, files=files)
        assert images_in(own)[0].shape == (100, 5000, 3)
        other = await client.post(EDITS, data={"prompt": "a", "size": "5000x101"}, files=files)
        assert (other.status_code, error_of(other)["param"]) == (400, "size")

    async def test_an_image_that_no_webp_could_hold_is_refused(self, client: httpx.AsyncClient) -> None:
        data = {"prompt": "a", "output_format": "webp"}
        response = await client.post(EDITS, data=data, files={"image": file_of(photo(16_384, 4))})
        assert (response.status_code, error_of(response)["param"]) == (400, "image")
        response = await client.post(EDITS, data=data, files={"image": file_of(photo(16_383, 4))})
        assert images_in(response)[0].shape == (4, 16_383, 3)


async def test_capabilities_tell_what_may_be_asked_for(client: httpx.AsyncClient, strict: httpx.AsyncClient) -> None:
    told = (await client.get("/v1/capabilities")).json()
    assert (told["size_policy"], told["max_side"], told["max_size"]) == ("fit", 4096, 96)
    told = (await strict.get("/v1/capabilities")).json()
    assert (told["size_policy"], told["max_side"], told["max_size"]) == ("strict", 96, 96)
