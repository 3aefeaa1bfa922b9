"""Is what a client brought back the image that it asked for? Its size, its background, what stands on it.

The shipped model generates an emoji on a coloured background. An image is recognised by the nearest of reference images
from the API itself: of the same emoji and of others, on the same background.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
from PIL import Image

from support.running_server import Pixels
from world import COLOURS

PROMPT = "a rocket on a yellow background"
EDIT_PROMPT = "a dog on a blue background"
# Beside the rocket: two that differ from it in form, two that share its colours.
OTHERS = ("dog", "pizza", "red heart", "airplane")
SEEDS = 4
NATIVE = (64, 64)
UPLOAD = (512, 512)
# What the mask opens: all but a quarter, with less of which the model does not generate what the prompt says.
MASKED = (128, 0, 512, 512)


class WrongImageError(Exception):
    """What came back is not what was asked for; `str()` says in what."""


@dataclass(frozen=True)
class References:
    """Images by the API itself at the model's own size: those of the rocket, and those of other things."""

    rockets: Sequence[Pixels]
    others: Sequence[Pixels]


def generate_references(client: openai.OpenAI) -> References:
    def generate(thing: str) -> list[Pixels]:
        prompt = PROMPT.replace("rocket", thing)
        response = client.images.generate(prompt=prompt, n=SEEDS, extra_body={"seed": 1})
        return [pixels(decode(base64.b64decode(image.b64_json or ""))) for image in response.data or []]

    return References(generate("rocket"), [image for thing in OTHERS for image in generate(thing)])


def write_uploads(folder: Path, references: References) -> tuple[Path, Path]:
    """An image as people send it, larger than what the model generates, and a mask that opens most of it."""
    image, mask = folder / "image.png", folder / "mask.png"
    upload = Image.fromarray(references.rockets[0]).resize(UPLOAD, Image.Resampling.LANCZOS)
    upload.save(image)
    opened = upload.convert("RGBA")
    opened.paste((0, 0, 0, 0), MASKED)
    opened.save(mask)
    return image, mask


def decode(file: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(file)) as image:
            return image.convert("RGB")
    except OSError as error:
        raise WrongImageError(f"no image: {error}") from error


def pixels(image: Image.Image) -> Pixels:
    """At the model's own size."""
    return np.asarray(image.resize(NATIVE, Image.Resampling.BOX))


def check_size(image: Image.Image, asked: str | None, otherwise: tuple[int, int]) -> None:
    """`asked` as the API writes it; where nothing or `auto` is asked for, the size is `otherwise`."""
    wanted = otherwise if asked in (None, "", "auto") else tuple(int(side) for side in str(asked).split("x"))
    if image.size != wanted:
        raise WrongImageError("{}×{} instead of {}×{}".format(*image.size, *wanted))


def check_rocket(image: Image.Image, references: References, background: str = "yellow") -> None:
    seen = pixels(image)
    if (colour := background_of(corners(seen))) != background:
        raise WrongImageError(f"on {colour} instead of {background}")
    if nearest(seen, references.rockets) >= nearest(seen, references.others):
        raise WrongImageError("no rocket")


def check_edit(image: Image.Image, upload: Image.Image, *, masked: bool) -> None:
    """On blue now, but for the quarter that the mask keeps, if there is one."""
    seen, before = pixels(image).astype(int), pixels(upload)
    kept = NATIVE[0] * MASKED[0] // UPLOAD[0] if masked else 0
    # At the very edge a row of pixels of another size takes from both sides.
    if masked and (worst := np.abs(seen[:, : kept - 1] - before[:, : kept - 1]).max()) > 3:
        raise WrongImageError(f"what the mask keeps has changed by {worst} of 255")
    colour = background_of([pixels(image)[:4, -4:], pixels(image)[-4:, -4:]])
    if colour != "blue":
        raise WrongImageError(f"where it was to be edited the background is {colour} instead of blue")


def check_variation(image: Image.Image, upload: Image.Image, references: References) -> None:
    check_rocket(image, references)
    if not np.abs(pixels(image).astype(int) - pixels(upload)).any():
        raise WrongImageError("the image itself")


def corners(seen: Pixels) -> list[Pixels]:
    return [seen[:4, :4], seen[:4, -4:], seen[-4:, :4], seen[-4:, -4:]]


def background_of(patches: Sequence[Pixels]) -> str:
    """The named colour nearest to them."""
    colour = np.median(np.concatenate([patch.reshape(-1, 3) for patch in patches]), axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(colour - np.array(COLOURS[name])).sum()))


def nearest(seen: Pixels, references: Sequence[Pixels]) -> float:
    def distances() -> Iterator[float]:
        for reference in references:
            yield float(np.abs(seen.astype(int) - reference).mean())

    return min(distances())
