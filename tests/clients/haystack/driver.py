"""Haystack's image generator."""

import os

from haystack.components.generators import OpenAIImageGenerator

generator = OpenAIImageGenerator(api_base_url=os.environ["OPENAI_BASE_URL"])  # and OPENAI_API_KEY


def generate(prompt: str) -> str:
    images: list[str] = generator.run(prompt)["images"]
    return images[0]
