"""What every training draws from: random images of the world, their captions, and the latents of all of them.

Knows the world, the captions and how a VAE encodes; knows nothing of what is trained on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from captions import caption
from world import COLOUR_NAMES, NATIVE_SIDE, PLACEMENTS, colour_table, compose, cutouts, emoji_list, held_out_colour

EMOJI = emoji_list()
NATIVE = (NATIVE_SIDE, NATIVE_SIDE)
OTHER_SIZE_EVERY = 6
CAPTION_DROPPED, COLOUR_UNSAID, EMOJI_UNSAID = 0.10, 0.15, 0.03


@dataclass(frozen=True)
class Choice:
    """Of each image of a batch: the emoji, the placement and the colour (indices)."""

    emoji: Tensor
    placement: Tensor
    colour: Tensor


def choose(random: Random, count: int, placements: int) -> Choice:
    """A batch without the pairs that are held out for measuring."""
    emoji = [random.randrange(len(EMOJI)) for _ in range(count)]
    free = [[c for c in range(len(COLOUR_NAMES)) if c != held_out_colour(one)] for one in emoji]
    colours = [random.choice(one) for one in free]
    places = [random.randrange(placements) for _ in range(count)]
    return Choice(torch.tensor(emoji), torch.tensor(places), torch.tensor(colours))


def captions_of(random: Random, picks: Choice) -> list[str]:
    return [_caption(random, *pair) for pair in zip(picks.emoji.tolist(), picks.colour.tolist(), strict=True)]


def _caption(random: Random, emoji: int, colour: int) -> str:
    drawn = random.random()
    if drawn < CAPTION_DROPPED:
        return ""
    if drawn < CAPTION_DROPPED + EMOJI_UNSAID:
        return caption(random, (), COLOUR_NAMES[colour])
    said = "" if drawn < CAPTION_DROPPED + EMOJI_UNSAID + COLOUR_UNSAID else COLOUR_NAMES[colour]
    return caption(random, EMOJI[emoji].names, said)


def size_of(step: int, others: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Width and height of a step's images: the native size, and every so often one of the others in turn."""
    if step % OTHER_SIZE_EVERY != OTHER_SIZE_EVERY - 1:
        return NATIVE
    return others[step // OTHER_SIZE_EVERY % len(others)]


def cutouts_of(others: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """All emoji: in every way at the native size, in the first way alone at the others."""
    return {NATIVE: cutouts(EMOJI)} | {size: cutouts(EMOJI, PLACEMENTS[:1], size) for size in others}


@torch.no_grad()
def encode_all(vae: Any, cuts: Tensor) -> Tensor:
    """bfloat16 [emoji, placements, colours, 2, C, H/8, W/8]: posterior mean and deviation of every image."""
    colours = colour_table()

    def encode_emoji(emoji: int) -> Tensor:
        row = cuts[emoji]
        images = compose(row.repeat_interleave(len(colours), 0), colours.repeat(len(row), 1)) * 2 - 1
        posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        both: Tensor = torch.stack([posterior.mean, posterior.std], dim=1).unflatten(0, (len(row), len(colours)))
        return both

    return of_all_emoji(encode_emoji, f"latents {cuts.shape[-1]}×{cuts.shape[-2]}")


def of_all_emoji(row_of: Callable[[int], Tensor], name: str) -> Tensor:
    """bfloat16 [emoji, …]: every process makes the rows of its share of the emoji; all of them get the whole."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine = tqdm(range(rank, len(EMOJI), processes), desc=name, mininterval=5, disable=rank > 0)
    sent: list[Any] = [None] * processes
    dist.all_gather_object(sent, torch.stack([row_of(emoji) for emoji in mine]).bfloat16().contiguous())
    whole: Tensor = torch.empty(len(EMOJI), *sent[0].shape[1:], dtype=torch.bfloat16)
    for sender, rows in enumerate(sent):
        whole[sender::processes] = rows
    return whole
