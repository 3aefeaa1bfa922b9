"""Trains the checkpoint that ships with the project, from nothing, on two CPU cores: one command, five stages.

    nice -n 19 python export/emoji/train.py

The VAE; the latents of every picture of the world; the text encoder taught by itself to tell emoji and colour from a
caption (learnt through the UNet alone it is slow); UNet and text encoder together (latent diffusion with
v-prediction); the VAE's decoder alone, once more. Every stage keeps its state in the working folder and goes on from
it when started again. What a step sees depends on the seed and the step's number alone, so a run that was interrupted
equals one that was not.

Each core is a process of one thread with its share of every batch, and gradients are averaged between them: where
other programs take some of the cores, threads that wait for each other at every operation are several times slower.
"""

from __future__ import annotations

import copy
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from tqdm import tqdm

from captions import caption
from models import (
    POSITIONS,
    TEXT_WIDTH,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    pipeline_of,
    read_tokenizer,
    save_checkpoint,
    tokenize,
    write_tokenizer,
)
from stage import Plan, Stage, random_of, share
from world import COLOUR_NAMES, NATIVE_SIDE, PLACEMENTS, colour_table, compose, cutouts, emoji_list, held_out_colour

EMOJI = emoji_list()
# Sizes beside the native one, width and height, so that they do not break; a step in six is at one of them.
OTHER_SIZES = ((56, 56), (72, 72), (80, 80), (64, 96), (96, 64), (96, 96))
OTHER_SIZE_EVERY = 6
CAPTION_DROPPED, COLOUR_UNSAID, EMOJI_UNSAID = 0.10, 0.15, 0.03
KL_WEIGHT = 1e-3
NOISY_TIMESTEPS = 0.6  # the exponent of uniform numbers; 1 would take all timesteps alike
MIDDLE = 13  # of the placements: the larger emoji, not shifted


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    folder: Path
    seed: int
    vae_steps: int
    text_steps: int
    joint_steps: int
    decoder_steps: int
    processes: int


@dataclass(frozen=True)
class Choice:
    """Of each picture of a batch: the emoji, the placement and the colour (indices)."""

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


def size_of(step: int) -> tuple[int, int]:
    """Width and height of a step's pictures: the native size, and every so often one of the others in turn."""
    if step % OTHER_SIZE_EVERY != OTHER_SIZE_EVERY - 1:
        return NATIVE_SIDE, NATIVE_SIDE
    return OTHER_SIZES[step // OTHER_SIZE_EVERY % len(OTHER_SIZES)]


def cutouts_of_all_sizes() -> dict[tuple[int, int], Tensor]:
    """All emoji: everywhere at the native size, at the others in the middle and at one of the two scales."""
    middle = PLACEMENTS[MIDDLE : MIDDLE + 1]
    others = {size: cutouts(EMOJI, middle, size) for size in OTHER_SIZES}
    return {(NATIVE_SIDE, NATIVE_SIDE): cutouts(EMOJI)} | others


# Stage 1: the VAE


def train_vae(folder: Path, plan: Plan, options: Options) -> nn.Module:
    vae = build_vae().to(memory_format=torch.channels_last)
    stage = Stage(folder, plan, nn.ModuleDict({"vae": vae}))
    cuts = cutouts_of_all_sizes()

    def loss_of(step: int) -> Tensor:
        of_size = cuts[size_of(step)]
        picks = choose(random_of(plan, options.seed, step), share(plan), of_size.shape[1])
        pictures = compose(of_size[picks.emoji, picks.placement], colour_table()[picks.colour]) * 2 - 1
        return vae_loss(vae, pictures.contiguous(memory_format=torch.channels_last))

    return stage.run(loss_of)["vae"]


def vae_loss(vae: Any, pictures: Tensor) -> Tensor:
    """Squared error, some absolute error for the edges, and a real KL, without which latents diffuse badly."""
    posterior = vae.encode(pictures).latent_dist
    restored = vae.decode(posterior.sample()).sample
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    loss: Tensor = restoration_loss(restored - pictures) + KL_WEIGHT * divergence
    return loss


def restoration_loss(error: Tensor) -> Tensor:
    return error.square().mean() + 0.1 * error.abs().mean()


# Stage 2: latents


@dataclass(frozen=True)
class Latents:
    """Posterior mean and deviation, scaled to unit variance: bfloat16 [emoji, placements, colours, 2, C, H/8, W/8]."""

    by_size: dict[tuple[int, int], Tensor]
    scaling_factor: float

    def sample(self, size: tuple[int, int], picks: Choice) -> Tensor:
        chosen = self.by_size[size][picks.emoji, picks.placement, picks.colour].float()
        return chosen[:, 0] + chosen[:, 1] * torch.randn_like(chosen[:, 1])


def encode_world(folder: Path, vae: Any) -> Latents:
    file = folder / "latents.pt"
    if not file.exists():
        raw = {size: _encode(vae, cuts) for size, cuts in cutouts_of_all_sizes().items()}
        factor = 1 / float(raw[NATIVE_SIDE, NATIVE_SIDE][:, :, :, 0].float().std())
        by_size = {size: (value.float() * factor).bfloat16() for size, value in raw.items()}
        if dist.get_rank() == 0:
            torch.save({"by_size": by_size, "scaling_factor": factor}, file)
    dist.barrier()
    return Latents(**torch.load(file, weights_only=True))


def _encode(vae: Any, cuts: Tensor) -> Tensor:
    """Every process encodes its share of the emoji; all of them get the whole."""
    shares = [cuts[rank :: dist.get_world_size()] for rank in range(dist.get_world_size())]
    mine = _encode_share(vae, shares[dist.get_rank()])
    sent = [torch.empty(len(one), *mine.shape[1:]) for one in shares]
    dist.all_gather(sent, mine)
    whole = torch.empty(len(cuts), *mine.shape[1:])
    for rank, one in enumerate(sent):
        whole[rank :: dist.get_world_size()] = one
    return whole.bfloat16()


@torch.no_grad()
def _encode_share(vae: Any, cuts: Tensor) -> Tensor:
    colours = colour_table()
    rows = []
    name = f"latents {cuts.shape[-1]}×{cuts.shape[-2]}"
    for row in tqdm(cuts, desc=name, mininterval=5, disable=dist.get_rank() != 0):
        pictures = compose(row.repeat_interleave(len(colours), 0), colours.repeat(len(row), 1)) * 2 - 1
        posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        both = torch.stack([posterior.mean, posterior.std], dim=1).float().contiguous()
        rows.append(both.unflatten(0, (len(row), len(colours))))
    return torch.stack(rows)


# Stage 3: the text encoder by itself


def teach_text_encoder(folder: Path, plan: Plan, options: Options, tokenizer: Any) -> nn.Module:
    """Emoji and colour must be told from the mean of its states and from any one that saw the whole caption."""
    modules = nn.ModuleDict(
        {
            "text_encoder": build_text_encoder(tokenizer),
            "emoji": nn.Linear(TEXT_WIDTH, len(EMOJI)),
            "colour": nn.Linear(TEXT_WIDTH, len(COLOUR_NAMES) + 1),
        }
    )
    stage = Stage(folder, plan, modules)

    def loss_of(step: int) -> Tensor:
        random = random_of(plan, options.seed, step)
        return text_loss(modules, tokenizer, random, share(plan))

    return stage.run(loss_of)["text_encoder"]


def text_loss(modules: nn.ModuleDict, tokenizer: Any, random: Random, count: int) -> Tensor:
    emoji = [random.randrange(len(EMOJI)) for _ in range(count)]
    colours = [random.randrange(len(COLOUR_NAMES) + 1) for _ in range(count)]
    said = [*COLOUR_NAMES, ""]
    texts = [caption(random, EMOJI[e].names, said[c]) for e, c in zip(emoji, colours, strict=True)]
    ids = tokenize(tokenizer, texts)
    states = modules["text_encoder"](ids)[0]
    end = (ids == tokenizer.eos_token_id).int().argmax(1)
    late = end + (torch.rand(count) * (POSITIONS - end)).long()
    loss = torch.zeros(())
    for seen in (states.mean(1), states[torch.arange(count), late]):
        loss = loss + functional.cross_entropy(modules["emoji"](seen), torch.tensor(emoji))
        loss = loss + functional.cross_entropy(modules["colour"](seen), torch.tensor(colours))
    return loss


# Stage 4: UNet and text encoder together


@dataclass(frozen=True)
class Parts:
    """What the joint stage builds on."""

    vae: Any
    tokenizer: Any
    text_encoder: Any
    latents: Latents


def train_jointly(folder: Path, plan: Plan, options: Options, parts: Parts) -> nn.ModuleDict:
    unet = build_unet().to(memory_format=torch.channels_last)
    modules = nn.ModuleDict({"unet": unet, "text_encoder": copy.deepcopy(parts.text_encoder)})
    modules.requires_grad_(True).train()
    stage = Stage(folder, plan, modules)

    def loss_of(step: int) -> Tensor:
        random = random_of(plan, options.seed, step)
        size = size_of(step)
        picks = choose(random, share(plan), parts.latents.by_size[size].shape[1])
        texts = captions_of(random, picks)
        return diffusion_loss(modules, parts, texts, parts.latents.sample(size, picks))

    return stage.run(loss_of, lambda: write(folder, parts, stage.averages))


def diffusion_loss(modules: nn.ModuleDict, parts: Parts, texts: list[str], latents: Tensor) -> Tensor:
    """Mean squared error of v at stratified timesteps, more of them noisy ones: there it is decided what is drawn."""
    count = len(latents)
    scheduler = build_scheduler()
    timesteps = (((torch.arange(count) + torch.rand(count)) / count) ** NOISY_TIMESTEPS * 1000).long()
    noise = torch.randn_like(latents)
    noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    target = scheduler.get_velocity(latents, noise, timesteps)
    states = modules["text_encoder"](tokenize(parts.tokenizer, texts))[0]
    output = modules["unet"](noisy, timesteps, states, return_dict=False)[0]
    return functional.mse_loss(output, target)


# Stage 5: the decoder alone


def sharpen_decoder(folder: Path, plan: Plan, seed: int, parts: Parts) -> Any:
    """The latents stay what the UNet learnt; sharpness is the decoder's alone, and half as dear to train."""
    vae = copy.deepcopy(parts.vae).to(memory_format=torch.channels_last)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    stage = Stage(folder, plan, decoder.requires_grad_(True))
    cuts = cutouts(EMOJI)

    def loss_of(step: int) -> Tensor:
        picks = choose(random_of(plan, seed, step), share(plan), len(PLACEMENTS))
        pictures = compose(cuts[picks.emoji, picks.placement], colour_table()[picks.colour]) * 2 - 1
        latents = parts.latents.sample((NATIVE_SIDE, NATIVE_SIDE), picks) / parts.latents.scaling_factor
        restored = vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample
        return restoration_loss(restored - pictures)

    averages: Any = stage.run(loss_of)
    vae.decoder, vae.post_quant_conv = averages["decoder"], averages["post_quant_conv"]
    return vae


def write(folder: Path, parts: Parts, averages: Any) -> None:
    """Writes the averaged model in the shipped layout."""
    unet, text_encoder, vae = (copy.deepcopy(one) for one in (averages["unet"], averages["text_encoder"], parts.vae))
    vae.register_to_config(scaling_factor=parts.latents.scaling_factor, force_upcast=False)
    save_checkpoint(pipeline_of(vae, text_encoder, parts.tokenizer, unet), folder / "tokenizer", folder / "checkpoint")


def learn(rank: int, options: Options) -> None:
    """All stages that are not done, in one of the processes."""
    torch.set_num_threads(1)
    meeting = f"file://{(options.folder / 'meeting').absolute()}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.processes)
    folder, seed = options.folder, options.seed
    if rank == 0 and not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer", seed)
    dist.barrier()
    tokenizer = read_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    vae = train_vae(folder, Plan("vae", options.vae_steps, 0.02, 1.5e-3, 8, average=0.995), options)
    latents = encode_world(folder, vae)
    torch.manual_seed(seed)
    plan = Plan("text_encoder", options.text_steps, 0.02, 1e-3, 256, 20, 0.98)
    parts = Parts(vae, tokenizer, teach_text_encoder(folder, plan, options, tokenizer), latents)
    torch.manual_seed(seed)
    averages = train_jointly(folder, Plan("joint", options.joint_steps, 0.02, 1.2e-3, 64), options, parts)
    decoder = sharpen_decoder(
        folder, Plan("decoder", options.decoder_steps, 0.02, 1.5e-3, 8, average=0.995), seed, parts
    )
    if rank == 0:
        write(folder, replace(parts, vae=decoder), averages)
    dist.destroy_process_group()


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/emoji"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--vae-steps", type=int, default=2600, show_default=True)
@click.option("--text-steps", type=int, default=300, show_default=True)
@click.option("--joint-steps", type=int, default=1800, show_default=True)
@click.option("--decoder-steps", type=int, default=600, show_default=True)
@click.option("--processes", type=int, default=2, show_default=True, help="One for each core.")
def main(**chosen: Any) -> None:
    options = Options(**chosen)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "meeting").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes end with this one
    spawn(learn, (options,), nprocs=options.processes, daemon=True)


if __name__ == "__main__":
    main()
