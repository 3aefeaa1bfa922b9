"""Detection of a checkpoint's family from its index and configs, with a one-line reason if it is not supported.

Works on parsed files; does not access the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hypergen_export.checkpoints.components import Sizes
from hypergen_export.checkpoints.families import FAMILIES
from hypergen_export.checkpoints.families.tensors import IMAGE_LATENTS, PREVIEW_DECODER
from hypergen_export.checkpoints.family import Config, Family
from hypergen_export.errors import UnsupportedModelError

_KL, _TINY = "diffusers.AutoencoderKL", "diffusers.AutoencoderTiny"
# Entry of the index -> why the pipeline is not supported.
_UNSUPPORTED_PARTS = {
    "transformer": "its denoiser is a transformer of another architecture",
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
    "FluxControl": "its transformer takes a control image beside the latents",
    "FluxFill": "its transformer takes a mask and a masked image beside the latents (inpainting)",
    "Inpaint": "it takes a mask and a masked image beside the prompt (inpainting)",
    "Upscale": _UNSUPPORTED_PARTS["low_res_scheduler"],
    "Kandinsky": _UNSUPPORTED_PARTS["prior"],
}


def find_family(model: str, index: Config, read_config: Callable[[str], Config]) -> Family:
    """The family of the pipeline of `index`.

    Families that share a pipeline differ in the denoiser's inputs or in the index. `read_config` reads the
    config.json of a module.

    Raises:
        UnsupportedModelError: one line that names the reason.
    """
    pipeline = str(index.get("_class_name"))
    families = [family for family in FAMILIES if pipeline in family.pipelines and family.is_named_by(index)]
    if not families:
        raise UnsupportedModelError(f"{model}: {pipeline} is not supported{_reason(pipeline, index)}; {_known()}")
    if index.get("requires_aesthetics_score"):
        raise UnsupportedModelError(
            f"{model}: it is a refiner, which finishes another model's image and takes an aesthetic score; "
            "refiners are not supported"
        )
    denoiser = read_config(families[0].denoiser.module)
    inputs = families[0].stated_inputs(denoiser)
    for family in families:
        if set(family.denoiser_inputs) == inputs:
            return family
    common = set[str].intersection(*(set(family.denoiser_inputs) for family in families))
    extra, absent = sorted(inputs - common), sorted(common - inputs)
    complaint = f"needs {' and '.join(extra)}" if extra else f"does not take {' and '.join(absent)}"
    kind = "UNet" if families[0].denoiser.module == "unet" else "transformer"
    raise UnsupportedModelError(f"{model}: its {kind} {complaint}, which is not supported for {pipeline}")


def with_stated_vae(model: str, family: Family, index: Config) -> Family:
    """The family with the tiny autoencoder that the index names, if its own VAE has one for such latents.

    An AutoencoderTiny gives latents, not a distribution of them: nothing is drawn for an input image.
    Raises UnsupportedModelError.
    """
    if _class_name(index, "vae") != _TINY or family.modules.get("vae") != _KL:
        return family
    if IMAGE_LATENTS in family.denoiser.inputs:
        raise UnsupportedModelError(
            f"{model}: it edits images in the scale of an AutoencoderKL: an AutoencoderTiny can only be its "
            "--preview-vae"
        )
    components = tuple(
        replace(each, loader=_TINY, wrapper=f"{each.name}_tiny", overflows_float16=False)
        if each.module == "vae"
        else each
        for each in family.components
    )
    return replace(family, components=components, sampling=replace(family.sampling, encodes_mode=True))


def with_preview_vae(model: str, family: Family, index: Config) -> Family:
    """The family with a decoder for previews, if the index has one. Raises UnsupportedModelError."""
    if PREVIEW_DECODER.module not in index:
        return family
    if family.modules.get("vae") not in (_KL, _TINY):
        raise UnsupportedModelError(f"{model}: --preview-vae is not supported for models with {family.modules['vae']}")
    return replace(family, components=(*family.components, PREVIEW_DECODER))


def check_preview_vae(model: str, config: Config, sizes: Sizes) -> None:
    """Reject a decoder for previews whose latents are of another shape. Raises UnsupportedModelError."""
    # The defaults are AutoencoderTiny's.
    channels, blocks = config.get("latent_channels", 4), config.get("decoder_block_out_channels", (64,) * 4)
    if not isinstance(blocks, (list, tuple)):
        raise UnsupportedModelError(
            f"{model}: --preview-vae: its config.json has {blocks} as decoder_block_out_channels"
        )
    given = channels, 2 ** (len(blocks) - 1)
    expected = sizes["latent_channels"], sizes["vae_scale_factor"]
    if given != expected:
        raise UnsupportedModelError(
            f"{model}: --preview-vae decodes latents of {given[0]} channels to {given[1]} times their size, but the "
            f"model's are of {expected[0]} channels and {expected[1]} times smaller"
        )


def check_classes(model: str, index: Config, family: Family) -> None:
    """Reject modules, tokenizers and schedulers of unsupported classes. Raises UnsupportedModelError."""
    for module, loader in family.modules.items():
        given = _class_name(index, module)
        if given not in (loader, *family.accepted_classes.get(module, ())):
            raise UnsupportedModelError(f"{model}: its {module} is {given}, but only {loader} is supported")
    for text in family.text:
        given = _class_name(index, text.tokenizer)
        if given not in (text.tokenizer_class, f"{text.tokenizer_class}Fast"):
            raise UnsupportedModelError(
                f"{model}: its {text.tokenizer} is {given}, but only {text.tokenizer_class} is supported"
            )
    library, _, scheduler = _class_name(index, "scheduler").partition(".")
    if library != "diffusers" or not scheduler:
        given = _class_name(index, "scheduler")
        raise UnsupportedModelError(f"{model}: its scheduler is {given}, but only those of diffusers are supported")


def check_text_encoder(place: str, part: str, loader: str) -> None:
    """Reject a text encoder of a class that no family has. Raises UnsupportedModelError."""
    known = {
        each
        for family in FAMILIES
        for component in family.text_encoders
        for each in (component.loader, *family.accepted_classes.get(component.module, ()))
    }
    if loader not in known:
        raise UnsupportedModelError(f"{place}: its {part} is {loader}, which is not supported")


def check_configs(model: str, family: Family, configs: Mapping[str, Config], sizes: Sizes) -> None:
    """Reject modules whose configs require inputs that the family's components do not have.

    Raises:
        UnsupportedModelError: one line that names the reason.
    """
    for reason in family.check(configs, sizes):
        raise UnsupportedModelError(f"{model}: {reason}, which is not supported")


def _class_name(index: Config, part: str) -> str:
    return ".".join(str(name) for name in index.get(part) or [] if name is not None) or "none"


def _reason(pipeline: str, index: Config) -> str:
    reasons = [
        *(reason for word, reason in _UNSUPPORTED_PIPELINES.items() if word in pipeline),
        *(reason for part, reason in _UNSUPPORTED_PARTS.items() if (index.get(part) or [None])[0]),
    ]
    return f" ({reasons[0]})" if reasons else ""


def _known() -> str:
    names = sorted({name for family in FAMILIES for name in family.pipelines})
    return f"supported pipelines: {', '.join(names)}"
