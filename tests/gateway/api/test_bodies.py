"""Bodies as clients really send them: cut ones are refused, and what says nothing is absent."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import httpx
import pytest

from support.fake_backend import FakeBackend
from support.image_files import file_of, hole, photo
from support.wire import BOUNDARY, error_of, form, part

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
JSON = {"Content-Type": "application/json"}

PROMPT = part("prompt", "a café".encode())
IMAGE = part("image", file_of(photo()), filename="x.png", media_type="image/png")
MASK = part("mask", file_of(hole()), filename="m.png", media_type="image/png")
N = part("n", b"2")
END = f"--{BOUNDARY}--\r\n".encode()
WHOLE: bytes = form(PROMPT, IMAGE, MASK, N)["content"]
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"


async def post_form(client: httpx.AsyncClient, content: bytes, content_type: str = MULTIPART) -> httpx.Response:
    return await client.post(EDITS, content=content, headers={"Content-Type": content_type})


class TestWholeForms:
    async def test_the_whole_one_is_served_with_all_that_it_says(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        assert (await post_form(client, WHOLE)).status_code == 200
        (generation,) = backend.generations
        assert (generation.prompt, generation.num_images, generation.mask is None) == ("a café", 2, False)

    # The closing boundary without its line break is whole; from there on back, nothing is.
    @pytest.mark.parametrize("missing", [3, 4, 5, 10, len(END), len(END) + 1, len(END) + 2, len(END) + 3, 60, 90, 200])
    async def test_one_that_is_cut_is_a_400_and_ends_the_connection(
        self, client: httpx.AsyncClient, backend: FakeBackend, missing: int
    ) -> None:
        response = await post_form(client, WHOLE[:-missing])
        assert response.status_code == 400
        assert "ends before its last boundary" in str(error_of(response)["message"])
        assert response.headers["connection"] == "close"
        assert backend.generations == []

    @pytest.mark.parametrize(
        "content",
        [
            WHOLE.replace(END, b""),
            WHOLE.replace(END, b"--\r\n"),
            WHOLE.replace(END, f"--{BOUNDARY}\r\n".encode()),
            WHOLE.replace(END, f"--{BOUNDARY}\r\nContent-Dispo".encode()),
            WHOLE.replace(END, f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="user"\r\n'.encode()),
            WHOLE.replace(END, f"--{BOUNDARY.upper()}--\r\n".encode()),
            WHOLE.replace(END, f"--{BOUNDARY}s--\r\n".encode()),
            WHOLE.replace(END, END.replace(b"\r\n", b"").removesuffix(b"-")),
        ],
    )
    async def test_one_that_does_not_close_is_a_400(
        self, client: httpx.AsyncClient, backend: FakeBackend, content: bytes
    ) -> None:
        response = await post_form(client, content)
        assert response.status_code == 400
        assert "ends before its last boundary" in str(error_of(response)["message"])
        assert backend.generations == []

    @pytest.mark.parametrize(
        ("content", "content_type"),
        [
            (WHOLE.removesuffix(b"\r\n"), MULTIPART),
            (WHOLE + b"an epilogue, which RFC 2046 has readers ignore\r\n", MULTIPART),
            (WHOLE, f'multipart/form-data; boundary="{BOUNDARY}"'),
            (WHOLE, f"Multipart/Form-Data; BOUNDARY={BOUNDARY}"),
            (WHOLE, f"multipart/form-data; charset=utf-8; boundary={BOUNDARY}"),
            (WHOLE.replace(BOUNDARY.encode(), b"a b:c"), 'multipart/form-data; boundary="a b:c"'),
        ],
    )
    async def test_one_that_is_merely_unusual_is_served(
        self, client: httpx.AsyncClient, backend: FakeBackend, content: bytes, content_type: str
    ) -> None:
        assert (await post_form(client, content, content_type)).status_code == 200
        (generation,) = backend.generations
        assert (generation.prompt, generation.num_images, generation.mask is None) == ("a café", 2, False)

    @pytest.mark.parametrize(
        "content_type", ["multipart/form-data", "multipart/form-data; boundary=", MULTIPART.upper()]
    )
    async def test_a_boundary_that_is_missing_or_another_is_a_400(
        self, client: httpx.AsyncClient, content_type: str
    ) -> None:
        response = await post_form(client, WHOLE, content_type)
        assert (response.status_code, error_of(response)["type"]) == (400, "invalid_request_error")


class TestTexts:
    """A part without a filename is a text, and a text is UTF-8."""

    @pytest.mark.parametrize("content", [file_of(photo()), file_of(photo(), "JPEG"), file_of(photo(), "WEBP")])
    async def test_a_file_that_came_without_its_name_is_told_so_and_not_shown(
        self, client: httpx.AsyncClient, content: bytes
    ) -> None:
        response = await post_form(client, form(PROMPT, part("image", content, media_type="image/png"))["content"])
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "image")
        assert error["message"] == (
            "'image' is not valid UTF-8. A part of a form is a file if its Content-Disposition has a filename."
        )

    async def test_a_large_one_is_told_the_same(self, client: httpx.AsyncClient) -> None:
        response = await post_form(client, form(PROMPT, part("image[]", b"x" * 1_100_000))["content"])
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "image")
        assert "'image' is a text of more than 1,048,576 bytes" in str(error["message"])
        assert "filename" in str(error["message"])

    @pytest.mark.parametrize("prompt", ["café".encode("latin-1"), "🦊".encode()[:2], b"\xed\xa0\xbd", b"\xff\xfe"])
    async def test_what_is_not_utf_8_is_not_guessed_at(
        self, client: httpx.AsyncClient, backend: FakeBackend, prompt: bytes
    ) -> None:
        response = await post_form(client, form(part("prompt", prompt), IMAGE)["content"])
        assert (response.status_code, error_of(response)["param"]) == (400, "prompt")
        assert "UTF-8" in str(error_of(response)["message"])
        assert backend.generations == []


class TestAbsence:
    """A browser sends every field of its form, also those that nobody filled in."""

    NO_FILE = part("mask", b"", filename="", media_type="application/octet-stream")

    @pytest.mark.parametrize(
        "empty",
        [
            (NO_FILE,),
            (part("n", b""), part("size", b""), part("seed", b""), part("strength", b"")),
            (part("stream", b""), part("quality", b""), part("scheduler", b""), part("lora_path", b"")),
            (NO_FILE.replace(b'"mask"', b'"image"'), NO_FILE.replace(b'"mask"', b'"image[]"')),
            (part("prompt", b""),),  # before the one that says something
        ],
    )
    async def test_what_was_not_filled_in_is_absent(
        self, client: httpx.AsyncClient, backend: FakeBackend, empty: tuple[bytes, ...]
    ) -> None:
        given = (PROMPT, IMAGE, part("num_inference_steps", b"3"))
        for parts in ((*empty, *given), (*given, *empty)):
            response = await post_form(client, form(*parts)["content"])
            assert response.status_code == 200, response.text
        for generation in backend.generations:
            assert (generation.prompt, generation.num_images, generation.mask) == ("a café", 1, None)
            assert (generation.width, generation.height, generation.scheduler) == (64, 48, None)

    @pytest.mark.parametrize(
        ("missing", "parts"), [("prompt", (part("prompt", b""), IMAGE)), ("image", (PROMPT, NO_FILE))]
    )
    async def test_what_is_needed_is_missing_then(
        self, client: httpx.AsyncClient, missing: str, parts: tuple[bytes, ...]
    ) -> None:
        response = await post_form(client, form(*parts)["content"])
        assert (response.status_code, error_of(response)["param"]) == (400, missing)
        assert f"'{missing}' is missing" in str(error_of(response)["message"])

    async def test_an_empty_file_that_has_a_name_was_chosen(self, client: httpx.AsyncClient) -> None:
        response = await post_form(client, form(PROMPT, part("image", b"", filename="x.png"))["content"])
        assert (response.status_code, error_of(response)["param"]) == (400, "image")
        assert "not an image" in str(error_of(response)["message"])

    async def test_a_file_whose_name_is_empty_is_one(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        response = await post_form(client, form(PROMPT, part("image", file_of(photo()), filename=""))["content"])
        assert (response.status_code, len(backend.generations)) == (200, 1)


class TestJson:
    @pytest.mark.parametrize("missing", [1, 2, 3, 4])
    async def test_one_that_is_cut_is_a_400_that_says_so_and_ends_the_connection(
        self, client: httpx.AsyncClient, missing: int
    ) -> None:
        body = json.dumps({"prompt": "a café"}, ensure_ascii=False).encode()
        assert body.endswith(b'\xc3\xa9"}')
        response = await client.post(GENERATIONS, content=body[:-missing], headers=JSON)
        assert response.status_code == 400
        assert "ends too early" in str(error_of(response)["message"])
        assert "Content-Length" in str(error_of(response)["message"])
        assert response.headers["connection"] == "close"

    async def test_a_byte_order_mark_is_skipped(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        for body in ('{"prompt": "a café"}', '\n {"prompt": "a café"}\n'):
            response = await client.post(GENERATIONS, content=body.encode("utf-8-sig"), headers=JSON)
            assert response.status_code == 200
        assert [generation.prompt for generation in backend.generations] == ["a café"] * 2
        response = await client.post(GENERATIONS, content=b"\xef\xbb\xbf", headers=JSON)
        assert "The body is empty" in str(error_of(response)["message"])


class TestHalfCharacters:
    """A script that cuts a text counts UTF-16, and so halves an emoji."""

    HALF = "\ud83d"
    RETRYABLE: ClassVar[list[dict[str, str]]] = [{}, {"Idempotency-Key": "k"}, {"x-stainless-retry-count": "0"}]

    @pytest.mark.parametrize("headers", RETRYABLE)
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("prompt", "a fox \ud83d"), ("negative_prompt", "\udc8a"), ("user", HALF), ("model", "x\ud83d"),
            ("safety_identifier", HALF), ("size", HALF), ("scheduler", HALF), ("lora_path", HALF), ("style", HALF),
            ("n", [HALF]), ("n", {"a": [{"b": HALF}]}),
        ],
    )  # fmt: skip
    async def test_one_is_a_400_that_names_it(
        self, client: httpx.AsyncClient, backend: FakeBackend, headers: dict[str, str], field: str, value: Any
    ) -> None:
        body = json.dumps({"prompt": "a fox", field: value})
        response = await client.post(GENERATIONS, content=body, headers=JSON | headers)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, field)
        assert f"'{field}' contains half a character" in str(error["message"])
        assert backend.generations == []

    async def test_so_is_one_in_a_field_that_nobody_knows_or_in_a_name(self, client: httpx.AsyncClient) -> None:
        for more in ({"metadata": {"tags": [self.HALF]}}, {"x" + self.HALF: 1}, {"metadata": {self.HALF: 1}}):
            response = await client.post(GENERATIONS, content=json.dumps({"prompt": "a"} | more), headers=JSON)
            assert (response.status_code, error_of(response)["param"]) == (400, None)
            assert "half a character" in str(error_of(response)["message"])

    @pytest.mark.parametrize("headers", RETRYABLE)
    async def test_whole_ones_are_generated_however_they_are_written_and_so_is_a_nul(
        self, client: httpx.AsyncClient, backend: FakeBackend, headers: dict[str, str]
    ) -> None:
        for prompt in ("a 🦊", "a \U00010000", "a\x00b"):
            for body in (
                json.dumps({"prompt": prompt, "user": prompt}),
                f'{{"prompt": {json.dumps(prompt, ensure_ascii=False)}}}',
            ):
                backend.generations.clear()
                given = headers | ({"Idempotency-Key": str(hash(body))} if "Idempotency-Key" in headers else {})
                response = await client.post(GENERATIONS, content=body, headers=JSON | given)
                assert response.status_code == 200
                assert [generation.prompt for generation in backend.generations] == [prompt]


class TestContentEncoding:
    @pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip", "GZIP", "zstd"])
    @pytest.mark.parametrize("kind", ["application/json", MULTIPART])
    async def test_a_compressed_body_is_a_415_that_names_the_header(
        self, client: httpx.AsyncClient, coding: str, kind: str
    ) -> None:
        headers = {"Content-Type": kind, "Content-Encoding": coding}
        response = await client.post(EDITS, content=b"\x1f\x8b\x08\x00", headers=headers)
        assert response.status_code == 415
        assert "Content-Encoding" in str(error_of(response)["message"])
        assert response.headers["accept-encoding"] == "identity"

    @pytest.mark.parametrize("coding", ["identity", "Identity", ""])
    async def test_identity_says_that_it_is_not(self, client: httpx.AsyncClient, coding: str) -> None:
        headers = JSON | {"Content-Encoding": coding}
        assert (await client.post(GENERATIONS, content=b'{"prompt": "a"}', headers=headers)).status_code == 200
