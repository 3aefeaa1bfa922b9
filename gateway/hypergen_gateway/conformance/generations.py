"""Rules about POST /v1/images/generations."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import httpx

from hypergen_gateway.conformance.rules import Area, NotTested, need
from hypergen_gateway.conformance.server import PROMPT, Server
from hypergen_gateway.conformance.shapes import (
    describe_images,
    excerpt,
    image_in,
    images_of,
    json_of,
    offered,
    open_image,
)

AREA = Area("generations")
_LONG_PROMPT = ", ".join([PROMPT] * 4)


@AREA.rule("a prompt alone returns one image")
def _(server: Server) -> str:
    images = images_of(server.image)
    need(len(images) == 1, f"{len(images)} images")
    return describe_images(images)


@AREA.rule("without `response_format` the image is base64 or a link")
def _(server: Server) -> str:
    response = server.generate(response_format=None)
    need(response.status_code == 200, excerpt(response))
    held = [name for name, value in json_of(response)["data"][0].items() if value and name in ("b64_json", "url")]
    need(held, f"neither: {excerpt(response)}")
    return ", ".join(held)


@AREA.rule("the image is a PNG in base64")
def _(server: Server) -> str:
    (image,) = images_of(server.image)
    need(image.format == "PNG", describe_images([image]))
    return describe_images([image])


@AREA.rule("`created` is the current time")
def _(server: Server) -> str:
    created = json_of(server.image)["created"]
    need(isinstance(created, int) and abs(time.time() - created) < 3600, str(created))
    return str(created)


@AREA.rule("`usage` counts text and image tokens and their sum")
def _(server: Server) -> str:
    usage = json_of(server.image).get("usage")
    need(usage, "no usage")
    details = usage["input_tokens_details"]
    need(usage["input_tokens"] == details["text_tokens"] + details["image_tokens"], str(usage))
    need(usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"], str(usage))
    need(usage["input_tokens"] > 0 and usage["output_tokens"] > 0, str(usage))
    return f"{usage['input_tokens']} + {usage['output_tokens']}"


@AREA.rule("background, output_format and quality have OpenAI's values")
def _(server: Server) -> str:
    body = json_of(server.image)
    legal = {
        "background": ("opaque", "transparent"),
        "output_format": ("png", "jpeg", "webp"),
        "quality": ("low", "medium", "high"),
    }
    said = {name: body.get(name) for name in legal}
    need(all(said[name] in values for name, values in legal.items()), str(said))
    return ", ".join(f"{value}" for value in said.values())


@AREA.rule("`n: 2` returns two different images, and a longer prompt has more tokens")
def _(server: Server) -> str:
    response = offered(server.generate(n=2, prompt=_LONG_PROMPT), "n")
    images = images_of(response)
    need(len(images) == 2, f"{len(images)} images")
    need(images[0].tobytes() != images[1].tobytes(), "the two images are identical")
    tokens = [json_of(each).get("usage", {}).get("input_tokens", 0) for each in (server.image, response)]
    need(tokens[1] > tokens[0], f"{tokens[0]} tokens for a prompt and {tokens[1]} for four times as much")
    return f"{describe_images(images)}; {tokens[0]} and {tokens[1]} tokens"


@AREA.rule("images have the requested size, and `auto` is accepted")
def _(server: Server) -> str:
    (own,) = images_of(server.image)
    (image,) = images_of(offered(server.generate(size=f"{own.width}x{own.height}", quality="auto"), "size"))
    need(image.size == own.size, describe_images([image]))
    (auto,) = images_of(server.generate(size="auto"))
    return describe_images([image, auto])


@AREA.rule("`quality: low` is accepted")
def _(server: Server) -> str:
    response = offered(server.generate(quality="low"), "quality")
    said = json_of(response).get("quality")
    need(said in (None, "low"), f"quality {said!r}")
    return f"{describe_images(images_of(response))}, quality {said}"


@AREA.rule("all other fields of OpenAI's clients are accepted")
def _(server: Server) -> str:
    fields = {
        "background": "opaque",
        "moderation": "low",
        "user": "somebody",
        "response_format": "b64_json",
        "output_format": "png",
        "n": 1,
        "stream": False,
        "partial_images": 0,
    }
    return describe_images(images_of(server.generate(**fields)))


@AREA.rule("null is the same as omitting a field, and unknown fields are ignored")
def _(server: Server) -> str:
    absent = dict.fromkeys(("n", "size", "quality", "background", "output_format", "stream", "user"))
    body = absent | server.body({"a_field_of_next_year": {"x": [1]}})
    return describe_images(images_of(server.send("POST", "/images/generations", json=body)))


@AREA.rule("prompts in any script are accepted")
def _(server: Server) -> str:
    return describe_images(images_of(server.generate(prompt="кот 猫 🐈 \u202e é")))


@AREA.rule("`output_format: jpeg`, with compression")
def _(server: Server) -> str:
    return _file_in(server, "jpeg")


@AREA.rule("`output_format: webp`, with compression")
def _(server: Server) -> str:
    return _file_in(server, "webp")


@AREA.rule("`response_format: url` returns a link that works without the key")
def _(server: Server) -> str:
    item = json_of(offered(server.generate(response_format="url"), "response_format"))["data"][0]
    need(item.get("url"), f"no url but {', '.join(item)}")
    url = str(item["url"])
    if url.startswith("data:"):
        return f"data URL, {describe_images([image_in(url.partition(',')[2])])}"
    response = server.send("GET", url, authorised=False)
    need(response.status_code == 200, f"{url.partition('?')[0]}: {response.status_code}")
    return describe_images([open_image(response.content)])


@AREA.rule("any `model` is accepted", extension=True)
def _(server: Server) -> str:
    return describe_images(images_of(server.generate(model="gpt-image-1")))


@AREA.rule("the same `seed` returns the same bytes, another one does not", extension=True)
def _(server: Server) -> str:
    digests = [_digests(server, seed=seed)[0] for seed in (7, 7, 8)]
    need(digests[0] == digests[1] != digests[2], f"seeds 7, 7 and 8: {' '.join(digests)}")
    return " ".join(digests)


@AREA.rule("image i of a request has seed `seed` + i", extension=True)
def _(server: Server) -> str:
    several, one = _digests(server, seed=7, n=2), _digests(server, seed=8)
    need(several[1] == one[0], f"{several[1]} with n 2, {one[0]} alone")
    return one[0]


@AREA.rule("the seed of each image is returned", extension=True)
def _(server: Server) -> str:
    seeds = [item.get("seed") for item in json_of(offered(server.generate(seed=7, n=2)))["data"]]
    need(seeds == [7, 8], f"{seeds}")
    return str(seeds)


@AREA.rule("`negative_prompt`, `num_inference_steps`, `guidance_scale` change the image", extension=True)
def _(server: Server) -> str:
    plain = _digests(server, seed=7)[0]
    fields: dict[str, Any] = {"negative_prompt": "yellow", "num_inference_steps": 3, "guidance_scale": 9.0}
    # A model without guidance refuses the fields of guidance.
    responses = {name: server.generate(seed=7, **{name: value}) for name, value in fields.items()}
    accepted = [name for name, response in responses.items() if response.status_code != 400]
    same = [name for name in accepted if _digests_of(responses[name])[0] == plain]
    need(not same, f"no effect: {', '.join(same)}")
    if not accepted:
        raise NotTested(excerpt(responses["num_inference_steps"]))
    return ", ".join(accepted)


def _file_in(server: Server, name: str) -> str:
    response = offered(server.generate(output_format=name, output_compression=60), "output_format")
    images = images_of(response)
    need([image.format for image in images] == [name.upper()], f"{describe_images(images)} for {name}")
    said = json_of(response).get("output_format")
    need(said == name, f"{describe_images(images)}, described as {said!r}")
    return describe_images(images)


def _digests(server: Server, **fields: Any) -> list[str]:
    response = server.generate(**fields)
    if response.status_code == 400:
        raise NotTested(excerpt(response))
    return _digests_of(response)


def _digests_of(response: httpx.Response) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest()[:8] for image in images_of(response)]
