"""OpenAI's Python client for Azure: a deployment's paths, `api-version`, the key in `api-key`."""

import os

from openai import AzureOpenAI

client = AzureOpenAI(
    azure_endpoint=os.environ["OPENAI_BASE_URL"].removesuffix("/v1"),
    api_key=os.environ["OPENAI_API_KEY"],
    api_version="2025-04-01-preview",
)


def generate(prompt: str) -> str | None:
    response = client.images.generate(model="gpt-image-1", prompt=prompt, size="1024x1024")
    assert response.data
    return response.data[0].b64_json


def edit(prompt: str, image: str, mask: str) -> str | None:
    with open(image, "rb") as image_file, open(mask, "rb") as mask_file:
        response = client.images.edit(model="gpt-image-1", image=image_file, mask=mask_file, prompt=prompt)
    assert response.data
    return response.data[0].b64_json


def stream(prompt: str) -> list[str]:
    events = client.images.generate(model="gpt-image-1", prompt=prompt, stream=True, partial_images=2)
    return [event.b64_json for event in events]
