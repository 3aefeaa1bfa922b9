"""OpenAI's Python client, the last release before 2.0, which much of what builds on it still asks for."""

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY


def generate(prompt: str) -> str | None:
    response = client.images.generate(model="dall-e-3", prompt=prompt, size="1024x1024", quality="standard", n=1)
    assert response.data
    return response.data[0].url


def edit(prompt: str, image: str, mask: str) -> str | None:
    with open(image, "rb") as image_file, open(mask, "rb") as mask_file:
        response = client.images.edit(model="gpt-image-1", image=image_file, mask=mask_file, prompt=prompt)
    assert response.data
    return response.data[0].b64_json


def stream(prompt: str) -> list[str]:
    events = client.images.generate(model="gpt-image-1", prompt=prompt, stream=True, partial_images=2)
    return [event.b64_json for event in events]


def vary(image: str) -> str | None:
    with open(image, "rb") as file:
        response = client.images.create_variation(image=file)
    assert response.data
    return response.data[0].url
