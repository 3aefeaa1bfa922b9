"""griptape's image generation driver."""

from pathlib import Path

from griptape.artifacts import ImageArtifact
from griptape.drivers.image_generation.openai import OpenAiImageGenerationDriver
from griptape.loaders import ImageLoader

# OPENAI_BASE_URL and OPENAI_API_KEY
driver = OpenAiImageGenerationDriver(model="gpt-image-1")
dall_e_2 = OpenAiImageGenerationDriver(model="dall-e-2", image_size="512x512")


def load(path: str) -> ImageArtifact:
    return ImageLoader().parse(Path(path).read_bytes())


def generate(prompt: str) -> bytes:
    return bytes(driver.run_text_to_image([prompt]).value)


def edit(prompt: str, image: str, mask: str) -> bytes:
    return bytes(dall_e_2.run_image_inpainting([prompt], image=load(image), mask=load(mask)).value)


def vary(image: str) -> bytes:
    return bytes(dall_e_2.run_image_variation([], image=load(image)).value)
