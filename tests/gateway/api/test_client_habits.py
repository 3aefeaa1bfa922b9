"""Requests as clients write them: numbers, seeds, qualities, image references and fields that belong elsewhere."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.generation.backend import GeneratedImage, GenerationRequest
from support.fake_backend import MODEL, FakeBackend, in_memory
from support.image_files import file_of, hole, photo, ramp
from support.wire import data_url, error_of, form, part

GENERATIONS, EDITS, VARIATIONS = (f"/v1/images/{what}" for what in ("generations", "edits", "variations"))
PHOTO = file_of(photo())
BASE64 = base64.b64encode(PHOTO).decode()
URL = data_url(PHOTO)


def image(name: str = "image", content: bytes = PHOTO) -> bytes:
    return part(name, content, filename="x")


class TestWholeNumbers:
    @pytest.mark.parametrize(
        ("field", "written", "value"),
        [
            ("n", "2.0", 2),
            ("n", "2e0", 2),
            ("n", "0.2e1", 2),
            ("seed", "42.0", 42),
            ("seed", "1e3", 1000),
            ("seed", "-1.0", None),
            ("num_inference_steps", "7.0", 7),
        ],
    )
    async def test_what_json_schema_counts_as_an_integer_is_one(
        self, client: httpx.AsyncClient, backend: FakeBackend, field: str, written: str, value: int | None
    ) -> None:
        body = f'{{"prompt": "a", "{field}": {written}}}'.encode()
        sent = [
            await client.post(GENERATIONS, content=body, headers={"content-type": "application/json"}),
            await client.post(EDITS, **form(part("prompt", b"a"), image(), part(field, written.encode()))),
        ]
        assert [response.status_code for response in sent] == [200, 200], sent[1].text
        for made in backend.generations:
            got = {"n": made.num_images, "seed": made.seed, "num_inference_steps": made.num_inference_steps}[field]
            assert got == value or (value is None and got >= 0)

    @pytest.mark.parametrize("written", ["1.5", "1e999", "9007199254740992.0", "1e300"])
    async def test_what_lost_digits_on_its_way_is_none(self, client: httpx.AsyncClient, written: str) -> None:
        body = f'{{"prompt": "a", "seed": {written}}}'.encode()
        response = await client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
        assert (response.status_code, error_of(response)["param"]) == (400, "seed")

    @pytest.mark.parametrize("written", ["9" * 401, "2147483648", "0", "1.5"])
    @pytest.mark.parametrize("as_form", [False, True])
    async def test_a_deadline_is_held_to_its_bounds(
        self, client: httpx.AsyncClient, written: str, as_form: bool
    ) -> None:
        body = f'{{"prompt": "a", "deadline_ms": {written}}}'.encode()
        if as_form:
            response = await client.post(
                EDITS, **form(part("prompt", b"a"), image(), part("deadline_ms", written.encode()))
            )
        else:
            response = await client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "deadline_ms")
        assert "an integer from 1 to 2147483647" in str(error["message"])


class TestSeeds:
    @pytest.mark.parametrize("seed", [-1, None])
    async def test_minus_one_and_null_are_random(
        self, client: httpx.AsyncClient, backend: FakeBackend, seed: int | None
    ) -> None:
        for _ in range(2):
            response = await client.post(GENERATIONS, json={"prompt": "a", "seed": seed, "n": 2})
            told = [item["seed"] for item in response.json()["data"]]
            assert told == [backend.generations[-1].seed, backend.generations[-1].seed + 1]
        assert backend.generations[0].seed != backend.generations[1].seed

    async def test_less_is_refused(self, client: httpx.AsyncClient) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", "seed": -2})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "seed")
        assert "from 0 to 9223372036854775807, and so must be seed + n - 1; -1 is a random one" in str(error["message"])


class TestQualities:
    @pytest.mark.parametrize(
        ("quality", "told", "steps"),
        [("xhigh", "high", 30), ("max", "high", 30), ("high", "high", 30), ("hd", "high", 30), ("low", "low", 10)],
    )
    async def test_every_sdk_s_words_are_known(
        self, client: httpx.AsyncClient, backend: FakeBackend, quality: str, told: str, steps: int
    ) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", "quality": quality})
        assert response.json()["quality"] == told
        assert backend.generations[0].num_inference_steps == steps


def kinds_in(answer: httpx.Response) -> list[set[str]]:
    """How each image of an answer comes."""
    return [{"url", "b64_json"} & item.keys() for item in answer.json()["data"]]


class TestResponseFormats:
    @pytest.mark.parametrize(
        ("model", "kind"),
        [("dall-e-2", "url"), ("dall-e-3", "url"), ("gpt-image-1", "b64_json"), (None, "b64_json"), ("", "b64_json")],
    )
    async def test_unsaid_it_is_that_of_the_model_that_is_named(
        self, client: httpx.AsyncClient, model: str | None, kind: str
    ) -> None:
        named = {} if model is None else {"model": model}
        answers = [
            await client.post(GENERATIONS, json={"prompt": "a"} | named),
            await client.post(EDITS, data={"prompt": "a"} | named, files={"image": PHOTO}),
            await client.post(EDITS, json={"prompt": "a", "images": [URL]} | named),
        ]
        if model:
            answers.append(await client.post(VARIATIONS, data=named, files={"image": PHOTO}))
        for answer in answers:
            assert kinds_in(answer) == [{kind}]

    @pytest.mark.parametrize("named", [{}, {"model": ""}])
    async def test_a_variation_of_no_named_model_is_a_link_as_openai_varies_with_dall_e_2_alone(
        self, client: httpx.AsyncClient, named: dict[str, str]
    ) -> None:
        assert kinds_in(await client.post(VARIATIONS, data=named, files={"image": PHOTO})) == [{"url"}]
        data = named | {"response_format": "b64_json"}
        assert kinds_in(await client.post(VARIATIONS, data=data, files={"image": PHOTO})) == [{"b64_json"}]

    @pytest.mark.parametrize(
        ("user_agent", "kind"),
        [
            ("OpenAI/v1 PythonBindings/0.28.1", "url"),
            ("OpenAI/NodeJS/3.3.0", "url"),
            ("OpenAI/Python 3.57.0", "b64_json"),
            ("OpenAI/JS 7.59.0", "b64_json"),
            ("AsyncOpenAI/Python 0.1", "b64_json"),
        ],
    )
    async def test_clients_older_than_base64_get_links_unless_they_say_what_they_want(
        self, client: httpx.AsyncClient, user_agent: str, kind: str
    ) -> None:
        headers = {"User-Agent": user_agent}
        answers = [
            await client.post(GENERATIONS, json={"prompt": "a"}, headers=headers),
            await client.post(EDITS, data={"prompt": "a"}, files={"image": PHOTO}, headers=headers),
        ]
        assert [kinds_in(answer) for answer in answers] == [[{kind}]] * 2
        for said in ({"response_format": "b64_json"}, {"model": "gpt-image-1"}):
            answer = await client.post(GENERATIONS, json={"prompt": "a"} | said, headers=headers)
            assert kinds_in(answer) == [{"b64_json"}]

    async def test_what_is_said_counts(self, client: httpx.AsyncClient) -> None:
        for said in ("url", "b64_json"):
            for model in ("dall-e-3", "gpt-image-1"):
                body = {"prompt": "a", "model": model, "response_format": said}
                (item,) = (await client.post(GENERATIONS, json=body)).json()["data"]
                assert said in item

    async def test_a_stream_carries_its_images_whatever_the_model(self, client: httpx.AsyncClient) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", "model": "dall-e-3", "stream": True})
        assert response.status_code == 200
        assert "b64_json" in json.loads(response.text.partition("data: ")[2])


REFERENCES: dict[str, Any] = {
    "image_url": {"image_url": URL},
    "image_url of an object": {"image_url": {"url": URL}},
    "with its detail": {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
    "url": {"url": URL},
    "b64_json": {"b64_json": BASE64},
    "b64_json of a data URL": {"b64_json": URL},
    "text": URL,
    "bare base64": BASE64,
}

DATA_URLS = {
    "line breaks": "data:image/png;base64," + "\r\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
    "white space around": f" \n{URL}\n ",
    "in capitals": "DATA:IMAGE/PNG;BASE64," + BASE64,
    "space before base64": f"data:image/png; base64,{BASE64}",
    "parameters": f"data:image/png;charset=utf-8;name=x.png;base64,{BASE64}",
    "no media type": f"data:;base64,{BASE64}",
    "a wrong media type": f"data:text/plain;base64,{BASE64}",
    "percent-encoded base64": f"data:image/png;base64,{quote(BASE64, safe='')}",
    "without padding": f"data:image/png;base64,{BASE64.rstrip('=')}",
    "percent-encoded bytes": f"data:image/png,{quote(PHOTO, safe='')}",
}


class TestImageReferences:
    @pytest.mark.parametrize("what", REFERENCES)
    @pytest.mark.parametrize("name", ["image", "images"])
    @pytest.mark.parametrize("in_list", [True, False])
    async def test_json_carries_an_image_in_any_of_these_ways(
        self, client: httpx.AsyncClient, backend: FakeBackend, what: str, name: str, in_list: bool
    ) -> None:
        given = [REFERENCES[what]] if in_list else REFERENCES[what]
        response = await client.post(EDITS, json={"prompt": "a", name: given})
        assert response.status_code == 200, response.text
        assert np.array_equal(backend.generations[0].image, ramp(64, 48))  # type: ignore[arg-type]

    @pytest.mark.parametrize("what", REFERENCES)
    async def test_and_a_mask(self, client: httpx.AsyncClient, backend: FakeBackend, what: str) -> None:
        mask = file_of(hole())
        given = json.loads(json.dumps(REFERENCES[what]).replace(BASE64, base64.b64encode(mask).decode()))
        response = await client.post(EDITS, json={"prompt": "a", "images": [URL], "mask": given})
        assert response.status_code == 200, response.text
        assert backend.generations[0].mask is not None

    @pytest.mark.parametrize("what", DATA_URLS)
    async def test_data_urls_are_read_as_browsers_read_them(
        self, client: httpx.AsyncClient, backend: FakeBackend, what: str
    ) -> None:
        response = await client.post(EDITS, json={"prompt": "a", "images": [{"image_url": DATA_URLS[what]}]})
        assert response.status_code == 200, response.text
        assert np.array_equal(backend.generations[0].image, ramp(64, 48))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("reference", "words"),
        [
            ("https://example.com/cat.png", "URLs are never fetched"),
            ({"url": "HTTP://169.254.169.254/latest"}, "URLs are never fetched"),
            ({"image_url": {"url": "file:///etc/passwd"}}, "URLs are never fetched"),
            ({"image_url": "cat.png"}, "not valid base64"),
            ({"image_url": "data:image/png;base64,a!b"}, "not valid base64"),
            ({"image_url": "data:image/png;base64,aaaaa"}, "not valid base64"),
            ({"image_url": "data:image/png;base64"}, "no comma"),
            ({"b64_json": ""}, "is empty"),
            ({"file_id": "file-abc"}, "Files API"),
            ({"image_url": None}, "an object such as"),
            ({}, "an object such as"),
            (7, "an object such as"),
        ],
    )
    @pytest.mark.parametrize("name", ["image", "images"])
    async def test_what_holds_no_image_is_refused_with_its_reason(
        self, client: httpx.AsyncClient, backend: FakeBackend, name: str, reference: Any, words: str
    ) -> None:
        response = await client.post(EDITS, json={"prompt": "a", name: reference})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, name)
        assert words in str(error["message"])
        assert backend.generations == []

    async def test_both_names_at_once_are_one_too_many(self, client: httpx.AsyncClient) -> None:
        response = await client.post(EDITS, json={"prompt": "a", "image": URL, "images": [URL]})
        assert (response.status_code, error_of(response)["param"]) == (400, "images")

    @pytest.mark.parametrize("names", [["image"], ["image[]"], ["image[0]"], ["images"], ["images[]"]])
    @pytest.mark.parametrize("path", [EDITS, VARIATIONS])
    async def test_a_form_carries_an_image_under_any_of_these_names(
        self, client: httpx.AsyncClient, backend: FakeBackend, path: str, names: list[str]
    ) -> None:
        prompt = [part("prompt", b"a")] if path == EDITS else []
        response = await client.post(path, **form(*prompt, *(image(name) for name in names)))
        assert response.status_code == 200, response.text
        assert np.array_equal(backend.generations[0].image, ramp(64, 48))  # type: ignore[arg-type]

    @pytest.mark.parametrize("names", [["image"] * 2, ["image[]"] * 2, ["image[0]", "image[1]"], ["images"] * 2])
    async def test_and_several(self, client: httpx.AsyncClient, backend: FakeBackend, names: list[str]) -> None:
        files = [image(name, file_of(photo(8 * (4 + number), 48))) for number, name in enumerate(names)]
        response = await client.post(EDITS, **form(part("prompt", b"a"), part("n", b"2"), *files))
        assert response.status_code == 200, response.text
        assert sorted(made.width for made in backend.generations) == [32, 40]

    async def test_what_a_browser_sends_for_fields_that_nobody_filled_in_is_absent(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        empty = [part(name, b"") for name in ("n", "size", "seed", "negative_prompt", "quality", "stream", "user")]
        mask = part("mask", b"", filename="", media_type="application/octet-stream")
        response = await client.post(EDITS, **form(part("prompt", b"a"), image(), mask, *empty))
        assert response.status_code == 200, response.text
        (made,) = backend.generations
        assert (made.num_images, made.width, made.negative_prompt, made.mask) == (1, 64, None, None)


class TestFieldsThatBelongElsewhere:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("image", URL),
            ("image", [URL]),
            ("images", [{"image_url": URL}]),
            ("image[]", [URL]),
            ("mask", {"image_url": URL}),
            ("strength", 0.5),
            ("markup", URL),
        ],
    )
    async def test_a_generation_starts_from_no_image(
        self, client: httpx.AsyncClient, backend: FakeBackend, field: str, value: Any
    ) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", field: value})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, field)
        assert "/v1/images/edits" in str(error["message"])
        assert backend.generations == []
        absent = await client.post(GENERATIONS, json={"prompt": "a", field: None})
        assert absent.status_code == 200

    @pytest.mark.parametrize("as_json", [True, False])
    async def test_an_edit_is_guided_by_a_mask_and_not_by_markup(
        self, client: httpx.AsyncClient, backend: FakeBackend, as_json: bool
    ) -> None:
        if as_json:
            response = await client.post(EDITS, json={"prompt": "a", "images": [URL], "markup": URL})
        else:
            response = await client.post(EDITS, data={"prompt": "a"}, files={"image": PHOTO, "markup": PHOTO})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "markup")
        assert "'mask'" in str(error["message"])
        assert backend.generations == []

    @pytest.mark.parametrize("beside", [{}, {"images": [URL]}])
    async def test_json_has_no_brackets_in_names(
        self, client: httpx.AsyncClient, backend: FakeBackend, beside: dict[str, Any]
    ) -> None:
        response = await client.post(EDITS, json={"prompt": "a", "image[]": [URL]} | beside)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "image[]")
        assert "in JSON it is 'images'" in str(error["message"])
        assert backend.generations == []

    @pytest.mark.parametrize(
        ("field", "value", "ours"),
        [
            ("steps", 30, "num_inference_steps"),
            ("cfg_scale", 4.5, "guidance_scale"),
            ("width", 64, "size"),
            ("height", 64, "size"),
            ("sampler_name", "euler", "scheduler"),
            ("num_images", 2, "n"),
        ],
    )
    async def test_other_servers_names_are_refused_with_the_right_one(
        self, client: httpx.AsyncClient, backend: FakeBackend, field: str, value: Any, ours: str
    ) -> None:
        text = str(value).encode()
        sent = [
            await client.post(GENERATIONS, json={"prompt": "a", field: value}),
            await client.post(EDITS, json={"prompt": "a", "images": [URL], field: value}),
            await client.post(EDITS, **form(part("prompt", b"a"), image(), part(field, text))),
            await client.post(VARIATIONS, **form(image(), part(field, text))),
        ]
        for response in sent:
            error = error_of(response)
            assert (response.status_code, error["param"]) == (400, field)
            assert f"this server calls it '{ours}'" in str(error["message"])
        assert backend.generations == []
        absent = await client.post(GENERATIONS, json={"prompt": "a", field: None})
        assert absent.status_code == 200

    async def test_other_unknown_fields_are_ignored(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        harmless = {"extra_body": {}, "metadata": {"a": 1}, "denoising_strength": 0.7, "stepss": 3, "watermark": False}
        response = await client.post(GENERATIONS, json={"prompt": "a"} | harmless)
        assert response.status_code == 200
        assert backend.generations[0].num_inference_steps == 20

    @pytest.mark.parametrize(
        ("field", "value"), [("prompt", b"a fox"), ("stream", b"true"), ("mask", PHOTO), ("markup", PHOTO)]
    )
    async def test_a_variation_is_native_from_an_image_alone(
        self, client: httpx.AsyncClient, backend: FakeBackend, field: str, value: bytes
    ) -> None:
        sent = part(field, value, filename="x" if value is PHOTO else None)
        response = await client.post(VARIATIONS, **form(image(), sent))
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, field)
        assert "/v1/images/edits" in str(error["message"])
        assert backend.generations == []

    @pytest.mark.parametrize(
        ("field", "value"), [("frame_count", 9), ("frame_duration_ms", 100), ("svg", {"model": "x"})]
    )
    async def test_what_only_a_gif_or_an_svg_has_is_refused_as_they_are(
        self, client: httpx.AsyncClient, backend: FakeBackend, field: str, value: Any
    ) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", field: value})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, field)
        assert "output_format" in str(error["message"])
        assert backend.generations == []

    async def test_a_variation_that_says_it_is_no_stream_is_served(self, client: httpx.AsyncClient) -> None:
        response = await client.post(
            VARIATIONS, **form(image(), part("stream", b"false"), part("response_format", b"b64_json"))
        )
        assert response.status_code == 200
        (item,) = response.json()["data"]
        assert Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).size == (64, 48)


class TestLongPrompts:
    async def test_the_answer_says_what_was_cut_off(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        backend.truncated_tokens = 15
        answers = [
            await client.post(GENERATIONS, json={"prompt": "a", "n": 2}),
            await client.post(EDITS, data={"prompt": "a"}, files={"image": PHOTO}),
        ]
        for answer in answers:
            assert answer.headers["x-hypergen-prompt-truncated"] == "15"
            assert answer.json()["prompt_truncated"] == 15

    async def test_a_stream_says_it_with_the_image(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        backend.truncated_tokens = 15
        response = await client.post(GENERATIONS, json={"prompt": "a", "stream": True, "partial_images": 1})
        preview, completed = (json.loads(frame.partition("data: ")[2]) for frame in response.text.split("\n\n")[:-1])
        assert "prompt_truncated" not in preview
        assert completed["prompt_truncated"] == 15

    async def test_nothing_is_said_where_all_was_read(self, client: httpx.AsyncClient) -> None:
        answer = await client.post(GENERATIONS, json={"prompt": "a"})
        assert "x-hypergen-prompt-truncated" not in answer.headers
        assert "prompt_truncated" not in answer.json()

    async def test_capabilities_tell_the_limit(self, client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/capabilities")).json()["max_prompt_tokens"] == 75


class TestDefaultsOfTheServer:
    async def test_they_are_for_requests_that_do_not_say(self, backend: FakeBackend) -> None:
        backend.description = replace(MODEL, prompt_weightings=("none", "a1111"), max_clip_skip=2)
        bodies = [{}, {"prompt_weighting": "none", "clip_skip": 0}]
        async with in_memory(create_app(Config(prompt_weighting="a1111", clip_skip=1), backend)) as client:
            for body in bodies:
                assert (await client.post(GENERATIONS, json={"prompt": "a", **body})).status_code == 200
            told = (await client.get("/v1/capabilities")).json()
        sent = [(generation.prompt_weighting, generation.clip_skip) for generation in backend.generations]
        assert sent == [("a1111", 1), (None, 0)]
        assert (told["default_prompt_weighting"], told["default_clip_skip"]) == ("a1111", 1)

    async def test_a_model_without_them_is_served_all_the_same(self, backend: FakeBackend) -> None:
        async with in_memory(create_app(Config(prompt_weighting="a1111", clip_skip=1), backend)) as client:
            assert (await client.post(GENERATIONS, json={"prompt": "a"})).status_code == 200
        (generation,) = backend.generations
        assert (generation.prompt_weighting, generation.clip_skip) == (None, None)

    async def test_a_scheduler_is_known_by_other_names(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        for body in ({"scheduler": "Euler a Karras"}, {"scheduler": "Euler a Karras", "sigmas": "exponential"}):
            assert (await client.post(GENERATIONS, json={"prompt": "a", **body})).status_code == 200
        sent = [(generation.scheduler, generation.sigmas) for generation in backend.generations]
        assert sent == [("euler_a", "karras"), ("euler_a", "exponential")]


class ShyBackend(FakeBackend):
    """Returns the image where the strength leaves no step, as the sampler does."""

    async def generate(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        async for image in super().generate(generation):
            assert generation.image is not None
            assert generation.strength is not None
            stays = int(generation.num_inference_steps * generation.strength) == 0
            yield replace(image, pixels=generation.image, step=0) if stays else image


class TestStrength:
    @pytest.mark.parametrize("strength", ["0", "0.0", "0.04"])
    @pytest.mark.parametrize("size", [(64, 48), (700, 500)])
    @pytest.mark.parametrize("masked", [True, False])
    async def test_what_leaves_no_step_returns_the_image_to_the_pixel(
        self, strength: str, size: tuple[int, int], masked: bool
    ) -> None:
        files = {"image": file_of(photo(*size))} | ({"mask": file_of(hole(*size))} if masked else {})
        async with in_memory(create_app(Config(), ShyBackend())) as client:
            response = await client.post(EDITS, data={"prompt": "a", "strength": strength}, files=files)
        (item,) = response.json()["data"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))
        assert np.array_equal(pixels, ramp(*size))

    async def test_a_variation_of_one_step_is_one(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        await client.post(VARIATIONS, data={"num_inference_steps": "1"}, files={"image": PHOTO})
        assert backend.generations[0].strength == 1.0
