"""Detection of a checkpoint's family from its index and configs, with a one-line reason if it is not supported.

Works on parsed files; does not access the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypergen_export.checkpoints.components import FAMILIES, Family, Sizes
from hypergen_export.errors import UnsupportedModelError

Config = Mapping[str, Any]

# Entry of the index -> why the pipeline is not supported.
_UNSUPPORTED_PARTS = {
    "transformer": "its denoiser is a transformer, not a UNet",
    "controlnet": "it needs a control image beside the prompt (ControlNet)",
    "adapter": "it needs a control image beside the prompt (T2I-Adapter)",
    "motion_adapter": "it generates videos",
    "prior": "it generates in two stages, a prior and a decoder",
    "image_normalizer": "it generates from an image embedding (unCLIP)",
    "low_res_scheduler": "it is an upscaler",
    "depth_estimator": "it needs a depth map",
}
# Word in the pipeline's class name -> why the pipeline is not supported.
_UNSUPPORTED_PIPELINES = {
    "ControlNet": _UNSUPPORTED_PARTS["controlnet"],
    "Inpaint": "its UNet takes a mask and a masked image beside the latents (inpainting)",
    "InstructPix2Pix": "its UNet takes an image to edit beside the latents",
    "Upscale": _UNSUPPORTED_PARTS["low_res_scheduler"],
    "Kandinsky": _UNSUPPORTED_PARTS["prior"],
}
# Input channels of a UNet with four latent channels -> what the additional channels contain.
_CHANNELS = {
    5: "a depth map",
    7: "an image to upscale",
    8: "an image to edit",
    9: "a mask and a masked image: an inpainting model",
}

_TOKENIZERS = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")
_DEFAULT_CONTEXT_WIDTH = 1280  # the default of UNet2DConditionModel


def find_family(model: str, index: Config, read_config: Callable[[str], Config]) -> Family:
    """The family of the pipeline of `index`; families that share a pipeline differ in the denoiser's inputs.

    `read_config` reads the config.json of a module. Raises UnsupportedModelError.
    """
    pipeline = str(index.get("_class_name"))
    families = [family for family in FAMILIES if pipeline in family.pipelines]
    if not families:
        raise UnsupportedModelError(f"{model}: {pipeline} is not supported{_reason(pipeline, index)}; {_known()}")
    if index.get("requires_aesthetics_score"):
        raise UnsupportedModelError(
            f"{model}: it is a refiner, which finishes another model's image and takes an aesthetic score; "
            "refiners are not supported"
        )
    inputs = _stated_inputs(read_config(families[0].denoiser.module))
    for family in families:
        if set(family.denoiser_inputs) == inputs:
            return family
    common = set[str].intersection(*(set(family.denoiser_inputs) for family in families))
    extra, absent = sorted(inputs - common), sorted(common - inputs)
    complaint = f"needs {' and '.join(extra)}" if extra else f"does not take {' and '.join(absent)}"
    raise UnsupportedModelError(f"{model}: its UNet {complaint}, which is not supported for {pipeline}")


def check_classes(model: str, index: Config, family: Family) -> None:
    """Reject modules, tokenizers and schedulers of unsupported classes. Raises UnsupportedModelError."""
    for module, loader in family.modules.items():
        given = _class_name(index, module)
        if given != loader:
            raise UnsupportedModelError(f"{model}: its {module} is {given}, but only {loader} is supported")
    for tokenizer in family.tokenizers:
        given = _class_name(index, tokenizer)
        if given not in _TOKENIZERS:
            raise UnsupportedModelError(f"{model}: its {tokenizer} is {given}, but only {_TOKENIZERS[0]} is supported")
    library, _, scheduler = _class_name(index, "scheduler").partition(".")
    if library != "diffusers" or not scheduler:
        given = _class_name(index, "scheduler")
        raise UnsupportedModelError(f"{model}: its scheduler is {given}, but only those of diffusers are supported")


def check_configs(model: str, configs: Mapping[str, Config], sizes: Sizes) -> None:
    """Reject modules whose configs require inputs that the family's components do not have.

    Raises:
        UnsupportedModelError: one line that names the reason.
    """
    unet = configs["unet"]
    encoders = [config for module, config in configs.items() if module.startswith("text_encoder")]
    reasons = {
        _channels_reason(unet.get("in_channels"), sizes["latent_channels"]): (
            unet.get("in_channels") != sizes["latent_channels"]
        ),
        f"its UNet uses another timestep embedding ({unet.get('time_embedding_type')})": unet.get(
            "time_embedding_type", "positional"
        )
        != "positional",
        "its UNet needs a class label": unet.get("class_embed_type") is not None or unet.get("num_class_embeds"),
        "its UNet projects the encoder's hidden states (encoder_hid_dim)": unet.get("encoder_hid_dim") is not None
        or unet.get("encoder_hid_dim_type") is not None,
        f"its UNet reads {unet.get('cross_attention_dim')} features per token, its text encoders give "
        f"{sizes['context_width']}": _context_widths(unet) != {sizes["context_width"]},
        "its UNet takes other size conditioning than six numbers": _size_numbers(unet, sizes) not in (None, 6),
        "its text encoder needs an attention mask": any(config.get("use_attention_mask") for config in encoders),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(f"{model}: {reason}, which is not supported")


def _class_name(index: Config, part: str) -> str:
    return ".".join(str(name) for name in index.get(part) or [] if name is not None) or "none"


def _reason(pipeline: str, index: Config) -> str:
    reasons = [
        *(reason for part, reason in _UNSUPPORTED_PARTS.items() if (index.get(part) or [None])[0]),
        *(reason for word, reason in _UNSUPPORTED_PIPELINES.items() if word in pipeline),
    ]
    return f" ({reasons[0]})" if reasons else ""


def _known() -> str:
    names = sorted({name for family in FAMILIES for name in family.pipelines})
    return f"supported pipelines: {', '.join(names)}"


def _stated_inputs(unet: Config) -> set[str]:
    """A UNet's inputs beside latents and timestep, according to its config."""
    kind = unet.get("addition_embed_type")
    # "text" is pooled from encoder_hidden_states inside the UNet and needs no input of its own.
    added = {None: set[str](), "text": set[str](), "text_time": {"text_embeds", "size_embeds"}}
    guidance = {"timestep_cond"} if unet.get("time_cond_proj_dim") is not None else set[str]()
    return {"encoder_hidden_states"} | guidance | added.get(kind, {f"added conditions ({kind})"})


def _channels_reason(given: Any, expected: int) -> str:
    carried = f" ({_CHANNELS[given]})" if given in _CHANNELS else ""
    return f"its UNet takes {given} channels{carried}, its VAE gives {expected}"


def _context_widths(unet: Config) -> set[Any]:
    widths = unet.get("cross_attention_dim", _DEFAULT_CONTEXT_WIDTH)
    return set(widths) if isinstance(widths, list) else {widths}


def _size_numbers(unet: Config, sizes: Sizes) -> float | None:
    """The number of time ids that the UNet embeds; None if it has no such input."""
    if "pooled_width" not in sizes:
        return None
    width = int(unet.get("projection_class_embeddings_input_dim") or 0)
    return (width - sizes["pooled_width"]) / int(unet.get("addition_time_embed_dim") or 1)
