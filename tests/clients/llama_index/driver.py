"""LlamaIndex's image generation tool, called as an agent calls it."""

from llama_index.tools.openai import OpenAIImageGenerationToolSpec

tool = OpenAIImageGenerationToolSpec()  # OPENAI_BASE_URL and OPENAI_API_KEY


def generate(prompt: str) -> str:
    return str(tool.image_generation(prompt))
