"""OpenAI's Python client, newest release."""

from pathlib import Path

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY


def generate(prompt: str) -> str | None:
    response = client.images.generate(model="gpt-image-1", prompt=prompt, size="1024x1024")
    assert response.data
    return response.data[0].b64_json


def edit(prompt: str, image: str, mask: str) -> str | None:
    response = client.images.edit(model="gpt-image-1", image=Path(image), mask=Path(mask), prompt=prompt)
    assert response.data
    return response.data[0].b64_json


def stream(prompt: str) -> list[str]:
    events = client.images.generate(model="gpt-image-1", prompt=prompt, stream=True, partial_images=2)
    return [event.b64_json for event in events]


def vary(image: str) -> str | None:
    with open(image, "rb") as file:
        response = client.images.create_variation(model="dall-e-2", image=file, n=1, size="1024x1024")
    assert response.data
    return response.data[0].url
