"""Trains the flow model on one CPU core: one command, four stages.

    PYTHONPATH=export/emoji nice -n 19 python -m emoji_flow.train

The latents of every image of the world, from the VAE of export/emoji; the text encoder taught by itself to tell emoji
and colour from a caption; transformer and text encoder together (flow matching); the VAE's decoder alone, on what that
transformer generates. Every stage keeps its state in the working folder and goes on from it when started again, with
as many steps as are then asked for.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from captions import FILLERS, caption, plain_caption
from dataset import EMOJI, NATIVE, Choice, captions_of, choose, cutouts_of, encode_all, of_all_emoji, size_of
from emoji_flow.models import (
    DEFAULTS,
    TEXT_WIDTH,
    TOKENS,
    build_scheduler,
    build_text_encoder,
    build_transformer,
    denoise,
    pipeline_of,
    read_tokenizer,
    save_checkpoint,
    states_of,
    tokenize,
    write_tokenizer,
)
from models import build_vae
from stage import Plan, Stage, random_of
from train import RESAMPLING_STEPS, SAMPLES, mixed, restoration_loss, without_slips
from world import COLOUR_NAMES, PLACEMENTS, colour_table, compose

SHIPPED_VAE = Path(__file__).parents[1] / "emoji" / "checkpoint" / "vae"
# Sizes beside the native one, width and height, so that they do not break; a step in six is at one of them.
OTHER_SIZES = ((80, 80), (64, 96), (96, 64), (96, 96))
LONG_EVERY = 16  # one step in so many has captions of twice the usual length
CAPITALIZED = 0.15
TIME_SHIFT = 6.0  # above 1, more of the noisy times, where it is decided what the image shows


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    folder: Path
    seed: int
    text_steps: int
    joint_steps: int
    decoder_steps: int
    bfloat16: bool

    def precision(self) -> torch.autocast:
        """What a stage computes its images in; weights and their steps stay in single precision."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)


@dataclass(frozen=True)
class Latents:
    """Posterior means, normalised as the pipeline does it: bfloat16 [emoji, placements, colours, C, H/8, W/8]."""

    by_size: dict[tuple[int, int], Tensor]
    shift: float
    scale: float

    def of(self, size: tuple[int, int], picks: Choice) -> Tensor:
        return self.by_size[size][picks.emoji, picks.placement, picks.colour].float()


def shipped_vae() -> AutoencoderKL:
    """Of its own, for what is loaded writes down where it came from."""
    vae = build_vae()
    vae.load_state_dict(AutoencoderKL.from_pretrained(SHIPPED_VAE, torch_dtype=torch.float32).state_dict())
    return vae.requires_grad_(False)


def encode_world(folder: Path) -> Latents:
    file = folder / "latents.pt"
    if not file.exists():
        vae = shipped_vae().to(memory_format=torch.channels_last)
        raw = {size: encode_all(vae, cuts)[:, :, :, 0].float() for size, cuts in cutouts_of(OTHER_SIZES).items()}
        native = next(iter(raw.values()))
        shift, scale = float(native.mean()), 1 / float(native.std())
        by_size = {size: ((values - shift) * scale).bfloat16() for size, values in raw.items()}
        torch.save({"by_size": by_size, "shift": shift, "scale": scale}, file)
    return Latents(**torch.load(file, weights_only=True))


def teach_text_encoder(options: Options, tokenizer: Any) -> nn.Module:
    """Emoji and colour must be told from the mean of its states and from any one that saw the whole caption."""
    modules = nn.ModuleDict(
        {
            "text_encoder": build_text_encoder(len(tokenizer)),
            "emoji": nn.Linear(TEXT_WIDTH, len(EMOJI)),
            "colour": nn.Linear(TEXT_WIDTH, len(COLOUR_NAMES) + 1),
        }
    )
    plan = Plan("text_encoder", options.text_steps, 0.02, 1e-3, 256, 20, 0.98)
    stage = Stage(options.folder, plan, modules)
    after = len(tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n"))

    def loss_of(step: int) -> Tensor:
        return text_loss(modules, tokenizer, after, random_of(plan, options.seed, step), plan.batch)

    return stage.run(loss_of)["text_encoder"]


def text_loss(modules: nn.ModuleDict, tokenizer: Any, after: int, random: Random, count: int) -> Tensor:
    """Cross-entropy; `after` is the number of the template's tokens after the caption."""
    emoji = [random.randrange(len(EMOJI)) for _ in range(count)]
    colours = [random.randrange(len(COLOUR_NAMES) + 1) for _ in range(count)]
    said = [*COLOUR_NAMES, ""]
    texts = [caption(random, EMOJI[e].names, said[c]) for e, c in zip(emoji, colours, strict=True)]
    ids, mask = tokenize(tokenizer, [capitalized(random, text) for text in texts], TOKENS)
    states = states_of(modules["text_encoder"], ids, mask)
    lengths = mask.sum(1)
    late = lengths - 1 - (torch.rand(count) * after).long()
    mean = (states * mask[..., None]).sum(1) / lengths[:, None]
    loss = torch.zeros(())
    for seen in (mean, states[torch.arange(count), late]):
        loss = loss + functional.cross_entropy(modules["emoji"](seen), torch.tensor(emoji))
        loss = loss + functional.cross_entropy(modules["colour"](seen), torch.tensor(colours))
    return loss


def capitalized(random: Random, text: str) -> str:
    """Now and then the first letter is a capital, as people write."""
    return text[:1].upper() + text[1:] if random.random() < CAPITALIZED else text


def lengthened(random: Random, text: str) -> str:
    """The caption among so many meaningless words that it takes a second block of tokens."""
    words = random.choices(FILLERS, k=random.randint(24, 36))
    before = random.randint(0, len(words))
    return " ".join([*words[:before], text, *words[before:]])


def train_jointly(options: Options, latents: Latents, text_encoder: nn.Module, tokenizer: Any) -> nn.ModuleDict:
    torch.manual_seed(options.seed)
    modules = nn.ModuleDict({"transformer": build_transformer(), "text_encoder": copy.deepcopy(text_encoder)})
    modules.requires_grad_(True).train()
    plan = Plan("joint", options.joint_steps, 0.02, 1.2e-3, 64, save_steps=100)
    stage = Stage(options.folder, plan, modules)
    transformer: Any = modules["transformer"]
    for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
        block.compile(dynamic=True)  # three quarters of the time, the same gradients

    def loss_of(step: int) -> Tensor:
        random = random_of(plan, options.seed, step)
        size = size_of(step, OTHER_SIZES)
        picks = choose(random, plan.batch, latents.by_size[size].shape[1])
        texts = [capitalized(random, text) for text in captions_of(random, picks)]
        long = step % LONG_EVERY == LONG_EVERY - 1
        if long:
            texts = [lengthened(random, text) for text in texts]
        ids, mask = tokenize(tokenizer, texts, 2 * TOKENS if long else TOKENS)
        with options.precision():
            states = states_of(modules["text_encoder"], ids, mask)
            return flow_loss(transformer, latents.of(size, picks), states, mask)

    return stage.run(loss_of, lambda: write(options.folder, shipped_vae(), stage.averages, latents, tokenizer))


def flow_loss(transformer: nn.Module, latents: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the way from noise to latents, at stratified times, more of them noisy ones."""
    count = len(latents)
    even = (torch.randperm(count) + torch.rand(count)) / count
    share = TIME_SHIFT * even / (1 + (TIME_SHIFT - 1) * even)
    noise = torch.randn_like(latents)
    noisy = torch.lerp(latents, noise, share[:, None, None, None])
    return functional.mse_loss(denoise(transformer, noisy, 1 - share, states, mask).float(), latents - noise)


@torch.no_grad()
def sample_world(options: Options, latents: Latents, modules: Any, tokenizer: Any) -> Tensor:
    """bfloat16 [emoji, samples, placements, colours, C, H/8, W/8]: what the transformer makes of every image's latents
    under so much noise that of the two placements theirs can just be told."""
    file = options.folder / "sampled.pt"
    true = latents.by_size[NATIVE]

    def sample_emoji(emoji: int) -> Tensor:
        torch.manual_seed(options.seed + emoji)
        captions = [plain_caption(EMOJI[emoji].name, colour) for colour in COLOUR_NAMES] * (SAMPLES * len(PLACEMENTS))
        own = true[emoji].float().expand(SAMPLES, -1, -1, -1, -1, -1)
        with options.precision():
            ids, mask = tokenize(tokenizer, captions + [""] * len(captions), TOKENS)
            states = states_of(modules["text_encoder"], ids, mask)
            return resample(modules["transformer"], own.flatten(0, 2), states, mask).view_as(own)

    if not file.exists():
        torch.save(of_all_emoji(sample_emoji, "sampled latents"), file)
    return without_slips(torch.load(file, weights_only=True), true)


def resample(transformer: Any, latents: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The latents [N, …] after noise and the few steps that take it away again, with the stored guidance.

    `states` and `mask` [2 * N, …] are of the captions, then of as many empty ones.
    """
    scheduler = build_scheduler()
    scheduler.set_timesteps(RESAMPLING_STEPS)
    scheduler.set_begin_index(1)
    timesteps = scheduler.timesteps[1:]
    latents = scheduler.scale_noise(latents, timesteps[:1], torch.randn_like(latents))
    for timestep in timesteps:
        time = (1 - timestep / 1000).expand(len(mask))
        towards, without = denoise(transformer, latents.repeat(2, 1, 1, 1), time, states, mask).float().chunk(2)
        guided = towards + DEFAULTS["guidance_scale"] * (towards - without)
        latents = scheduler.step(-guided, timestep, latents).prev_sample
    return latents


def sharpen_decoder(options: Options, latents: Latents, sampled: Tensor) -> AutoencoderKL:
    """The decoder learns to see the true image in the transformer's results, and still in what the encoder gives."""
    vae: Any = shipped_vae().to(memory_format=torch.channels_last)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    plan = Plan("decoder", options.decoder_steps, 0.01, 0.75e-3, 8, average=0.995)
    stage = Stage(options.folder, plan, decoder.requires_grad_(True))
    cuts = cutouts_of(OTHER_SIZES)

    def loss_of(step: int) -> Tensor:
        size = size_of(step, OTHER_SIZES)
        picks = choose(random_of(plan, options.seed, step), plan.batch, cuts[size].shape[1])
        images = compose(cuts[size][picks.emoji, picks.placement], colour_table()[picks.colour]) * 2 - 1
        given = latents.of(size, picks)
        if size == NATIVE:
            given = mixed(given, sampled, picks)
        given = (given / latents.scale + latents.shift).contiguous(memory_format=torch.channels_last)
        with options.precision():
            return restoration_loss(vae.decode(given).sample - images)

    averages: Any = stage.run(loss_of)
    vae.decoder, vae.post_quant_conv = averages["decoder"], averages["post_quant_conv"]
    return vae


def write(folder: Path, vae: AutoencoderKL, averages: nn.ModuleDict, latents: Latents, tokenizer: Any) -> None:
    """Writes the averaged model in the layout of diffusers."""
    parts: Any = copy.deepcopy(averages)
    vae.register_to_config(scaling_factor=latents.scale, shift_factor=latents.shift, force_upcast=False)
    pipeline = pipeline_of(vae, parts["text_encoder"], tokenizer, parts["transformer"])
    save_checkpoint(pipeline, folder / "tokenizer", folder / "checkpoint")


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/emoji_flow"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--text-steps", type=int, default=225, show_default=True)
@click.option("--joint-steps", type=int, default=4000, show_default=True)
@click.option("--decoder-steps", type=int, default=1200, show_default=True)
@click.option("--bfloat16", is_flag=True, help="Half the time on processors with AVX512_BF16 or AMX.")
def main(**chosen: Any) -> None:
    options = Options(**chosen)
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    meeting = (options.folder / "meeting").absolute()
    meeting.unlink(missing_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    learn(options)
    dist.destroy_process_group()


def learn(options: Options) -> None:
    """All stages that are not done."""
    folder = options.folder
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer", options.seed)
    tokenizer = read_tokenizer(folder / "tokenizer")
    torch.manual_seed(options.seed)
    text_encoder = teach_text_encoder(options, tokenizer)
    latents = encode_world(folder)
    modules = train_jointly(options, latents, text_encoder, tokenizer)
    vae = sharpen_decoder(options, latents, sample_world(options, latents, modules, tokenizer))
    write(folder, vae, modules, latents, tokenizer)


if __name__ == "__main__":
    main()
