"""OpenAI's Python client before 1.0, which knew links alone."""

from typing import Any

import openai  # OPENAI_API_BASE and OPENAI_API_KEY

api: Any = openai


def generate(prompt: str) -> str:
    response = api.Image.create(prompt=prompt, n=1, size="1024x1024")
    return str(response["data"][0]["url"])


def edit(prompt: str, image: str, mask: str) -> str:
    with open(image, "rb") as image_file, open(mask, "rb") as mask_file:
        response = api.Image.create_edit(image=image_file, mask=mask_file, prompt=prompt, n=1, size="1024x1024")
    return str(response["data"][0]["url"])


def vary(image: str) -> str:
    with open(image, "rb") as file:
        response = api.Image.create_variation(image=file, n=1, size="1024x1024")
    return str(response["data"][0]["url"])
