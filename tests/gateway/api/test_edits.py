"""Edits and variations over HTTP: forms however they are sent, JSON, what reaches the backend and what comes back."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from hypergen_gateway.generation.backend import Pixels
from support.fake_backend import MODEL, FakeBackend, until
from support.image_files import file_of, hole, photo, ramp
from support.wire import data_url, form, part

EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"


def images_in(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    files = [base64.b64decode(image["b64_json"]) for image in response.json()["data"]]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def same(one: Pixels | None, other: Pixels) -> bool:
    return one is not None and np.array_equal(one, other)


class TestByInstruction:
    @pytest.fixture(autouse=True)
    def served(self, backend: FakeBackend) -> None:
        backend.description = replace(MODEL, default_image_guidance_scale=1.5, max_image_guidance_scale=20.0)

    async def test_an_edit_starts_from_noise_and_keeps_to_the_image(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        data = {"prompt": "make it blue", "image_guidance_scale": "1.2"}
        images_in(await client.post(EDITS, data=data, files={"image": file_of(photo())}))
        form = {"response_format": "b64_json"}
        images_in(await client.post(VARIATIONS, data=form, files={"image": file_of(photo())}))
        edit, variation = backend.generations
        assert (edit.image_guidance_scale, edit.strength) == (1.2, None)
        assert same(edit.image, ramp(64, 48))
        assert (variation.prompt, variation.image_guidance_scale, variation.strength) == ("", None, None)

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("strength", "0.5", "It must be absent, as the model edits by instruction."),
            ("image_guidance_scale", "0.5", "It must be a number from 1 to 20."),
            ("image_guidance_scale", "21", "It must be a number from 1 to 20."),
        ],
    )
    async def test_what_it_does_not_take_is_refused(
        self, client: httpx.AsyncClient, name: str, value: str, words: str
    ) -> None:
        response = await client.post(EDITS, data={"prompt": "x", name: value}, files={"image": file_of(photo())})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
        assert words in response.json()["error"]["message"]

    async def test_without_an_image_there_is_nothing_to_edit(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/v1/images/generations", json={"prompt": "a fox"})
        assert response.status_code == 400
        assert "send one to POST /v1/images/edits" in response.json()["error"]["message"]


class TestForms:
    async def test_an_image_and_a_prompt_are_enough(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        files = {"image": file_of(photo())}
        response = await client.post(EDITS, data={"prompt": "make it blue"}, files=files)
        (image,) = images_in(response)
        (generation,) = backend.generations
        assert image.shape == (48, 64, 3)
        assert same(generation.image, ramp(64, 48))
        assert (generation.prompt, generation.mask, generation.strength) == ("make it blue", None, None)
        assert (generation.width, generation.height) == (64, 48)

    async def test_texts_stand_for_numbers_and_truth_values(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        data = {
            "prompt": "123",
            "n": "2",
            "seed": "7",
            "strength": "0.5",
            "guidance_scale": "3",
            "num_inference_steps": "9",
            "output_format": "webp",
            "output_compression": "80",
            "stream": "false",
            "size": "96x96",
            "user": "4",
            "unknown": "x",
        }
        response = await client.post(EDITS, data=data, files={"image": file_of(photo())})
        assert [image.shape for image in images_in(response)] == [(96, 96, 3)] * 2
        (generation,) = backend.generations
        assert (generation.prompt, generation.num_images, generation.seed) == ("123", 2, 7)
        assert (generation.strength, generation.guidance_scale, generation.num_inference_steps) == (0.5, 3.0, 9)
        assert response.json()["output_format"] == "webp"

    @pytest.mark.parametrize(
        "image",
        [
            part("image", file_of(photo()), filename="upload", media_type="application/octet-stream"),
            part("image", file_of(photo()), filename="/home/me/my cat.jpg", media_type="image/jpeg"),
            part("image[]", file_of(photo()), filename="a.png", media_type="image/png"),
            part("image", file_of(photo()), filename=""),
        ],
        ids=["octet-stream", "a path and a wrong type", "image[]", "no name"],
    )
    async def test_a_file_is_what_it_holds_whatever_it_is_called(
        self, client: httpx.AsyncClient, backend: FakeBackend, image: bytes
    ) -> None:
        response = await client.post(EDITS, **form(image, part("prompt", b"a")))
        assert response.status_code == 200, response.text
        assert same(backend.generations[0].image, ramp(64, 48))

    async def test_parts_come_in_any_order_and_the_body_in_any_pieces(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        whole = form(
            part("mask", file_of(hole()), filename="x"),
            part("image", file_of(photo()), filename="x"),
            part("seed", b"3"),
            part("prompt", "ein Fuchs 🦊".encode()),
        )

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(whole["content"]), 7):
                yield whole["content"][start : start + 7]

        response = await client.post(EDITS, content=pieces(), headers=whole["headers"])
        assert response.status_code == 200, response.text
        (generation,) = backend.generations
        assert (generation.prompt, generation.seed) == ("ein Fuchs 🦊", 3)
        assert generation.mask is not None

    async def test_a_mask_reaches_the_backend_and_what_it_covers_stays(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        files = {"image": file_of(photo()), "mask": file_of(hole(box=(16, 8, 48, 40)))}
        response = await client.post(EDITS, data={"prompt": "a", "seed": "200", "n": "2"}, files=files)
        inside = np.zeros((48, 64, 1), dtype=bool)
        inside[8:40, 16:48] = True
        for offset, image in enumerate(images_in(response)):
            assert np.array_equal(image, np.where(inside, np.uint8(200 + offset), ramp(64, 48)))
        (generation,) = backend.generations
        assert same(generation.mask, np.where(inside[..., 0], np.uint8(255), np.uint8(0)))

    async def test_an_image_of_any_size_is_answered_in_its_own(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        files = {"image": file_of(photo(333, 501), "JPEG")}
        response = await client.post(EDITS, data={"prompt": "a"}, files=files)
        assert images_in(response)[0].shape == (501, 333, 3)
        assert (backend.generations[0].width, backend.generations[0].height) == (336, 504)

    async def test_image_i_starts_from_image_i_mod_k(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        files = [("image[]", file_of(photo(64, 48))), ("image[]", file_of(photo(40, 80)))]
        response = await client.post(EDITS, data={"prompt": "a", "n": "3", "seed": "10"}, files=files)
        assert [image.shape for image in images_in(response)] == [(48, 64, 3), (80, 40, 3), (48, 64, 3)]
        assert [image["seed"] for image in response.json()["data"]] == [10, 11, 12]
        assert sorted((made.seed, made.num_images, made.width) for made in backend.generations) == [
            (10, 1, 64),
            (11, 1, 40),
            (12, 1, 64),
        ]

    async def test_usage_counts_each_input_image_once(self, client: httpx.AsyncClient) -> None:
        files = [("image[]", file_of(photo(64, 48))), ("image[]", file_of(photo(32, 32)))]
        usage = (await client.post(EDITS, data={"prompt": "two words", "n": "3"}, files=files)).json()["usage"]
        assert usage["input_tokens_details"] == {"text_tokens": 2, "image_tokens": 8 * 6 + 4 * 4}
        assert usage["output_tokens"] == 2 * 8 * 6 + 4 * 4

    async def test_a_failure_of_one_image_is_that_of_the_request(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.failure = RuntimeError("boom")
        files = [("image[]", file_of(photo())) for _ in range(2)]
        response = await client.post(EDITS, data={"prompt": "a", "n": "2"}, files=files)
        assert response.status_code == 500
        await until(lambda: backend.running == 0)

    async def test_links_and_server_timing_are_there_too(self, client: httpx.AsyncClient) -> None:
        data = {"prompt": "a", "response_format": "url"}
        response = await client.post(EDITS, data=data, files={"image": file_of(photo())})
        assert (await client.get(response.json()["data"][0]["url"])).status_code == 200
        assert response.headers["server-timing"].startswith("queue;dur=")

    async def test_a_stream_of_an_edit_has_events_of_edits(self, client: httpx.AsyncClient) -> None:
        data = {"prompt": "a", "stream": "true", "partial_images": "2", "seed": "100"}
        files = {"image": file_of(photo(100, 100)), "mask": file_of(hole(100, 100))}
        response = await client.post(EDITS, data=data, files=files)
        frames = response.content.decode().split("\n\n")[:-1]
        events = [json.loads(frame.partition("\ndata: ")[2]) for frame in frames]
        assert [event["type"] for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
        for event in events:
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))))
            assert image.shape == (100, 100, 3)
            assert (image[20, 20].tolist(), image[99, 99].tolist()) == ([100, 100, 100], [255, 255, 0])
        assert events[-1]["usage"]["input_tokens_details"]["image_tokens"] == 13 * 13


REFERRING = replace(MODEL, size_factor=16, max_references=2, max_reference_pixels=256 * 256)


class TestReferences:
    """Of a model that takes them."""

    @pytest.fixture(autouse=True)
    def _refer(self, backend: FakeBackend) -> None:
        backend.description = REFERRING

    async def test_all_images_are_references_of_every_result(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        files = [("image[]", file_of(photo(64, 80))), ("image[]", file_of(photo(96, 64)))]
        response = await client.post(EDITS, data={"prompt": "both of them", "n": "3", "seed": "5"}, files=files)
        assert [image.shape for image in images_in(response)] == [(80, 64, 3)] * 3
        (generation,) = backend.generations
        assert (generation.num_images, generation.image, generation.strength) == (3, None, None)
        assert generation.references is not None
        assert same(generation.references, np.concatenate([ramp(64, 80).reshape(-1), ramp(96, 64).reshape(-1)]))
        usage = response.json()["usage"]
        assert usage["input_tokens_details"] == {"text_tokens": 3, "image_tokens": 8 * 10 + 12 * 8}
        assert usage["output_tokens"] == 3 * 8 * 10

    async def test_a_strength_starts_from_the_image_instead(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        files = {"image": file_of(photo(64, 80))}
        assert images_in(await client.post(EDITS, data={"prompt": "a", "strength": "0.5"}, files=files))
        assert images_in(await client.post(VARIATIONS, data={"response_format": "b64_json"}, files=files))
        for generation in backend.generations:
            assert same(generation.image, ramp(64, 80))
            assert generation.references is None

    async def test_other_references_are_another_request(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        headers = {"Idempotency-Key": "one"}
        for width, status in [(64, 200), (64, 200), (80, 400)]:
            body = {"prompt": "a", "images": [data_url(file_of(photo(width, 64)))]}
            assert (await client.post(EDITS, json=body, headers=headers)).status_code == status
        assert len(backend.generations) == 1

    async def test_too_many_are_refused_by_name(self, client: httpx.AsyncClient) -> None:
        files = [("image[]", file_of(photo(64, 64))) for _ in range(3)]
        error = (await client.post(EDITS, data={"prompt": "a"}, files=files)).json()["error"]
        assert (error["param"], error["type"]) == ("image", "invalid_request_error")
        assert "at most 2" in error["message"]
        assert (await client.get("/v1/capabilities")).json()["max_references"] == 2


class TestJson:
    async def test_images_and_mask_come_as_data_urls(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        body = {
            "prompt": "a",
            "images": [{"image_url": data_url(file_of(photo()))}],
            "mask": {"image_url": data_url(file_of(hole()), "application/whatever")},
            "strength": 0.3,
        }
        response = await client.post(EDITS, json=body)
        assert response.status_code == 200, response.text
        (generation,) = backend.generations
        assert same(generation.image, ramp(64, 48))
        assert generation.mask is not None
        assert generation.strength == 0.3

    async def test_a_large_image_is_larger_than_other_bodies_may_be(self, client: httpx.AsyncClient) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
        file = file_of(Image.fromarray(noise))
        assert len(file) > 1 << 20
        response = await client.post(EDITS, json={"prompt": "a", "images": [{"image_url": data_url(file)}]})
        assert images_in(response)[0].shape == (700, 900, 3)


class TestVariations:
    async def test_a_variation_needs_an_image_alone(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        files = {"image": ("upload", file_of(photo()), "application/octet-stream")}
        response = await client.post(VARIATIONS, data={"n": "2", "response_format": "b64_json"}, files=files)
        assert len(images_in(response)) == 2
        assert all("revised_prompt" not in image for image in response.json()["data"])
        (generation,) = backend.generations
        assert (generation.prompt, generation.strength, generation.num_images) == ("", 0.6, 2)
        assert same(generation.image, ramp(64, 48))

    async def test_strength_and_size_may_be_chosen(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        data = {"strength": "0.9", "size": "96x48", "response_format": "url"}
        response = await client.post(VARIATIONS, data=data, files={"image": file_of(photo())})
        assert set(response.json()["data"][0]) == {"url", "seed"}
        (generation,) = backend.generations
        assert (generation.strength, generation.width, generation.height) == (0.9, 96, 48)
