"""LoRA files: the option `--lora`, and the weights named in a file's header. Reads no tensors and imports no torch.

Trainers name weights differently: diffusers and peft by the module's subfolder, peft alone (without knowledge of the
pipeline) by its own prefix, kohya by a prefix per module, which is the same for UNets and transformers. Merging is done
in `conversion.merging`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.layer_paths import flat
from hypergen_export.checkpoints.weights import safetensors_header, sha256
from hypergen_export.errors import BadLoraError, BadOptionError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9_.-]+")
_LARGEST_SCALE = 2.0
# Those that ship with the project (`--lora hypergen/NAME`): inside the package in a wheel, beside it in a checkout.
_SHIPPED = Path("hypergen")
_PACKAGE = Path(__file__).parents[1]
_SHIPPED_FOLDERS = (_PACKAGE / "bundled" / "loras", _PACKAGE.parent / "emoji" / "loras")
_LARGEST_POOLED_RANK = 256

# Files written by diffusers' `save_lora_weights` and by peft's `save_pretrained`.
_USUAL_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG = "adapter_config.json"
# Metadata in which diffusers stores peft's settings, each prefixed with its module's name.
_PEFT_METADATA = "lora_adapter_metadata"
# Metadata in which kohya's and other trainers state the base model.
_BASE_METADATA = ("ss_base_model_version", "modelspec.architecture")
# Embeddings that were trained along with the LoRA, as OneTrainer and kohya's trainers store them: the name follows.
BUNDLED = "bundle_emb."
# The name may have dots, and so may the token of a pickled embedding, which follows its key.
_BUNDLED_PART = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<key>string_to_param\..+|[^.]+)")
# peft does not store which module it trained; a module trained alone is the denoiser.
_PEFT_PREFIX = "base_model.model."
# The UNet or the transformer, which the names of its layers tell.
_DENOISER = "denoiser"
# A text encoder whose place in the pipeline differs between families.
T5 = "T5"
# Prefix of a weight's name -> module.
_MODULES = {
    "unet.": "unet",
    "transformer.": "transformer",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    _PEFT_PREFIX: _DENOISER,
    "lora_unet_": _DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": T5,
    # OneTrainer's own format.
    "lora_transformer_": "transformer",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
    # As ComfyUI saves them.
    "diffusion_model.": _DENOISER,
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": T5,
    # LyCORIS, around a denoiser of diffusers.
    "lycoris_": _DENOISER,
}
# Beginnings of the names of a UNet's layers, flattened: diffusers' and those of the original implementation.
_UNET_LAYER = re.compile(
    r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|time_embed|time_embedding|label_emb|"
    r"add_embedding|conv_in|conv_out|out)(_|$)"
)
# Of layers whose names have no prefix: as diffusers' `save_attn_procs` wrote a UNet's, and others a transformer's.
_BARE_LAYER = re.compile(
    r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks|double_blocks|single_blocks|"
    r"joint_blocks|layers|noise_refiner|context_refiner)_"
)
_T5_LAYER = re.compile(r"(encoder_)?block_\d+_layer_\d+_")
# Beginnings of the names of layers that only one kind of model has, flattened -> that kind.
_BASES = {
    re.compile(sign): base
    for sign, base in {
        r"joint_blocks_": "Stable Diffusion 3",
        r"distilled_guidance_layer_": "Chroma",
        r"txt_in_individual_token_refiner_|double_blocks_\d+_(img|txt)_mlp_fc\d": "HunyuanVideo",
        r"double_blocks_\d+_(img|txt)_mod_|single_blocks_\d+_modulation_|vector_in_": "FLUX.1",
        r"single_transformer_blocks_\d+_norm_linear": "FLUX.1",
        r"single_transformer_blocks_\d+_(proj_mlp|proj_out|attn_to_[qkv]$)": "FLUX.1 or Chroma",
        r"(double|single)_stream_modulation_|transformer_blocks_\d+_ff_(context_)?linear_": "FLUX.2",
        r"single_transformer_blocks_\d+_attn_to_(qkv_mlp_proj|out)": "FLUX.2",
        r"(double|single)_blocks_\d": "FLUX.1, Chroma or FLUX.2",
        r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_": "Qwen-Image",
        r"(noise_refiner|context_refiner|layers)_\d+_": "Z-Image or Lumina 2",
        r"transformer_blocks_\d+_ff_conv_": "Sana",
        r"blocks_\d+_(self|cross)_attn_": "Wan",
    }.items()
}
# Class of a transformer -> what its name is in that metadata, whose spelling differs between trainers. A LoRA of some
# layers alone may fit another kind: those of attention in double blocks are alike in FLUX.1, Chroma, FLUX.2 and
# Qwen-Image.
_STATED_BASES = {
    "FluxTransformer2DModel": re.compile(r"flux[-_. ]?1"),
    "ChromaTransformer2DModel": re.compile(r"chroma"),
    "Flux2Transformer2DModel": re.compile(r"flux[-_. ]?2|klein"),
    "QwenImageTransformer2DModel": re.compile(r"qwen[-_ ]?image"),
    "SanaTransformer2DModel": re.compile(r"\bsana"),
    "SD3Transformer2DModel": re.compile(r"stable[-_ ]diffusion[-_ ]3|sd[-_]?3"),
    "ZImageTransformer2DModel": re.compile(r"z[-_ ]?image"),
}
# Inputs of a UNet's cross-attention -> the kind of model.
_CROSS_ATTENTION = re.compile(r".*_attn2_to_[kv]")
_UNET_BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
# Endings of weights' names by peft (which may include the adapter's name), kohya and diffusers.
_ENDINGS = tuple(
    re.compile(rf"(?P<layer>.+?){ending}")
    for ending in (
        r"\.lora_(?P<part>A|B|down|up|mid)(?:\.(?P<adapter>[^.]+))?\.weight",
        r"\.lora_B(?:\.(?P<adapter>[^.]+))?\.(?P<part>bias)",
        r"\.lora_(?P<part>magnitude_vector)(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?",
        r"\.lora(?:_linear_layer)?\.(?P<part>down|up)\.weight",
        r"(?:\.processor)?(?P<projection>\.to_(?:q|k|v|out))_lora\.(?P<part>down|up)\.weight",
        r"(?P<projection>\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<part>down|up)\.weight",
        r"\.(?P<part>alpha)",
        # LyCORIS: low-rank Hadamard and Kronecker products, which are sums of products of a row and a column, too.
        r"\.(?P<part>hada_w[12]_[ab])",
        r"\.(?P<part>lokr_w1|lokr_w2(?:_[ab])?)",
    )
)
_PARTS = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
# Pattern in a weight's name -> format of a file that is not, or not only, a LoRA.
_OTHER_FORMATS = {
    re.compile(sign): kind
    for sign, kind in {
        r"\.hada_t\d": "a LoHa with a Tucker decomposition",
        r"\.hada_w[12]_[ab]\.": "a LoHa of peft's format",
        r"\.lokr_(t2|w1_[ab])": "a LoKr with a Tucker decomposition, or with a decomposed first factor",
        r"\.lokr_\w+\.": "a LoKr of peft's format",
        r"\.(boft_\w+|oft_(blocks|diag|[RrSs])|rescale)\b": "an OFT (orthogonal fine-tuning)",
        r"\.([ab][12]|bm[12])\.weight$": "a GLoRA",
        r"\.(on_input|ia3_l)\b": "an IA3",
        r"\bvera_lambda": "a VeRA",
        r"\.(w_norm|b_norm)$": "a LyCORIS file that changes norms",
        r"\.diff(_b)?$": "a LyCORIS file of full differences",
        r"\.dora_scale$": "a DoRA of kohya's format",
        r"\.lora_embedding_": "a LoRA of token embeddings",
        r"^(lora_controlnet|control_model)": "a ControlNet",
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": "a whole checkpoint",
        r"^(emb_params|string_to_param|clip_[lg])$": "a textual inversion",
    }.items()
}
# With other initialisations, such as from singular values, peft changes the base model's weights too.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file, its name in requests, and the scale at which it is merged. `t5` is the model's T5, if it has one."""

    name: str
    file: Path
    scale: float = 1.0
    t5: str = T5

    @property
    def label(self) -> str:
        """Name and scale. Names cannot contain "@", so labels are unique."""
        return f"{self.name}@{self.scale:g}"

    @cached_property
    def sha256(self) -> str:
        """Hash of the file and of peft's settings beside it."""
        config = self.file.with_name(_PEFT_CONFIG)
        return sha256([self.file, config] if config.is_file() else [self.file])

    @property
    def modules(self) -> frozenset[str]:
        """The modules (subfolders of the checkpoint) that the LoRA changes. Raises BadLoraError."""
        return frozenset(self._layers)

    def layers(self, module: str) -> Mapping[str, Mapping[str, str]]:
        """Layer name in the file -> part (down, up, mid, alpha, magnitude, bias) -> weight's name."""
        return self._layers.get(module, {})

    @property
    def made_for(self) -> str:
        """The end of a message that the LoRA does not fit: for which kind of model it is; empty if nothing tells.

        Raises BadLoraError.
        """
        stated = self._stated_base
        if stated and stated.isprintable():
            return f"; the file says that it is for {stated[:64]}"
        return f"; its layers are those of {self._base}" if self._base else ""

    def is_for_another(self, module_class: str) -> bool:
        """Whether the file says that it is for another kind of transformer than this class of diffusers."""
        stated = self._stated_base.lower()
        named = {kind for kind, name in _STATED_BASES.items() if name.search(stated)}
        return bool(named) and module_class in _STATED_BASES and module_class not in named

    @property
    def _stated_base(self) -> str:
        metadata = self._header.get("__metadata__", {})
        return next((str(metadata[key]) for key in _BASE_METADATA if metadata.get(key)), "")

    @property
    def _base(self) -> str:
        """The kind of model that has such layers; empty if several have."""
        for layer, parts in self.layers("unet").items():
            if _CROSS_ATTENTION.match(flat(layer)) and "down" in parts:
                return _UNET_BASES.get(self._shape(parts["down"])[1], "")
        layers = [flat(layer) for layer in self.layers("transformer")]
        return next((base for sign, base in _BASES.items() if any(map(sign.match, layers))), "")

    @property
    def is_low_rank(self) -> bool:
        """Whether its change is a product of two matrices times the scale: what the rank pool can hold.

        A DoRA's norms depend on the scale, and biases have no input. Of a large rank, a pool would be a second model.
        Raises BadLoraError.
        """
        parts = {part for layers in self._layers.values() for layer in layers.values() for part in layer}
        return parts.isdisjoint({"magnitude", "bias"}) and self.rank <= _LARGEST_POOLED_RANK

    @property
    def rank(self) -> int:
        """The largest rank of a layer. Raises BadLoraError."""
        return max((self._rank_of(layer) for module in self._layers.values() for layer in module.values()), default=1)

    @property
    def changes_kernels(self) -> bool:
        """Whether it changes, or may change, convolutions that read more than a pixel. Raises BadLoraError."""
        layers = [layer for module in self._layers.values() for layer in module.values()]
        kernels = [self._shape(layer[part])[2:] for layer in layers for part in ("down", "mid") if part in layer]
        is_flat = any(part.startswith(("hada", "lokr")) for layer in layers for part in layer)
        return is_flat or any(side != 1 for kernel in kernels for side in kernel)

    @property
    def shapes(self) -> Mapping[str, list[int]]:
        """The shape of each weight. Raises BadLoraError."""
        return {weight: self._shape(weight) for weight in self._weights}

    def _rank_of(self, layer: Mapping[str, str]) -> int:
        """The columns that a layer's change needs."""
        shapes = {part: self._shape(weight) for part, weight in layer.items()}
        try:
            if "hada_w1_b" in shapes:
                return shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0]
            if "lokr_w1" in shapes:
                factor = shapes["lokr_w2_b"] if "lokr_w2_b" in shapes else [min(_sides(shapes["lokr_w2"]))]
                return shapes["lokr_w1"][1] * factor[0]
            return shapes["up"][1] if "up" in shapes else 1
        except (KeyError, IndexError):  # incomplete, which is reported when it is read
            return 1

    def _shape(self, weight: str) -> list[int]:
        entry = self._header[weight]
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(isinstance(side, int) for side in shape):
            raise BadLoraError(f"{self.file}: not a safetensors file ({weight} has no shape)")
        return shape

    def settings(self, module: str) -> Mapping[str, Any]:
        """peft's settings for a module; empty if the file has none. Raises BadLoraError."""
        if any(weight.startswith(_PEFT_PREFIX) for weight in self._weights):
            settings = _read_settings(self.file.with_name(_PEFT_CONFIG))
        else:
            settings = self._stored_settings(f"{module}.")
        if settings.get("init_lora_weights") not in _PLAIN_INITS:
            raise BadLoraError(
                f"{self.file}: was trained on a base model that peft changed ({settings['init_lora_weights']}); "
                "save it with path_initial_model_for_weight_conversion"
            )
        return settings

    def _stored_settings(self, prefix: str) -> Mapping[str, Any]:
        try:
            stored = json.loads(self._header.get("__metadata__", {}).get(_PEFT_METADATA, "{}")).items()
        except (ValueError, AttributeError) as error:
            raise BadLoraError(f"{self.file}: its metadata cannot be read ({error})") from error
        return {key.removeprefix(prefix): value for key, value in stored if key.startswith(prefix)}

    @cached_property
    def _header(self) -> Mapping[str, Any]:
        try:
            return safetensors_header(self.file)
        except OSError as error:
            raise BadLoraError(f"{self.file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise BadLoraError(f"{self.file}: not a safetensors file ({error})") from error

    @property
    def _weights(self) -> list[str]:
        """The weights' names, without those of embeddings."""
        return [name for name in self._header if name != "__metadata__" and not name.startswith(BUNDLED)]

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The names of the embeddings in the file. Raises BadLoraError."""
        return tuple(dict.fromkeys(bundled_part(name)[0] for name in self._header if name.startswith(BUNDLED)))

    @cached_property
    def _layers(self) -> Mapping[str, Mapping[str, Mapping[str, str]]]:
        """Module -> layer -> part -> weight's name."""
        if not self._weights:
            raise BadLoraError(f"{self.file}: has no weights")
        for sign, kind in _OTHER_FORMATS.items():
            found = next(filter(sign.search, self._weights), None)
            if found:
                raise BadLoraError(f"{self.file}: is {kind}, which is not supported (it contains {found})")
        layers: dict[str, dict[str, dict[str, str]]] = {}
        for weight in self._weights:
            module, layer, part = self._read_name(weight)
            parts = layers.setdefault(module, {}).setdefault(layer, {})
            if parts.setdefault(part, weight) != weight:
                raise BadLoraError(f"{self.file}: contains more than one LoRA ({parts[part]}, {weight})")
        return layers

    def _read_name(self, weight: str) -> tuple[str, str, str]:
        """A weight's module, layer and part."""
        match = next(filter(None, (ending.fullmatch(weight) for ending in _ENDINGS)), None)
        if match is None:
            raise BadLoraError(f"{self.file}: not a LoRA: it contains {weight}")
        layer = match["layer"] + (match.groupdict().get("projection") or "")
        part = _PARTS.get(match["part"], match["part"])
        if _BARE_LAYER.match(flat(layer)):
            return self._module_of(_DENOISER, layer), layer, part
        for prefix, module in _MODULES.items():
            if layer.startswith(prefix):
                layer = layer.removeprefix(prefix)
                return self._module_of(module, layer), layer, part
        raise BadLoraError(
            f"{self.file}: {weight} is not of a UNet, transformer or text encoder of the kinds that are served"
        )

    def _module_of(self, module: str, layer: str) -> str:
        """The module that a layer belongs to, as its prefix and its own name tell."""
        if module == _DENOISER:
            return "unet" if _UNET_LAYER.match(flat(layer)) else "transformer"
        # OneTrainer counts FLUX.1's T5 as the second text encoder.
        return self.t5 if module == T5 or _T5_LAYER.match(flat(layer)) else module


@dataclass(frozen=True)
class Placement:
    """A LoRA in the rank pool, and its columns: as many as its rank, in any places."""

    lora: Lora
    columns: tuple[int, ...]


def bundled_part(weight: str) -> tuple[str, str]:
    """The embedding's name in a weight's name, and the key that its own file would have; no key if it has none."""
    match = _BUNDLED_PART.fullmatch(weight)
    return (match["name"], match["key"]) if match else (weight.removeprefix(BUNDLED), "")


def _sides(shape: list[int]) -> tuple[int, int]:
    """Outputs and inputs of a factor, of a convolution's kernel all inputs."""
    return shape[0], math.prod(shape[1:])


def _read_settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadLoraError(f"{path}: peft's settings cannot be read, which state the LoRA's alpha ({error})") from error
    if not isinstance(settings, dict) or settings.get("peft_type", "LORA") != "LORA":
        raise BadLoraError(f"{path}: not the settings of a LoRA")
    return settings


def read_loras(texts: Iterable[str]) -> tuple[Lora, ...]:
    """Parse values of `--lora`: `[NAME=]PATH[:SCALE]`, where PATH is a file or a folder that contains one.

    Raises:
        BadOptionError: a name or scale is invalid or given twice.
        BadLoraError: the file does not exist.
    """
    loras: dict[str, Lora] = {}
    files: dict[str, Path] = {}
    for lora in map(_read_lora, texts):
        if lora.label in loras:
            raise BadOptionError(f"--lora: {lora.name} at scale {lora.scale:g} is given twice")
        if files.setdefault(lora.name, lora.file) != lora.file:
            raise BadOptionError(f"--lora: {lora.name} is the name of two files; give one of them another name")
        loras[lora.label] = lora
    return tuple(loras.values())


def _read_lora(text: str) -> Lora:
    name, equals, rest = text.partition("=")
    if not equals or "/" in name or _is_path(text):
        name, rest = "", text
    elif not _NAME.fullmatch(name):
        raise BadOptionError(f"--lora: a name must have 1 to 64 letters, digits, '_', '.' or '-', not {name[:80]!r}")
    text_path, scale = _split_scale(rest)
    path = Path(text_path).expanduser()
    return Lora(name=name or _name_of(path), file=_find_file(path), scale=scale)


def _is_path(text: str) -> bool:
    """Whether a file or folder of exactly that name exists, with or without a scale at the end."""
    return any(path and Path(path).expanduser().exists() for path in (text, text.rpartition(":")[0]))


def _split_scale(text: str) -> tuple[str, float]:
    path, colon, last = text.rpartition(":")
    try:
        scale = float(last) if colon else 1.0
    except ValueError:  # the colon belongs to the path
        return text, 1.0
    if not 0 < scale <= _LARGEST_SCALE:
        raise BadOptionError(f"--lora: a scale must be above 0 and at most {_LARGEST_SCALE:g}, not {last}")
    # Rounded as in labels.
    return (path if colon else text), float(f"{scale:g}")


def _name_of(path: Path) -> str:
    """A valid name derived from the path."""
    path = path.resolve()
    name = path.stem if path.is_file() else path.name
    return _OTHER_CHARACTERS.sub("-", name).strip("-")[:64] or "lora"


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        return _find_shipped(path)
    usual = [path / name for name in _USUAL_FILES if (path / name).is_file()]
    found = usual[:1] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise BadLoraError(f"{path}: has {len(found) or 'no'} .safetensors files; give the path of the LoRA's file")
    return found[0]


def _find_shipped(path: Path) -> Path:
    """The file of a LoRA that ships with the project."""
    files = (folder / f"{path.name}.safetensors" for folder in _SHIPPED_FOLDERS if path.parent == _SHIPPED)
    found = next(filter(Path.is_file, files), None)
    if found is None:
        raise BadLoraError(f"{path}: no such LoRA file or folder")
    return found
