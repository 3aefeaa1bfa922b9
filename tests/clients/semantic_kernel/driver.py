"""Microsoft's Semantic Kernel for Python."""

import asyncio

from semantic_kernel.connectors.ai.open_ai import OpenAITextToImage


def service() -> OpenAITextToImage:
    return OpenAITextToImage(ai_model_id="dall-e-3")  # OPENAI_BASE_URL and OPENAI_API_KEY


def generate(prompt: str) -> bytes | str:
    image: bytes | str = asyncio.run(service().generate_image(prompt, width=1024, height=1024))
    return image


def edit(prompt: str, image: str, mask: str) -> str:
    images: list[str] = asyncio.run(service().edit_image(prompt, image_paths=[image], mask_path=mask))
    return images[0]
