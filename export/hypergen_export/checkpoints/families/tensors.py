"""Tensors and components that several families have."""

from __future__ import annotations

from hypergen_export.checkpoints.components import BYTE, FLOAT, FP8, INT, WEIGHTS_ONLY, Component, Tensor

LATENTS = ("latent_channels", "latent_height", "latent_width")
IMAGE = Tensor(name="image", dtype=BYTE, axes=("height", "width", 3), example="pixel")
# Float32 against float32: engines sum in another order. 1e-3 is far above the resulting difference (1e-6 to 1e-5 on
# the models tried) and far below that of a wrong operator, axis or weight.
TOLERANCE = 1e-3

SAMPLE = Tensor(name="sample", dtype=FLOAT, axes=LATENTS)
TIME = Tensor(name="time", dtype=FLOAT, axes=("time_width",), example="time")
MODEL_OUTPUT = Tensor(name="model_output", dtype=FLOAT, axes=LATENTS)
# The prompt's tokens of the text encoder's own length, whether the denoiser attends to padding or has none.
HIDDEN_STATES = Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("tokens", "context_width"))
# Those of a prompt of any length, and which of them are the prompt's: the denoiser does not attend to padding.
MASKED_HIDDEN_STATES = Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("text_tokens", "context_width"))
TEXT_MASK = Tensor(name="text_mask", dtype=INT, axes=("text_tokens",), example="mask")
# All tokens of all reference images, one after another, and where each is: image, row and column.
REFERENCES = (
    Tensor(name="references", dtype=FLOAT, axes=("reference_tokens", "token_width")),
    Tensor(name="reference_positions", dtype=INT, axes=("reference_tokens", 3), example="reference_positions"),
)
# Where it is 0, the image is blank: the input of an inpainting model's encoder.
_KEPT = Tensor(name="kept", dtype=BYTE, axes=("height", "width", 1), example="kept")
# Whether a row of the batch leaves out some layers.
SKIP = Tensor(name="skip", dtype=INT, axes=(1,), example="skip")
# Of a model that edits by instruction: the latents of the image to edit, beside those that it denoises.
IMAGE_LATENTS = Tensor(name="image_latents", dtype=FLOAT, axes=LATENTS)
# The embedding of the guidance scale, where the denoiser is given it.
GUIDANCE = Tensor(name="guidance", dtype=FLOAT, axes=("guidance_width",), example="sinusoids")
POOLED = Tensor(name="text_embeds", dtype=FLOAT, axes=("pooled_width",))
_DECODED = (IMAGE, Tensor(name="pixel_mean", dtype=FLOAT, axes=(1,)))


def vae(
    loader: str = "diffusers.AutoencoderKL", wrapper: str = "", *, encoder: str = "", masked: bool = False
) -> tuple[Component, Component]:
    """The decoder and the encoder; `wrapper` is appended to their names to select a wrapper of their own.

    `encoder` instead of it to the encoder's. `masked`: the encoder is given which pixels are kept.
    """
    encoder = encoder or wrapper
    decoder = Component(
        name="vae_decoder",
        module="vae",
        loader=loader,
        wrapper=wrapper and f"vae_decoder_{wrapper}",
        inputs=(Tensor(name="latents", dtype=FLOAT, axes=LATENTS),),
        outputs=_DECODED,
        tolerance=1.0,  # one level of 255, as rounding may differ
        unused=("encoder.", "quant_conv."),
    )
    return decoder, Component(
        name="vae_encoder",
        module="vae",
        loader=loader,
        wrapper=encoder and f"vae_encoder_{encoder}",
        inputs=(IMAGE, _KEPT) if masked else (IMAGE,),
        outputs=(Tensor(name="mean", dtype=FLOAT, axes=LATENTS), Tensor(name="std", dtype=FLOAT, axes=LATENTS)),
        tolerance=TOLERANCE,
        unused=("decoder.", "post_quant_conv."),
    )


# A small decoder for previews alone, beside the VAE's own.
PREVIEW_DECODER = Component(
    name="preview_decoder",
    module="preview_vae",
    loader="diffusers.AutoencoderTiny",
    wrapper="vae_decoder_tiny",
    inputs=(Tensor(name="latents", dtype=FLOAT, axes=LATENTS),),
    outputs=_DECODED,
    tolerance=1.0,
    unused=("encoder.",),
)


def input_ids(tokens: str, example: str) -> Tensor:
    """A text encoder's token ids; `tokens` is their axis."""
    return Tensor(name="input_ids", dtype=INT, axes=(tokens,), example=example)


def attention_mask(tokens: str) -> Tensor:
    """A text encoder's mask: 1 for a token of the prompt, 0 for padding."""
    return Tensor(name="attention_mask", dtype=INT, axes=(tokens,), example="mask")


# Of a transformer, by diffusers' names: blocks differ between the first and the last of a list at most.
_KEPT_LAYERS = {
    "transformer_blocks": (0, -1),
    "single_transformer_blocks": (0,),
    "layers": (0,),
    "context_refiner": (0,),
    "noise_refiner": (0,),
}


# Of a transformer's layers: what embeds, and the last one with what modulates it.
_UNQUANTIZED = (
    r"all_final_layer\.",
    r"all_x_embedder\.",
    r"cap_embedder\.",
    r"caption_projection\.",
    r"context_embedder\.",
    r"distilled_guidance_layer\.",
    r"img_in\.",
    r"norm_out\.",
    r"patch_embed\.",
    r"pos_embed\.",
    r"proj_out\.",
    r"t_embedder\.",
    r"time_embed\.",
    r"time_text_embed\.",
    r"time_guidance_embed\.",
    r"txt_in\.",
    r"x_embedder\.",
)
# What modulates the blocks: a quarter of FLUX.1's weights.
_MODULATION = (
    r".*\.adaLN_modulation\.",
    r".*\.(img|txt)_mod\.",
    r".*\.norm(1|1_context)?\.linear\.",
    r"(double|single)_stream_modulation",
)


def transformer(loader: str, *conditions: Tensor, wrapper: str) -> Component:
    """A transformer as a denoiser."""
    return Component(
        name="transformer",
        module="transformer",
        loader=loader,
        wrapper=wrapper,
        inputs=(SAMPLE, TIME, *conditions),
        outputs=(MODEL_OUTPUT,),
        tolerance=TOLERANCE,
        is_typed=True,
        kept_layers=_KEPT_LAYERS,
        # Calibration shows no reference images, whose tokens the scales of inputs would not be measured for.
        quantized=WEIGHTS_ONLY if set(REFERENCES) <= set(conditions) else (FP8, *WEIGHTS_ONLY),
        unquantized=_UNQUANTIZED,
        modulation=_MODULATION,
    )
