"""A Stable Diffusion checkpoint of the true architecture, small enough to be exported within a test run.

It knows how to write one: random weights from a fixed seed, so that the same call writes the same checkpoint
anywhere. It says nothing and means nothing, but it answers as a real one does: prompts and seeds change its
pictures, and its pictures have contrast, so that a mistake in any tensor shows in the pixels.

    python tests/miniature.py FOLDER
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

PREDICTION_TYPES = ("epsilon", "v_prediction")
POSITIONS = 16
LATENT_CHANNELS = 4
SAMPLE_SIZE = 8
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("red", "blue", "green", "rocket", "cat", "on", "background")

_PNDM: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.32.0",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}


def save_miniature(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    scheduler: dict[str, Any] | None = None,
    pad_token: str = END,
) -> Path:
    """Write the checkpoint into `folder` and return it.

    `scheduler` replaces entries of scheduler_config.json (its `_class_name` too). `pad_token` "!" is what
    Stable Diffusion 2.x pads prompts with, the default what 1.x does.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type: {prediction_type!r} is none of {PREDICTION_TYPES}")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _save_tokenizer(folder / "tokenizer", pad_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        _text_encoder(vocabulary).save_pretrained(folder / "text_encoder")
        _unet().save_pretrained(folder / "unet")
        _vae().save_pretrained(folder / "vae")
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {**_PNDM, "prediction_type": prediction_type, **(scheduler or {})},
    )
    _write_json(folder / "model_index.json", _index((scheduler or _PNDM).get("_class_name", "PNDMScheduler")))
    return folder


def _index(scheduler: str) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.32.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _text_encoder(vocabulary: dict[str, int]) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
        hidden_act="quick_gelu",
    )
    model = CLIPTextModel(config).eval()
    _amplify(model.get_input_embeddings(), 20.0)
    return model


def _unet() -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        sample_size=SAMPLE_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    _amplify(model.conv_out, 2.0)
    for name, module in model.named_modules():
        if name.endswith("attn2.to_out.0"):
            _amplify(module, 8.0)
    return model


def _vae() -> AutoencoderKL:
    model = AutoencoderKL(
        sample_size=SAMPLE_SIZE * 8,
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    ).eval()
    _amplify(model.decoder.conv_out, 3.0)
    return model


def _amplify(module: torch.nn.Module, factor: float) -> None:
    with torch.no_grad():
        module.get_parameter("weight").mul_(factor)


def _save_tokenizer(folder: Path, pad_token: str) -> dict[str, int]:
    """The files that a Stable Diffusion checkpoint brings; returns the vocabulary."""
    merges, merged = _merges()
    characters = list(_byte_characters())
    tokens = [*characters, *(f"{character}</w>" for character in characters), *merged, START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": POSITIONS, "do_lower_case": True},
    )
    return vocabulary


def _merges() -> tuple[list[str], list[str]]:
    """Merges that turn each of WORDS into one token, letter by letter from the left."""
    rules: dict[str, str] = {}
    for word in WORDS:
        left, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for right in rest:
            rules.setdefault(f"{left} {right}", left + right)
            left += right
    return list(rules), list(rules.values())


def _byte_characters() -> Iterator[str]:
    """One printable character per byte value, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from (chr(0x100 + i) for i in range(256 - len(printable)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    save_miniature(Path(sys.argv[1]))
