"""Trains the checkpoint that ships with the project on CPU cores: one command, five stages.

    nice -n 19 python export/emoji/train.py                                                    from nothing
    nice -n 19 python export/emoji/train.py --start export/emoji/checkpoint --folder build/on  on from a checkpoint

The VAE; the latents of every image of the world; the text encoder taught by itself to tell emoji and colour from a
caption (learnt through the UNet alone it is slow); UNet and text encoder together (latent diffusion with
v-prediction); the VAE's decoder alone, on what that UNet generates. With a checkpoint to start from, its parts take the
place of the first and the third stage, and the others go on at half the pace. Every stage keeps its state in the
working folder and goes on from it when started again. What a step sees depends on the seed and the step's number alone,
so a run that was interrupted equals one that was not.

Each core is a process of one thread with its share of every batch, and gradients are averaged between them: where
other programs take some of the cores, threads that wait for each other at every operation are several times slower.
"""

from __future__ import annotations

import copy
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from captions import caption, plain_caption
from dataset import EMOJI, NATIVE, Choice, captions_of, choose, cutouts_of, encode_all, of_all_emoji, size_of
from models import (
    DEFAULTS,
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
from world import COLOUR_NAMES, PLACEMENTS, colour_table, compose

# Sizes beside the native one, width and height, so that they do not break; a step in six is at one of them.
OTHER_SIZES = ((56, 56), (72, 72), (80, 80), (64, 96), (96, 64), (96, 96))
KL_WEIGHT = 1e-3
# Samples of every image that the UNet makes for the decoder, and their steps (the first, from pure noise, is left out).
SAMPLES, RESAMPLING_STEPS = 2, 5
SAMPLED_SHARE = 0.75  # of the latents in the decoder's last stage; the others come from the encoder
NOISY_TIMESTEPS = 0.6  # the exponent of uniform numbers; 1 would take all timesteps alike


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    folder: Path
    start: Path | None
    seed: int
    vae_steps: int
    text_steps: int
    joint_steps: int
    decoder_steps: int
    processes: int
    bfloat16: bool

    def precision(self) -> torch.autocast:
        """What a stage computes its images in; weights and their steps stay in single precision."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)


# Stage 1: the VAE


def train_vae(folder: Path, plan: Plan, options: Options) -> nn.Module:
    vae = build_vae().to(memory_format=torch.channels_last)
    stage = Stage(folder, plan, nn.ModuleDict({"vae": vae}))
    cuts = cutouts_of(OTHER_SIZES)

    def loss_of(step: int) -> Tensor:
        of_size = cuts[size_of(step, OTHER_SIZES)]
        picks = choose(random_of(plan, options.seed, step), share(plan), of_size.shape[1])
        images = compose(of_size[picks.emoji, picks.placement], colour_table()[picks.colour]) * 2 - 1
        with options.precision():
            return vae_loss(vae, images.contiguous(memory_format=torch.channels_last))

    return stage.run(loss_of)["vae"]


def vae_loss(vae: Any, images: Tensor) -> Tensor:
    """Squared error, some absolute error for the edges, and a real KL, without which latents diffuse badly."""
    posterior = vae.encode(images).latent_dist
    restored = vae.decode(posterior.sample()).sample
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    loss: Tensor = restoration_loss(restored - images) + KL_WEIGHT * divergence
    return loss


def restoration_loss(error: Tensor) -> Tensor:
    return error.square().mean() + 0.1 * error.abs().mean()


# Stage 2: latents


@dataclass(frozen=True)
class Latents:
    """Posterior mean and deviation, scaled to unit variance: bfloat16 [emoji, placements, colours, 2, C, H/8, W/8]."""

    by_size: dict[tuple[int, int], Tensor]
    scaling_factor: float

    def mean(self, size: tuple[int, int], picks: Choice) -> Tensor:
        return self.by_size[size][picks.emoji, picks.placement, picks.colour, 0].float()

    def sample(self, size: tuple[int, int], picks: Choice) -> Tensor:
        chosen = self.by_size[size][picks.emoji, picks.placement, picks.colour].float()
        return chosen[:, 0] + chosen[:, 1] * torch.randn_like(chosen[:, 1])


def encode_world(folder: Path, vae: Any) -> Latents:
    file = folder / "latents.pt"
    if not file.exists():
        raw = {size: encode_all(vae, cuts) for size, cuts in cutouts_of(OTHER_SIZES).items()}
        factor = 1 / float(raw[NATIVE][:, :, :, 0].float().std())
        by_size = {size: (value.float() * factor).bfloat16() for size, value in raw.items()}
        if dist.get_rank() == 0:
            torch.save({"by_size": by_size, "scaling_factor": factor}, file)
    dist.barrier()
    return Latents(**torch.load(file, weights_only=True))


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
    unet: Any
    latents: Latents


def train_jointly(folder: Path, plan: Plan, options: Options, parts: Parts) -> Parts:
    unet = parts.unet.to(memory_format=torch.channels_last)
    modules = nn.ModuleDict({"unet": unet, "text_encoder": copy.deepcopy(parts.text_encoder)})
    modules.requires_grad_(True).train()
    stage = Stage(folder, plan, modules)

    def loss_of(step: int) -> Tensor:
        random = random_of(plan, options.seed, step)
        size = size_of(step, OTHER_SIZES)
        picks = choose(random, share(plan), parts.latents.by_size[size].shape[1])
        texts = captions_of(random, picks)
        with options.precision():
            return diffusion_loss(modules, parts, texts, parts.latents.mean(size, picks))

    def learnt() -> Parts:
        averages: Any = stage.averages
        return replace(parts, unet=averages["unet"], text_encoder=averages["text_encoder"])

    stage.run(loss_of, lambda: write(folder, learnt()))
    return learnt()


def diffusion_loss(modules: nn.ModuleDict, parts: Parts, texts: list[str], latents: Tensor) -> Tensor:
    """Mean squared error of v at stratified timesteps, more of them noisy ones: they decide what is generated."""
    count = len(latents)
    scheduler = build_scheduler()
    timesteps = (((torch.arange(count) + torch.rand(count)) / count) ** NOISY_TIMESTEPS * 1000).long()
    noise = torch.randn_like(latents)
    noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    target = scheduler.get_velocity(latents, noise, timesteps)
    states = modules["text_encoder"](tokenize(parts.tokenizer, texts))[0]
    output = modules["unet"](noisy, timesteps, states, return_dict=False)[0]
    return functional.mse_loss(output, target)


# Stage 5: what the UNet generates, and the decoder alone


@torch.no_grad()
def sample_world(folder: Path, options: Options, parts: Parts) -> Tensor:
    """bfloat16 [emoji, samples, placements, colours, C, H/8, W/8]: what the UNet makes of every image's latents under
    so much noise that of the two placements theirs can just be told."""
    file = folder / "sampled.pt"
    true = parts.latents.by_size[NATIVE][:, :, :, 0]

    def sample_emoji(emoji: int) -> Tensor:
        torch.manual_seed(options.seed + emoji)
        captions = [plain_caption(EMOJI[emoji].name, colour) for colour in COLOUR_NAMES]
        latents = true[emoji].float().expand(SAMPLES, -1, -1, -1, -1, -1)
        with options.precision():
            return resample(parts, latents.flatten(0, 2), captions * (SAMPLES * len(PLACEMENTS))).view_as(latents)

    if not file.exists():
        sampled = of_all_emoji(sample_emoji, "sampled latents")
        if dist.get_rank() == 0:
            torch.save(sampled, file)
    dist.barrier()
    return without_slips(torch.load(file, weights_only=True), true)


def without_slips(sampled: Tensor, true: Tensor) -> Tensor:
    """Samples [emoji, samples, placements, …] that came out in another placement give way to the true latents."""
    own = torch.arange(len(PLACEMENTS))[:, None]
    distances = torch.stack([(sampled - true[:, None, [other]]).square().mean((-3, -2, -1)) for other in own], dim=-1)
    slipped = distances.argmin(-1) != own
    return torch.where(slipped[..., None, None, None], true[:, None], sampled)


def resample(parts: Parts, latents: Tensor, captions: list[str]) -> Tensor:
    """The latents after noise and the few steps that take it away again, with the stored guidance."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(RESAMPLING_STEPS)
    timesteps = scheduler.timesteps[1:]
    states = parts.text_encoder(tokenize(parts.tokenizer, [""] * len(captions) + captions))[0]
    latents = scheduler.add_noise(latents, torch.randn_like(latents), timesteps[:1])
    for timestep in timesteps:
        without, towards = parts.unet(latents.repeat(2, 1, 1, 1), timestep, states, return_dict=False)[0].chunk(2)
        guided = without + DEFAULTS["guidance_scale"] * (towards - without)
        latents = scheduler.step(guided.float(), timestep, latents).prev_sample
    return latents


def sharpen_decoder(folder: Path, plan: Plan, options: Options, parts: Parts) -> Any:
    """The decoder learns to see the true image in what the UNet generates, and still in what the encoder gives."""
    sampled = sample_world(folder, options, parts)
    vae = copy.deepcopy(parts.vae).to(memory_format=torch.channels_last)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    stage = Stage(folder, plan, decoder.requires_grad_(True))
    cuts = cutouts_of(OTHER_SIZES)

    def loss_of(step: int) -> Tensor:
        size = size_of(step, OTHER_SIZES)
        picks = choose(random_of(plan, options.seed, step), share(plan), cuts[size].shape[1])
        images = compose(cuts[size][picks.emoji, picks.placement], colour_table()[picks.colour]) * 2 - 1
        latents = parts.latents.sample(size, picks)
        if size == NATIVE:
            latents = mixed(latents, sampled, picks)
        latents = (latents / parts.latents.scaling_factor).contiguous(memory_format=torch.channels_last)
        with options.precision():
            return restoration_loss(vae.decode(latents).sample - images)

    averages: Any = stage.run(loss_of)
    vae.decoder, vae.post_quant_conv = averages["decoder"], averages["post_quant_conv"]
    return vae


def mixed(encoded: Tensor, sampled: Tensor, picks: Choice) -> Tensor:
    """Most of the latents replaced by one of the UNet's samples of the same image."""
    count = len(encoded)
    resampled = sampled[picks.emoji, torch.randint(SAMPLES, (count,)), picks.placement, picks.colour].float()
    return torch.where(torch.rand(count, 1, 1, 1) < SAMPLED_SHARE, resampled, encoded)


def write(folder: Path, parts: Parts) -> None:
    """Writes the model in the shipped layout."""
    unet, text_encoder, vae = (copy.deepcopy(one) for one in (parts.unet, parts.text_encoder, parts.vae))
    vae.register_to_config(scaling_factor=parts.latents.scaling_factor, force_upcast=False)
    save_checkpoint(pipeline_of(vae, text_encoder, parts.tokenizer, unet), folder / "tokenizer", folder / "checkpoint")


def parts_of(start: Path, folder: Path) -> Parts:
    """Everything as an earlier run left it; only the world's latents are made anew."""
    earlier: Any = StableDiffusionPipeline.from_pretrained(start, safety_checker=None, torch_dtype=torch.float32)
    vae, unet = build_vae(), build_unet()  # of their own, for what is loaded writes down where it came from
    vae.load_state_dict(earlier.vae.state_dict())
    unet.load_state_dict(earlier.unet.state_dict())
    shutil.copytree(start / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    tokenizer = read_tokenizer(folder / "tokenizer")
    return Parts(vae, tokenizer, earlier.text_encoder, unet, encode_world(folder, vae))


def learn_parts(options: Options) -> Parts:
    """Stages 1 to 3, and a UNet that knows nothing yet."""
    folder, seed = options.folder, options.seed
    if dist.get_rank() == 0 and not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer", seed)
    dist.barrier()
    tokenizer = read_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    vae = train_vae(folder, Plan("vae", options.vae_steps, 0.02, 1.5e-3, 8, average=0.995), options)
    latents = encode_world(folder, vae)
    torch.manual_seed(seed)
    plan = Plan("text_encoder", options.text_steps, 0.02, 1e-3, 256, 20, 0.98)
    text_encoder = teach_text_encoder(folder, plan, options, tokenizer)
    torch.manual_seed(seed)
    return Parts(vae, tokenizer, text_encoder, build_unet(), latents)


def learn(rank: int, options: Options) -> None:
    """All stages that are not done, in one of the processes."""
    torch.set_num_threads(1)
    meeting = f"file://{(options.folder / 'meeting').absolute()}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.processes)
    folder = options.folder
    parts = parts_of(options.start, folder) if options.start else learn_parts(options)
    gentle = 0.5 if options.start else 1.0
    plan = Plan("joint", options.joint_steps, 0.02 * gentle, 1.2e-3 * gentle, 64)
    parts = train_jointly(folder, plan, options, parts)
    plan = Plan("decoder", options.decoder_steps, 0.02 * gentle, 1.5e-3 * gentle, 8, average=0.995)
    decoder = sharpen_decoder(folder, plan, options, parts)
    if rank == 0:
        write(folder, replace(parts, vae=decoder))
    dist.destroy_process_group()


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/emoji"), show_default=True)
@click.option("--start", type=click.Path(path_type=Path), help="A checkpoint to go on from.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--vae-steps", type=int, default=2600, show_default=True)
@click.option("--text-steps", type=int, default=300, show_default=True)
@click.option("--joint-steps", type=int, default=1800, show_default=True)
@click.option("--decoder-steps", type=int, default=4500, show_default=True)
@click.option("--processes", type=int, default=2, show_default=True, help="One for each core.")
@click.option("--bfloat16", is_flag=True, help="Faster on processors with AVX512_BF16 or AMX.")
def main(**chosen: Any) -> None:
    options = Options(**chosen)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "meeting").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes end with this one
    spawn(learn, (options,), nprocs=options.processes, daemon=True)


if __name__ == "__main__":
    main()
