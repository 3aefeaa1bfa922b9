"""Measures a shipped model: does a prompt give the right image?

    python export/emoji/evaluate.py                                                   the checkpoint through diffusers
    python export/emoji/evaluate.py --url http://127.0.0.1:8000/v1                    a running server
    python export/emoji/evaluate.py --flow --checkpoint build/emoji_flow/checkpoint   the flow model

Knows prompts, the images they should give and how to compare the two. Where images come from is a `Source`. Seeds
are fixed: the same model gives the same figures. An image's emoji is the one whose true rendering, over all places on
the background that was asked for, is nearest; its colour is the one nearest to its border.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import groupby, product
from pathlib import Path
from random import Random
from typing import Any, Protocol

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from captions import caption, plain_caption, unseen_caption
from world import COLOUR_NAMES, NATIVE_SIDE, Placement, colour_table, compose, cutouts, emoji_list, held_out_colour

HERE = Path(__file__).parent
EMOJI = emoji_list()
NATIVE = (NATIVE_SIDE, NATIVE_SIDE)
BATCH = 25
# The two sizes of training, those between and beside them, and shifts of a pixel.
SHIFTS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
PLACES = tuple(Placement(side, *shift) for side, shift in product(range(42, 59, 2), SHIFTS))
SHEET_COLUMNS, SHEET_CELL, SHEET_LINE = 8, 96, 14


@dataclass(frozen=True)
class Request:
    """One image to be generated; `None` leaves the default of the checkpoint or the server."""

    prompt: str
    seed: int
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    size: tuple[int, int] = NATIVE

    @property
    def settings(self) -> tuple[Any, ...]:
        """What images of one batch must share."""
        return (self.steps or 0, self.guidance or 0.0, self.scheduler or "", self.size)


@dataclass(frozen=True)
class Task:
    """A request and what it should give (indices; the colour is -1 where none is asked for)."""

    request: Request
    emoji: int
    colour: int


class Source(Protocol):
    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        """The images in the order of the requests."""
        ...


class Checkpoint:
    """Images of a checkpoint through the diffusers pipeline."""

    def __init__(self, folder: Path) -> None:
        from diffusers import DiffusionPipeline, ZImagePipeline

        self._pipeline: Any = DiffusionPipeline.from_pretrained(folder)
        self._pipeline.set_progress_bar_config(disable=True)
        # Z-Image's text encoder would compute 512 tokens for every prompt.
        self._extra = {"max_sequence_length": 64} if isinstance(self._pipeline, ZImagePipeline) else {}
        self._own_scheduler = self._pipeline.scheduler
        self._defaults = json.loads((folder / "hypergen_defaults.json").read_text(encoding="utf-8"))

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        images: list[Image.Image] = []
        for _, group in groupby(requests, key=lambda one: one.settings):
            same = list(group)
            for first in tqdm(range(0, len(same), BATCH), desc="images", leave=False, mininterval=2):
                images += self._generate_batch(same[first : first + BATCH])
        return images

    def _generate_batch(self, requests: Sequence[Request]) -> list[Image.Image]:
        first = requests[0]
        self._pipeline.scheduler = self._scheduler(first.scheduler)
        generated = self._pipeline(
            [one.prompt for one in requests],
            negative_prompt=[one.negative_prompt for one in requests],
            generator=[torch.Generator().manual_seed(one.seed) for one in requests],
            num_inference_steps=first.steps or self._defaults["num_inference_steps"],
            guidance_scale=self._defaults["guidance_scale"] if first.guidance is None else first.guidance,
            width=first.size[0],
            height=first.size[1],
            **self._extra,
        )
        return list(generated.images)

    def _scheduler(self, name: str | None) -> Any:
        if name is None:
            return self._own_scheduler
        import diffusers

        return getattr(diffusers, SCHEDULERS[name]).from_config(self._own_scheduler.config)


# The server's names of the schedulers that are measured, and diffusers' classes.
SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class Server:
    """Images of a running server with OpenAI's images API and HyperGen's options."""

    def __init__(self, url: str, key: str | None, at_once: int = 8) -> None:
        self._url = url.rstrip("/") + "/images/generations"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._at_once = at_once

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        with ThreadPoolExecutor(self._at_once) as pool:
            return list(tqdm(pool.map(self._generate_one, requests), total=len(requests), desc="images", leave=False))

    def _generate_one(self, request: Request) -> Image.Image:
        body = {
            "prompt": request.prompt,
            "seed": request.seed,
            "size": "{}x{}".format(*request.size),
            "response_format": "b64_json",
            "negative_prompt": request.negative_prompt or None,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "scheduler": request.scheduler,
        }
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        with urllib.request.urlopen(urllib.request.Request(self._url, data, self._headers), timeout=300) as answer:
            encoded = json.load(answer)["data"][0]["b64_json"]
        return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


# What an image shows


@dataclass(frozen=True)
class Verdict:
    """What was seen in an image.

    `rmse` is its root mean square distance to the nearest rendering of what was asked for, `margin` how much farther
    the nearest rendering of anything else is.
    """

    emoji: int
    colour: int
    rmse: float
    margin: float


def pixels(image: Image.Image) -> Tensor:
    """float32 [3, H, W] in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


@lru_cache(maxsize=2)  # a quarter of a gigabyte each: judge images in the order of their colours
def renderings(colour: int, size: tuple[int, int]) -> Tensor:
    """float32 [emoji * places, 3 * H * W]: every emoji everywhere on one colour."""
    cuts = _cuts(size).flatten(0, 1)
    return compose(cuts, colour_table()[colour].expand(len(cuts), 3)).flatten(1)


@lru_cache(maxsize=2)
def _lengths(colour: int, size: tuple[int, int]) -> Tensor:
    """float32 [emoji * places]: the squared lengths of the renderings."""
    return renderings(colour, size).square().sum(1)


@cache
def _cuts(size: tuple[int, int]) -> Tensor:
    return cutouts(EMOJI, PLACES, size)


def seen_colour(image: Tensor) -> int:
    """The named colour nearest to the median of a border two pixels wide."""
    border = torch.cat([image[:, :2].flatten(1), image[:, -2:].flatten(1)], dim=1).median(dim=1).values
    return int((colour_table() - border).square().sum(1).argmin())


def judge(image: Tensor, colour: int, task: Task) -> Verdict:
    """`colour` is the seen one; without a colour in the prompt the emoji is looked for on it."""
    where = (colour if task.colour < 0 else task.colour, task.request.size)
    seen = image.flatten()
    errors = (_lengths(*where) - 2 * (renderings(*where) @ seen) + seen @ seen).clamp(min=0) / seen.numel()
    nearest = errors.unflatten(0, (len(EMOJI), len(PLACES))).min(1).values.sqrt()
    others = torch.cat([nearest[: task.emoji], nearest[task.emoji + 1 :]])
    rmse = float(nearest[task.emoji])
    return Verdict(int(nearest.argmin()), colour, rmse, float(others.min()) - rmse)


@dataclass(frozen=True)
class Score:
    """Shares of a set of images that are right, their mean RMSE and their mean margin."""

    count: int
    emoji: float
    colour: float
    both: float
    rmse: float
    margin: float


def score(source: Source, tasks: Sequence[Task]) -> Score:
    return score_images(source.generate([task.request for task in tasks]), tasks)


def score_images(images: Sequence[Image.Image], tasks: Sequence[Task]) -> Score:
    seen_ones = [(values, seen_colour(values), task) for values, task in zip(map(pixels, images), tasks, strict=True)]
    seen_ones.sort(key=lambda one: one[1] if one[2].colour < 0 else one[2].colour)
    verdicts = [(judge(*one), one[2]) for one in seen_ones]
    emoji = [seen.emoji == task.emoji for seen, task in verdicts]
    colour = [task.colour in (-1, seen.colour) for seen, task in verdicts]
    both = [a and b for a, b in zip(emoji, colour, strict=True)]
    rmse, margin = ([getattr(seen, name) for seen, _ in verdicts] for name in ("rmse", "margin"))
    return Score(len(tasks), *(float(np.mean(values)) for values in (emoji, colour, both, rmse, margin)))


# What is asked


def random_tasks(count: int, seed: int) -> list[Task]:
    """Any emoji on any colour, in the words of training."""
    random = Random(seed)
    tasks = []
    for index in range(count):
        emoji, colour = random.randrange(len(EMOJI)), random.randrange(len(COLOUR_NAMES))
        tasks.append(Task(Request(caption(random, EMOJI[emoji].names, COLOUR_NAMES[colour]), index), emoji, colour))
    return tasks


def held_out_tasks(count: int, seed: int) -> list[Task]:
    """Emoji on the one colour that training never showed them on."""
    random = Random(seed)
    chosen = random.sample(range(len(EMOJI)), count)
    prompts = [(one, held_out_colour(one)) for one in chosen]
    return [
        Task(Request(plain_caption(EMOJI[emoji].name, COLOUR_NAMES[colour]), index), emoji, colour)
        for index, (emoji, colour) in enumerate(prompts)
    ]


def unseen_tasks(count: int, seed: int) -> list[Task]:
    """Captions worded as none of training."""
    random = Random(seed)
    tasks = []
    for index in range(count):
        emoji, colour = random.randrange(len(EMOJI)), random.randrange(len(COLOUR_NAMES))
        prompt = unseen_caption(random, EMOJI[emoji].name, COLOUR_NAMES[colour])
        tasks.append(Task(Request(prompt, index), emoji, colour))
    return tasks


def colourless_tasks(count: int, seed: int) -> list[Task]:
    random = Random(seed)
    chosen = [random.randrange(len(EMOJI)) for _ in range(count)]
    return [Task(Request(EMOJI[emoji].name, index), emoji, -1) for index, emoji in enumerate(chosen)]


def with_settings(tasks: Sequence[Task], **changes: Any) -> list[Task]:
    return [replace(task, request=replace(task.request, **changes)) for task in tasks]


# The measurements


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    score: Score

    def __str__(self) -> str:
        s = self.score
        shares = " | ".join(f"{share:.1%}" for share in (s.emoji, s.colour, s.both))
        return f"| {self.what} | {s.count} | {shares} | {s.rmse:.3f} | {s.margin:.3f} |"


HEADER = "| measured | images | emoji right | colour right | both | RMSE | margin |\n|---|---|---|---|---|---|---|"


def quality_rows(source: Source, count: int) -> list[Row]:
    few = max(1, count // 4)
    return [
        Row("random prompts", score(source, random_tasks(count, 1))),
        Row("pairs never trained", score(source, held_out_tasks(min(few, len(EMOJI)), 2))),
        Row("wordings never trained", score(source, unseen_tasks(few, 3))),
        Row("no colour named", score(source, colourless_tasks(few, 4))),
    ]


# The same prompts under other settings. Guidance is what the model's pipeline calls so: the flow model's is one less.
VARIATIONS: dict[str, dict[str, Any]] = {
    "guidance 1": {"guidance": 1.0},
    "the defaults": {},
    "guidance 1.5": {"guidance": 1.5},
    "guidance 3": {"guidance": 3.0},
    "guidance 5": {"guidance": 5.0},
    "20 steps, own scheduler": {"steps": 20},
    "4 steps, own scheduler": {"steps": 4},
    "4 steps, dpmpp_2m": {"steps": 4, "scheduler": "dpmpp_2m"},
    "8 steps, dpmpp_2m": {"steps": 8, "scheduler": "dpmpp_2m"},
    "20 steps, euler": {"steps": 20, "scheduler": "euler"},
    "size 56×56": {"size": (56, 56)},
    "size 80×80": {"size": (80, 80)},
    "size 96×96": {"size": (96, 96)},
    "size 96×64": {"size": (96, 64)},
}
FLOW_VARIATIONS: dict[str, dict[str, Any]] = {
    "guidance 0": {"guidance": 0.0},
    "the defaults": {},
    "guidance 0.5": {"guidance": 0.5},
    "guidance 2": {"guidance": 2.0},
    "guidance 4": {"guidance": 4.0},
    "20 steps": {"steps": 20},
    "6 steps": {"steps": 6},
    "4 steps": {"steps": 4},
}


def variation_rows(source: Source, count: int, variations: Mapping[str, dict[str, Any]]) -> list[Row]:
    tasks = random_tasks(count, 5)
    return [Row(name, score(source, with_settings(tasks, **changes))) for name, changes in variations.items()]


def negative_prompt_line(source: Source, count: int) -> str:
    kept = colours_kept(source, colourless_tasks(count, 6))
    return f"Named in the negative prompt, a background keeps the colour it had in {kept:.0%} of {count} images."


def colours_kept(source: Source, tasks: Sequence[Task]) -> float:
    """How often a background keeps its colour, same prompt and seed, when that colour becomes the negative prompt."""
    colours = [seen_colour(pixels(image)) for image in source.generate([task.request for task in tasks])]
    negatives = [
        replace(task.request, negative_prompt=f"{COLOUR_NAMES[colour]} background")
        for task, colour in zip(tasks, colours, strict=True)
    ]
    after = [seen_colour(pixels(image)) for image in source.generate(negatives)]
    return float(np.mean([a == b for a, b in zip(colours, after, strict=True)]))


def seed_line(source: Source) -> str:
    """The same seed twice, and another one."""
    one = Request("a rocket on a yellow background", 7)
    first, again, other = source.generate([one]) + source.generate([one]) + source.generate([replace(one, seed=8)])
    same = "yes" if first.tobytes() == again.tobytes() else "NO"
    different = "yes" if first.tobytes() != other.tobytes() else "NO"
    return f"Same seed, same bytes: {same}. Another seed, another image: {different}."


def speed_line(source: Source, count: int = 10) -> str:
    start = time.perf_counter()
    for seed in range(count):
        source.generate([Request("a rocket on a yellow background", seed)])
    return f"One image at the default settings, alone: {(time.perf_counter() - start) / count:.2f} s."


# The contact sheet


def sheet_requests() -> list[Request]:
    """Sixty-four prompts over the whole list, every colour eight times."""
    chosen = [round(index * (len(EMOJI) - 1) / 63) for index in range(64)]
    colours = [COLOUR_NAMES[(index + index // 8) % 8] for index in range(64)]
    return [
        Request(plain_caption(EMOJI[one].name, colour), seed)
        for seed, (one, colour) in enumerate(zip(chosen, colours, strict=True))
    ]


def contact_sheet(images: Sequence[Image.Image], lines: Sequence[str]) -> Image.Image:
    rows = -(-len(images) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_CELL, rows * (SHEET_CELL + SHEET_LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for index, (image, line) in enumerate(zip(images, lines, strict=True)):
        left, top = index % SHEET_COLUMNS * SHEET_CELL, index // SHEET_COLUMNS * (SHEET_CELL + SHEET_LINE)
        sheet.paste(image.resize((SHEET_CELL - 4, SHEET_CELL - 4), Image.Resampling.BICUBIC), (left + 2, top + 2))
        draw.text((left + SHEET_CELL // 2, top + SHEET_CELL), line[:22], "black", font, anchor="mt")
    return sheet


def save_sheet(source: Source, file: Path) -> None:
    requests = sheet_requests()
    lines = [re.sub(" on an? ", ", ", request.prompt).removesuffix(" background") for request in requests]
    coarse = [level & 0xF8 | 4 for level in range(256)] * 3  # five bits a channel: half the bytes, nothing to be seen
    contact_sheet(source.generate(requests), lines).point(coarse).save(file, optimize=True)


@click.command(help=__doc__)
@click.option("--checkpoint", type=click.Path(path_type=Path), default=HERE / "checkpoint", help="A diffusers folder.")
@click.option("--flow", is_flag=True, help="Vary the settings that the flow model has.")
@click.option("--url", help="Base URL of a running server, in place of the checkpoint.")
@click.option("--key", envvar="HYPERGEN_API_KEY", help="The server's API key.")
@click.option("--count", default=400, show_default=True, help="Random prompts; the other sets are a quarter of it.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet here.")
@click.option("--only-sheet", is_flag=True, help="Measure nothing.")
def main(**options: Any) -> None:
    source: Source = Server(options["url"], options["key"]) if options["url"] else Checkpoint(options["checkpoint"])
    if options["sheet"]:
        save_sheet(source, options["sheet"])
    if not options["only_sheet"]:
        report(source, options["count"], FLOW_VARIATIONS if options["flow"] else VARIATIONS)


def report(source: Source, count: int, variations: Mapping[str, dict[str, Any]]) -> None:
    click.echo(HEADER)
    for row in quality_rows(source, count):
        click.echo(str(row))
    for row in variation_rows(source, max(1, count // 8), variations):
        click.echo(str(row))
    click.echo("\n" + negative_prompt_line(source, max(1, count // 8)))
    click.echo(seed_line(source))
    click.echo(speed_line(source))


if __name__ == "__main__":
    main()
