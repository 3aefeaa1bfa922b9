"""Pydantic AI's image generator. (The image tool of its agents is another thing: that is OpenAI's Responses API.)"""

from pathlib import Path

from pydantic_ai import BinaryImage, ImageGenerator

generator = ImageGenerator("openai:gpt-image-2")  # OPENAI_BASE_URL and OPENAI_API_KEY


def generate(prompt: str) -> bytes:
    return bytes(generator.generate_sync(prompt).image.data)


def edit(prompt: str, image: str, mask: str) -> bytes:
    """It has no masks."""
    start = BinaryImage(Path(image).read_bytes(), media_type="image/png")
    return bytes(generator.generate_sync(prompt, images=[start]).image.data)
