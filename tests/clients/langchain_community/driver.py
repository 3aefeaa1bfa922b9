"""LangChain's DALL-E wrapper for Python."""

from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper


def generate(prompt: str) -> str:
    url: str = DallEAPIWrapper().run(prompt)  # OPENAI_API_BASE and OPENAI_API_KEY
    return url
