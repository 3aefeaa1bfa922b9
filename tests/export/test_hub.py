from __future__ import annotations

from hypergen_export.hub import wanted_files

# As on the hub: variants, single-file copies, a safety checker, other frameworks.
LISTING = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/flax_model.msgpack",
]


def test_only_what_an_export_reads_is_fetched() -> None:
    assert sorted(wanted_files(LISTING)) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_of_xl_the_second_text_encoder_and_its_tokenizer_are_fetched_too() -> None:
    second = ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/vocab.json"]
    unused = ["text_encoder_2/model.fp16.safetensors", "text_encoder_2/openvino_model.bin"]
    assert set(wanted_files([*LISTING, *second, *unused])) == {*wanted_files(LISTING), *second}


def test_of_something_else_only_small_files_are_fetched() -> None:
    listing = ["config.json", "model-00001-of-00004.safetensors", "tokenizer.json", "generation_config.json"]
    fetched = wanted_files(listing)
    assert "model-00001-of-00004.safetensors" not in fetched
    assert set(listing[:1]) <= set(fetched)
