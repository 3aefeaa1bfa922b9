"""CAMEL's image generation toolkit, called as an agent calls it; it keeps the image as a file and gives its path."""

import os
from pathlib import Path

from camel.toolkits import ImageGenToolkit

toolkit = ImageGenToolkit(url=os.environ["OPENAI_BASE_URL"], working_directory="images")  # and OPENAI_API_KEY


def generate(prompt: str) -> bytes:
    answer = str(toolkit.generate_image(prompt, image_name="rocket.png"))
    path = Path("images/rocket.png")
    if str(path) not in answer:
        raise RuntimeError(answer)
    return path.read_bytes()
