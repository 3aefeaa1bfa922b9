"""litellm, which turns other APIs into OpenAI's: a server of that API is `openai/…` to it."""

import litellm  # OPENAI_BASE_URL and OPENAI_API_KEY


def generate(prompt: str) -> str:
    response = litellm.image_generation(model="openai/gpt-image-1", prompt=prompt, size="1024x1024")
    return str(response.data[0].b64_json)


def edit(prompt: str, image: str, mask: str) -> str:
    with open(image, "rb") as image_file, open(mask, "rb") as mask_file:
        response = litellm.image_edit(model="openai/gpt-image-1", image=image_file, mask=mask_file, prompt=prompt)
    return str(response.data[0].b64_json)


def vary(image: str) -> str:
    with open(image, "rb") as file:
        response = litellm.image_variation(model="openai/dall-e-2", image=file)
    return str(response.data[0].url)
