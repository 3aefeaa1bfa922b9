"""`hypergen conformance`: our gateway keeps every rule, and each fault that is put into a server is found."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.cli import main
from hypergen_gateway.config import Config
from hypergen_gateway.conformance.command import RULES
from hypergen_gateway.conformance.rules import Finding, findings
from hypergen_gateway.conformance.server import Options, Server
from hypergen_gateway.generation.backend import GeneratedImage, GenerationRequest
from support.fake_backend import FakeBackend, on_loopback

KEY = "the-key"
Handler: TypeAlias = Callable[[httpx.Request], httpx.Response]


class KnobsBackend(FakeBackend):
    """Its images change with every knob, and it takes some time over each."""

    async def generate(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        knobs = (generation.negative_prompt, generation.num_inference_steps, generation.guidance_scale)
        async for image in super().generate(generation):
            await asyncio.sleep(0.001)
            seed = [image.seed, *str(knobs).encode()]
            pixels = np.random.default_rng(seed).integers(0, 255, image.pixels.shape, dtype=np.uint8)
            yield replace(image, pixels=pixels)


class TestOurs:
    async def test_the_gateway_keeps_every_rule(self, ours: str) -> None:
        result = await conformance(ours, "--api-key", KEY, "--json")
        (report,) = json.loads(result.stdout)
        broken = [(rule["rule"], rule["result"], rule["seen"]) for rule in report["rules"] if rule["result"] != "pass"]
        assert broken == [
            (
                "a full queue: 429 `rate_limit_exceeded` with a time to retry",
                "not tested",
                "no --burst was given",
            )
        ]
        assert len(report["rules"]) == len(RULES) > 80
        assert result.exit_code == 0

    async def test_a_full_queue_is_what_it_should_be(self, ours: str, backend: FakeBackend) -> None:
        backend.description = replace(await backend.describe(), max_active_images=1)
        (finding,) = await asyncio.to_thread(found, ours, "a full queue", Options(api_key=KEY, burst=12))
        assert finding.result == "pass", finding.seen
        assert "Retry-After: 1" in finding.seen

    async def test_a_model_without_guidance_refuses_its_fields_and_keeps_the_rule(
        self, ours: str, backend: FakeBackend
    ) -> None:
        backend.description = replace(
            await backend.describe(), guidance="none", max_guidance_scale=1.0, default_guidance_scale=1.0
        )
        (finding,) = await asyncio.to_thread(found, ours, "change the image", Options(api_key=KEY))
        assert (finding.result, finding.seen) == ("pass", "num_inference_steps")

    async def test_without_the_key_hardly_a_rule_holds(self, ours: str) -> None:
        result = await conformance(ours)
        assert result.exit_code == 1
        assert re.search(r"\d+ rules: \d+ pass, \d{2} fail, 9 not tested", result.stdout)

    async def test_servers_stand_side_by_side_in_markdown(self, ours: str) -> None:
        result = await conformance(ours, f"{ours}/v1", "--api-key", KEY, "--markdown")
        lines = result.stdout.splitlines()
        assert lines[0] == f"| passed rules | {ours} | {ours}/v1 |"
        assert "| models | 5 of 5 | 5 of 5 |" in lines
        assert "| load | 0 of 1 (1 not tested) | 0 of 1 (1 not tested) |" in lines
        assert "| models | models are listed in OpenAI's shape | pass | pass |" in lines

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["http://127.0.0.1:1"], "http://127.0.0.1:1/v1 cannot be reached"),
            (["x"], "x/v1 cannot be reached"),
            (["http://127.0.0.1:1", "--extra-body", "{"], "--extra-body is not JSON"),
            (["http://127.0.0.1:1", "--extra-body", "[]"], "--extra-body must be a JSON object"),
        ],
    )
    def test_what_a_user_can_mend_is_said_in_a_line(self, arguments: Sequence[str], message: str) -> None:
        result = CliRunner().invoke(main, ["conformance", *arguments])
        assert result.exit_code != 0
        assert message in result.output
        assert "Traceback" not in result.output

    async def test_fields_for_every_request_reach_the_server(self, ours: str, backend: FakeBackend) -> None:
        options = Options(api_key=KEY, extra_body={"num_inference_steps": 3})
        await asyncio.to_thread(found, ours, "a prompt alone", options)
        assert backend.generations[0].num_inference_steps == 3


@pytest.fixture
def backend() -> FakeBackend:
    return KnobsBackend()


@pytest.fixture
async def ours(backend: FakeBackend) -> AsyncIterator[str]:
    async with on_loopback(create_app(Config(api_key=KEY, max_queue_size=2), backend)) as url:
        yield url


async def conformance(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner(catch_exceptions=False).invoke, main, ["conformance", *arguments])


def found(url: str, text: str, options: Options, transport: httpx.BaseTransport | None = None) -> list[Finding]:
    server = Server(url, options, transport)
    try:
        return list(findings([rule for rule in RULES if text in rule.text], server))
    finally:
        server.close()


def image(name: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format=name)
    return base64.b64encode(buffer.getvalue()).decode()


def images(**changes: Any) -> Handler:
    """A server that answers everything with one image."""
    usage = {
        "input_tokens": 3,
        "output_tokens": 1,
        "total_tokens": 4,
        "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
    }
    body = {"created": 1, "data": [{"b64_json": image()}], "usage": usage} | changes
    return lambda _: httpx.Response(200, json=body)


def event(lines: str = "", type_: str = "image_generation.completed", **data: Any) -> str:
    body = {"type": type_, "b64_json": image()} | data
    return f"event: {type_}\n{lines}data: {json.dumps(body)}\n\n"


def stream(*events: str, kind: str = "text/event-stream") -> Handler:
    return lambda _: httpx.Response(200, text="".join(events), headers={"Content-Type": kind})


def answer(status: int, body: Any, **headers: str) -> Handler:
    return lambda _: httpx.Response(status, json=body, headers=headers)


def error(status: int, *, code: str | None = None, param: str | None = None, **headers: str) -> Handler:
    body = {"error": {"message": "no", "type": "invalid_request_error", "param": param, "code": code}}
    return answer(status, body, **headers)


def broken(_: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("reset")


class TestFaults:
    """Each rule that is about a shape, against a server whose one answer has a fault."""

    @pytest.mark.parametrize(
        ("rule", "handler", "seen"),
        [
            ("models are listed", answer(200, {"object": "list", "data": []}), "200"),
            (
                "models are listed",
                answer(200, {"object": "list", "data": [{"id": 7, "object": "model"}]}),
                "id, created",
            ),
            ("models are listed", lambda _: httpx.Response(200, text="<html>"), "text/plain"),
            ("models are listed", broken, "connection lost: ReadError reset"),
            ("models are listed", answer(200, [1]), "cannot be parsed"),
            ("an unknown model:", answer(404, {"detail": "Not Found"}), "not OpenAI's shape"),
            ("an unknown model:", error(404, code="not_found"), "'not_found'"),
            ("without a key", answer(200, {}), "200 {}"),
            ("with a wrong key", error(401), "code None"),
            ("a 401 says how", error(401), "no such header"),
            ("have different messages", error(401), "one message for several: no"),
            ("a prompt alone", images(data=[{"b64_json": "AAAA"}]), "not an image"),
            ("a prompt alone", images(data=[{"url": "x"}]), "no b64_json"),
            ("a prompt alone", error(500), "500"),
            ("without `response_format`", images(data=[{"b64_json": None, "url": None}]), "neither"),
            ("the image is a PNG", images(data=[{"b64_json": image("JPEG")}]), "JPEG 8x8"),
            ("is the current time", images(created=1), "1"),
            ("counts text and image tokens", images(usage=None), "no usage"),
            ("background, output_format", images(quality="best"), "best"),
            ("returns two different images, and", images(), "1 images"),
            ("returns two different images, and", images(data=[{"b64_json": image()}] * 2), "are identical"),
            ("output_format: jpeg", images(), "PNG 8x8 for jpeg"),
            ("returns a link that works", images(), "no url but b64_json"),
            ("returns server-sent events", stream(event(), kind="text/plain"), "text/plain"),
            ("has its type both", stream(event().replace("event: image", "event: x")), "event: x"),
            ("no `id:`", stream(event("id: 1\n")), "id: 1"),
            ("no `id:`", stream(event(), "data: [DONE]\n\n"), "not JSON"),
            ("does not have: clients", stream(event(type_="progress"), event()), "progress"),
            (
                "the stream ends with",
                stream(event(type_="image_generation.partial_image")),
                "the last",
            ),
            ("the stream ends with", stream(event()), "without background, created_at"),
            ("the stream ends with", stream('data: {"error": {}}\n\n'), "the last event is None"),
            ("sends one or two previews", stream(event()), "previews []"),
            ("sends two complete images", stream(event()), "1 finished"),
            ("is rejected before the stream", stream(event()), "200"),
            ("an unknown route", answer(404, {"error": "no"}), "not OpenAI's shape"),
            ("an unknown route", answer(404, {"error": {"message": "no"}}), "without type, param, code"),
            ("an unsupported method", error(405), "Allow: None"),
            ("an empty body", answer(422, {"detail": []}), "422"),
            ("internals", answer(400, {"error": 'File "/app/x.py"'}), "File"),
            ("`n` of 0", error(400, param="size"), "0: param 'size'"),
            ("`n` of 0", images(), "0: 200"),
            ("has an `x-request-id`", images(), "no such header"),
            ("openai-processing-ms", images(), "no such header"),
        ],
    )
    def test_it_is_found(self, rule: str, handler: Handler, seen: str) -> None:
        finding = self.judged(rule, handler)
        assert finding.result == "fail"
        assert seen in finding.seen

    @pytest.mark.parametrize(
        ("rule", "handler"),
        [
            ("`image` and a prompt", error(404)),
            ("`image[]` works", answer(404, {"detail": "Not Found"})),
            ("an image alone", error(405)),
            ("without a prompt: 400", answer(404, {"detail": "Not Found"})),
            ("output_format: webp", error(400, param="output_format")),
            ("returns a link that works", error(400, param="response_format")),
            ("returns server-sent events", error(400, param="stream")),
        ],
    )
    def test_what_a_server_does_not_have_is_no_fault(self, rule: str, handler: Handler) -> None:
        assert self.judged(rule, handler).result == "not offered"

    def judged(self, rule: str, handler: Handler) -> Finding:
        def listed(request: httpx.Request) -> httpx.Response:
            # Rules about edits start from an image of the server's own.
            if request.url.path.endswith("/generations") and rule.startswith(
                ("`image", "an image", "without a prompt")
            ):
                return images()(request)
            return handler(request)

        transport = httpx.MockTransport(listed)
        finding, *_ = found("http://server", rule, Options(api_key=KEY), transport)
        return finding
