"""Miniature checkpoints of transformer families: the true architectures with their switches, heads and rotary axes.

Widths and depths are cut. Weights are random with a fixed seed and in a range in which activations stay sane, so that
an error in any tensor shows in the image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hypergen_export.checkpoints.families.sana import SANA
from support.miniature import END, POSITIONS, WORDS, save_tokenizer

# The user, assistant and generation parts of Qwen3's template, as the published tokenizer_config.json has them.
_QWEN3_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "a red rocket on a blue background",
    "a cat holding a sign that says hello world, 日本語 のねこ naïve café 🚀 ",
]
_VOCABULARY = 600

_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_DYNAMIC = {
    **_FLOW,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
# As diffusers' script that converts Sana's checkpoints makes it.
_DPM_FLOW = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "flow_shift": 3.0,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
_SCM = {"_class_name": "SCMScheduler", "num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}
_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def _flux1(folder: Path, *, has_guidance: bool, pipeline: str = "FluxPipeline") -> None:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=48,
        guidance_embeds=has_guidance,
        axes_dims_rope=(16, 56, 56),
    )
    clip = save_tokenizer(folder / "tokenizer", END)
    t5 = _save_t5_tokenizer(folder / "tokenizer_2")
    _save(folder / "text_encoder", _clip(len(clip)))
    _save(folder / "text_encoder_2", _t5(t5))
    _save(folder / "transformer", transformer)
    _save(folder / "vae", kl_vae(scaling_factor=0.3611, shift_factor=0.1159))
    _write_scheduler(folder, _DYNAMIC if has_guidance else {**_FLOW, "shift": 1.0, "use_dynamic_shifting": False})
    _write_index(
        folder,
        pipeline,
        {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _chroma(folder: Path) -> None:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(16, 56, 56),
        approximator_num_channels=64,
        approximator_hidden_dim=96,
        approximator_layers=2,
    )
    t5 = _save_t5_tokenizer(folder / "tokenizer")
    _save(folder / "text_encoder", _t5(t5))
    _save(folder / "transformer", transformer)
    _save(folder / "vae", kl_vae(scaling_factor=0.3611, shift_factor=0.1159))
    _write_scheduler(folder, {**_FLOW, "shift": 3.0})
    _write_index(
        folder,
        "ChromaPipeline",
        {
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "ChromaTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "image_encoder": [None, None],
            "feature_extractor": [None, None],
        },
    )


def _klein(folder: Path, *, is_distilled: bool, layers: int = 28) -> None:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=3 * 64,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
        eps=1e-6,
        guidance_embeds=False,
    )
    save_qwen_tokenizer(folder / "tokenizer")
    _save(folder / "text_encoder", _qwen3(transformers.Qwen3ForCausalLM, layers=layers))
    _save(folder / "transformer", transformer)
    _save(folder / "vae", _flux2_vae())
    _write_scheduler(folder, {**_DYNAMIC, "time_shift_type": "exponential"})
    _write_index(
        folder,
        "Flux2KleinPipeline",
        {
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
            "is_distilled": is_distilled,
        },
    )


def _z_image(folder: Path) -> None:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=256,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=64,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512],
    )
    save_qwen_tokenizer(folder / "tokenizer")
    _save(folder / "text_encoder", _qwen3(transformers.Qwen3Model, layers=3))
    _save(folder / "transformer", transformer)
    _save(folder / "vae", kl_vae(scaling_factor=0.3611, shift_factor=0.1159))
    _write_scheduler(folder, {**_FLOW, "shift": 3.0, "use_dynamic_shifting": False})
    _write_index(
        folder,
        "ZImagePipeline",
        {
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _stable_diffusion_3(folder: Path, *, is_3_5: bool, has_t5: bool) -> None:
    """3.5 Medium has dual attention, normalised queries and keys, and in some copies dynamic shifting; 3 has none."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=16 + 32,
        pos_embed_max_size=130,
        dual_attention_layers=(0, 1) if is_3_5 else (),
        qk_norm="rms_norm" if is_3_5 else None,
    )
    t5 = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    for suffix, pad_token, width, activation in (("", END, 16, "quick_gelu"), ("_2", "!", 32, "gelu")):
        vocabulary = save_tokenizer(folder / f"tokenizer{suffix}", pad_token)
        _save(folder / f"text_encoder{suffix}", _projected_clip(vocabulary, width=width, activation=activation))
    if has_t5:
        _save(folder / "text_encoder_3", _t5(_save_t5_tokenizer(folder / "tokenizer_3")))
    _save(folder / "transformer", transformer)
    _save(folder / "vae", kl_vae(scaling_factor=1.5305, shift_factor=0.0609))
    _write_scheduler(folder, _DYNAMIC if is_3_5 else {**_FLOW, "shift": 3.0})
    _write_index(
        folder,
        "StableDiffusion3Pipeline",
        {
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            **(t5 if has_t5 else {part: [None, None] for part in t5}),
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _qwen_image(folder: Path) -> None:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(16, 56, 56),
    )
    save_qwen_tokenizer(folder / "tokenizer")
    _save(folder / "text_encoder", _qwen2_5_vl())
    _save(folder / "transformer", transformer)
    _save(folder / "vae", diffusers.AutoencoderKLQwenImage(base_dim=16, num_res_blocks=1))
    qwen = {"max_image_seq_len": 8192, "max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02}
    _write_scheduler(folder, {**_DYNAMIC, **qwen, "time_shift_type": "exponential"})
    _write_index(
        folder,
        "QwenImagePipeline",
        {
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        },
    )


def _sana(folder: Path, scheduler: Mapping[str, Any], **switches: Any) -> None:
    """1.5 and Sprint have normalised queries and keys. 1.0 and 1.5 are published with one of two schedulers."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=64,
        cross_attention_dim=128,
        caption_channels=64,
        sample_size=32,
        **switches,
    )
    vocabulary = _save_gemma_tokenizer(folder / "tokenizer")
    _save(folder / "text_encoder", _gemma2(vocabulary))
    _save(folder / "transformer", transformer)
    _save(folder / "vae", _dc_vae())
    _write_scheduler(folder, scheduler)
    _write_index(
        folder,
        "SanaSprintPipeline" if "guidance_embeds" in switches else "SanaPipeline",
        {
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", "Gemma2Model"],
            "tokenizer": ["transformers", "GemmaTokenizerFast"],
            "transformer": ["diffusers", "SanaTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderDC"],
        },
    )


MINIATURES: Mapping[str, Callable[[Path], None]] = {
    "flux1-dev": lambda folder: _flux1(folder, has_guidance=True),
    "flux1-kontext": lambda folder: _flux1(folder, has_guidance=True, pipeline="FluxKontextPipeline"),
    "flux1-schnell": lambda folder: _flux1(folder, has_guidance=False),
    "chroma": _chroma,
    "flux2-klein": lambda folder: _klein(folder, is_distilled=True),
    "flux2-klein-base": lambda folder: _klein(folder, is_distilled=False),
    "z-image": _z_image,
    "qwen-image": _qwen_image,
    "sana": lambda folder: _sana(folder, {**_FLOW, "shift": 3.0}),
    "sana-1.5": lambda folder: _sana(folder, _DPM_FLOW, qk_norm="rms_norm_across_heads"),
    "sana-sprint": lambda folder: _sana(folder, _SCM, qk_norm="rms_norm_across_heads", guidance_embeds=True),
    "stable-diffusion-3": lambda folder: _stable_diffusion_3(folder, is_3_5=True, has_t5=True),
    "stable-diffusion-3-without-t5": lambda folder: _stable_diffusion_3(folder, is_3_5=False, has_t5=False),
}


def save_transformer_miniature(folder: Path, family: str) -> Path:
    """Write the checkpoint into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    MINIATURES[family](folder)
    return folder


def save_shallow_klein(folder: Path) -> Path:
    """FLUX.2-klein with a text encoder of seven layers, whose states 9, 18 and 27, counted round, are 1, 2 and 3."""
    _klein(folder, is_distilled=True, layers=7)
    return folder


def state_small_default(folder: Path) -> Path:
    """Let the checkpoint state 256x256: a start runs engines at the default size, at the families' own for seconds."""
    _write_json(folder / "hypergen_defaults.json", {"width": 256, "height": 256})
    return folder


def randomise(module: Any, seed: int = 0) -> Any:
    """Fill all weights with random values that keep the scale of activations; none is left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.1 * noise)
    return module.eval()


def kl_vae(*, scaling_factor: float, shift_factor: float) -> Any:
    """The VAE of FLUX.1, SD3 and Z-Image: 16 channels, no convolutions around the latents."""
    return diffusers.AutoencoderKL(
        **_BLOCKS,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=1024,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        force_upcast=True,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )


def _flux2_vae() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        **_BLOCKS, block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=32, norm_num_groups=8
    )
    generator = torch.Generator().manual_seed(5)
    vae.bn.running_mean.copy_(torch.randn(128, generator=generator) * 0.1)
    vae.bn.running_var.copy_(1 + torch.rand(128, generator=generator))
    return vae


def _dc_vae() -> Any:
    """The VAE of Sana: six levels, the last three with attention."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths, layers, scales = (16, 16, 16, 32, 32, 64), (1,) * 6, ((), (), (), (5,), (5,), (5,))
    return diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=16,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )


def _projected_clip(vocabulary: Mapping[str, int], *, width: int, activation: str) -> Any:
    """A CLIP text encoder with the token ids that published configs state: the end token is found by its rank."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_act=activation,
    )
    return transformers.CLIPTextModelWithProjection(config)


def _clip(vocabulary: int) -> Any:
    """The text encoder of FLUX.1, with the token ids of its config: the end token is found by its rank."""
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_act="quick_gelu",
    )
    return transformers.CLIPTextModel(config)


def _t5(vocabulary: int) -> Any:
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=64,
        d_kv=16,
        d_ff=160,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return transformers.T5EncoderModel(config)


def _save_t5_tokenizer(folder: Path) -> int:
    """A unigram vocabulary of words and characters; returns its size."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    characters = [(character, -6.0) for character in ["▁", *sorted(set("".join(_CORPUS)) - {" "})]]
    words = [(f"▁{word}", -4.0) for word in WORDS]
    vocabulary = [*special, *characters, *words]
    tokenizer = transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=4, model_max_length=512)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    _write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "T5Tokenizer"})
    return len(tokenizer)


def _gemma2(vocabulary: int) -> Any:
    """Scores are capped at a lower value than the published 50, as they are smaller, too."""
    config = transformers.Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
    )
    return transformers.Gemma2Model(config)


def _save_gemma_tokenizer(folder: Path) -> int:
    """Gemma's BPE, in which spaces begin words, with bytes for other characters; returns its size."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY + len(special), special_tokens=special)
    trained.train_from_iterator([*_CORPUS * 4, *(f" {word}" for word in WORDS), SANA[0].text[0].template], trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = transformers.GemmaTokenizerFast(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True
    )
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    _write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "GemmaTokenizer"})
    return len(tokenizer)


def _qwen3(kind: Any, *, layers: int) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=_VOCABULARY + 16,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
    )
    return kind(config)


def _qwen2_5_vl() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": _VOCABULARY + 16,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "type": "mrope",
                "mrope_section": [2, 3, 3],
                "rope_theta": 1e6,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
        image_token_id=610,
        video_token_id=611,
        vision_start_token_id=612,
        vision_end_token_id=613,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@cache
def _qwen_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def save_qwen_tokenizer(folder: Path) -> None:
    """Qwen's byte-level BPE with Qwen3's chat template."""
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=_qwen_tokenizer(),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=_QWEN3_TEMPLATE,
        model_max_length=131072,
        padding_side="right",
    ).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    _write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "Qwen2Tokenizer"})


def _save(folder: Path, module: Any) -> None:
    randomise(module).save_pretrained(folder)


def _write_scheduler(folder: Path, config: Mapping[str, Any]) -> None:
    _write_json(folder / "scheduler" / "scheduler_config.json", config)


def _write_index(folder: Path, pipeline: str, parts: Mapping[str, Any]) -> None:
    scheduler = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    _write_json(
        folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.37.0", **scheduler, **parts}
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
