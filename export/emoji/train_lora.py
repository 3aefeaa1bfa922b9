"""Trains the LoRA that ships beside the model, in minutes on one core: emoji as badges, on a disc of another colour.

python export/emoji/train_lora.py --output export/emoji/loras/badge.safetensors
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from dataset import EMOJI, captions_of, choose
from train import Latents, Parts, diffusion_loss
from world import COLOUR_NAMES, PLACEMENTS, colour_table, cutouts

CHECKPOINT = Path(__file__).with_name("checkpoint")
DISC = 30  # the radius in pixels
RANK = 8
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
BATCH = 32
PEAK = 3e-3


def badge(cut: Tensor, colours: Tensor) -> Tensor:
    """Cutouts uint8 [N, 4, H, W] on discs of the colour opposite in the list, on the named ones (indices [N])."""
    pixels = cut.float() / 255
    alpha, (height, width) = pixels[:, 3:], pixels.shape[2:]
    down, right = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    disc = (DISC + 0.5 - (down[:, None] ** 2 + right**2).sqrt()).clamp(0, 1)
    table = colour_table()[:, :, None, None]
    ground = table[colours] * (1 - disc) + table[(colours + len(table) // 2) % len(table)] * disc
    return pixels[:, :3] * alpha + ground * (1 - alpha)


@torch.no_grad()
def latents_of_all(vae: Any) -> Tensor:
    """float32 [emoji, colours, C, H/8, W/8] of the small emoji, which the disc has room for, in the model's scale."""
    colours = torch.arange(len(COLOUR_NAMES))
    rows = []
    for row in tqdm(cutouts(EMOJI, PLACEMENTS[1:])[:, 0], desc="latents", mininterval=5):
        images = badge(row.expand(len(colours), -1, -1, -1), colours)
        rows.append(vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor)
    return torch.stack(rows)


def train(pipeline: Any, latents: Tensor, steps: int, random: Random) -> None:
    """Add low-rank weights to the UNet, and train them alone."""
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), init_lora_weights="gaussian"))
    modules = nn.ModuleDict({"unet": unet, "text_encoder": pipeline.text_encoder.requires_grad_(False)})
    parts = Parts(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, unet, Latents({}, 1.0))
    weights = [value for value in unet.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK, betas=(0.9, 0.99), weight_decay=0.0)
    pace = OneCycleLR(optimizer, max_lr=PEAK, total_steps=steps, pct_start=0.1)
    bar, smooth = tqdm(range(steps), desc="LoRA", mininterval=5), 1.0
    for _ in bar:
        picks = choose(random, BATCH, 1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = diffusion_loss(modules, parts, captions_of(random, picks), latents[picks.emoji, picks.colour])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        pace.step()
        smooth = 0.95 * smooth + 0.05 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=int, default=450, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(output: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(CHECKPOINT, safety_checker=None, torch_dtype=torch.float32)
    train(pipeline, latents_of_all(pipeline.vae), steps, Random(seed))
    layers = {name: value.half() for name, value in get_peft_model_state_dict(pipeline.unet).items()}
    pipeline.save_lora_weights(output.parent, unet_lora_layers=layers, weight_name=output.name)


if __name__ == "__main__":
    main()
