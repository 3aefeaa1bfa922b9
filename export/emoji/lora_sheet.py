"""Draws the contact sheet of a LoRA by a running server: the same prompts and seeds, a row for each scale.

hypergen serve --port 8000 --lora hypergen/badge
python export/emoji/lora_sheet.py --url http://127.0.0.1:8000/v1 --output export/emoji/lora_sheet.png
"""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

from captions import plain_caption

SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
SUBJECTS = {
    "rocket": "yellow",
    "ladybug": "green",
    "pizza": "blue",
    "rose": "purple",
    "lion": "red",
    "grapes": "orange",
    "bread": "black",
    "octopus": "white",
}
CELL = 96
MARGIN = 40


def generate(url: str, prompt: str, seed: int, lora: str, scale: float) -> Image.Image:
    body = {"prompt": prompt, "seed": seed, "loras": [{"name": lora, "scale": scale}]}
    request = urllib.request.Request(
        f"{url}/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        image = json.load(response)["data"][0]["b64_json"]
    return Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")


@click.command(help=__doc__)
@click.option("--url", required=True, help="Base URL of a running server without a key.")
@click.option("--lora", default="badge", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(url: str, lora: str, output: Path) -> None:
    sheet = Image.new("RGB", (MARGIN + CELL * len(SUBJECTS), CELL * len(SCALES)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, scale in enumerate(SCALES):
        draw.text((MARGIN // 2, row * CELL + CELL // 2), f"{scale:g}", "black", font, anchor="mm")
        for column, (name, colour) in enumerate(SUBJECTS.items()):
            image = generate(url, plain_caption(name, colour), column, lora, scale)
            image = image.resize((CELL - 4, CELL - 4), Image.Resampling.BICUBIC)
            sheet.paste(image, (MARGIN + column * CELL + 2, row * CELL + 2))
    coarse = [level & 0xF8 | 4 for level in range(256)] * 3  # five bits a channel: half the bytes, nothing to be seen
    sheet.point(coarse).save(output, optimize=True)


if __name__ == "__main__":
    main()
