"""What Open WebUI 0.12 asks for by itself: a size of 512×512, and links fetched with the key, if any come.

It is an application, not a library; these are the requests of its routers/images.py, sent by the client that it uses.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import aiohttp

BASE_URL = os.environ["OPENAI_BASE_URL"]  # IMAGES_OPENAI_API_BASE_URL, IMAGES_EDIT_OPENAI_API_BASE_URL
HEADERS = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}  # IMAGES_OPENAI_API_KEY, IMAGES_EDIT_…


async def post(path: str, **body: Any) -> str | bytes:
    async with aiohttp.ClientSession(raise_for_status=True, headers=HEADERS) as session:
        async with session.post(BASE_URL + path, **body) as response:
            image = (await response.json(content_type=None))["data"][0]
        if "url" not in image:
            return str(image["b64_json"])
        async with session.get(image["url"]) as response:
            return await response.read()


def generate(prompt: str) -> str | bytes:
    body = {"model": "dall-e-2", "prompt": prompt, "n": 1, "size": "512x512", "response_format": "b64_json"}
    return asyncio.run(post("/images/generations", json=body))


def edit(prompt: str, image: str, mask: str) -> str | bytes:
    """It has no masks."""
    form = aiohttp.FormData()
    for name, value in {"model": "gpt-image-1", "prompt": prompt}.items():
        form.add_field(name, value)
    form.add_field("image", Path(image).open("rb"), filename="0a1b2c3d.png", content_type="image/png")
    return asyncio.run(post("/images/edits", data=form))
