"""Wrappers that give a checkpoint's modules the inputs and outputs of their components.

A wrapper does inside the graph what diffusers' pipeline does around the module, so the sampler exchanges finished
tensors and the decoder returns an image as bytes. Floating-point inputs and outputs are float32 whatever the module's
precision: the casts are part of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hypergen_export.checkpoints.components import Component
from hypergen_export.conversion.wrappers.chroma import Chroma
from hypergen_export.conversion.wrappers.clip import ClipPooled, PenultimateTextEncoder, PooledTextEncoder, TextEncoder
from hypergen_export.conversion.wrappers.flux1 import Flux1
from hypergen_export.conversion.wrappers.flux2 import Flux2, Flux2VaeDecoder, Flux2VaeEncoder
from hypergen_export.conversion.wrappers.gemma2 import Gemma2
from hypergen_export.conversion.wrappers.qwen3 import Flux2TextEncoder, QwenImageTextEncoder, ZImageTextEncoder
from hypergen_export.conversion.wrappers.qwen_image import QwenImage, QwenImageVaeDecoder, QwenImageVaeEncoder
from hypergen_export.conversion.wrappers.sana import DcVaeDecoder, DcVaeEncoder, Sana
from hypergen_export.conversion.wrappers.stable_diffusion_3 import StableDiffusion3
from hypergen_export.conversion.wrappers.t5 import T5
from hypergen_export.conversion.wrappers.unet import FeatureExportingUNet, ShallowUNet, UNet
from hypergen_export.conversion.wrappers.vae import TinyVaeDecoder, TinyVaeEncoder, VaeDecoder, VaeEncoder
from hypergen_export.conversion.wrappers.z_image import ZImage

# Component.wrapper, or the component's name -> wrapper of its module.
WRAPPERS: Mapping[str, Callable[[Any], nn.Module]] = {
    "text_encoder": TextEncoder,
    "penultimate_text_encoder": PenultimateTextEncoder,
    "pooled_text_encoder": PooledTextEncoder,
    "clip_pooled": ClipPooled,
    "t5": T5,
    "flux2_text_encoder": Flux2TextEncoder,
    "z_image_text_encoder": ZImageTextEncoder,
    "qwen_image_text_encoder": QwenImageTextEncoder,
    "gemma2": Gemma2,
    "unet": UNet,
    "feature_exporting_unet": FeatureExportingUNet,
    "unet_shallow": ShallowUNet,
    "flux1": Flux1,
    "chroma": Chroma,
    "flux2": Flux2,
    "stable_diffusion_3": StableDiffusion3,
    "stable_diffusion_3_without_t5": functools.partial(StableDiffusion3, has_t5=False),
    "z_image": ZImage,
    "qwen_image": QwenImage,
    "sana": Sana,
    "vae_decoder": VaeDecoder,
    "vae_encoder": VaeEncoder,
    "vae_decoder_per_channel": functools.partial(VaeDecoder, per_channel=True),
    "vae_encoder_per_channel": functools.partial(VaeEncoder, per_channel=True),
    "vae_decoder_shifted": functools.partial(VaeDecoder, shifted=True),
    "vae_encoder_shifted": functools.partial(VaeEncoder, shifted=True),
    "vae_encoder_unscaled": functools.partial(VaeEncoder, scaled=False),
    "vae_decoder_tiny": TinyVaeDecoder,
    "vae_encoder_tiny": TinyVaeEncoder,
    "vae_decoder_flux2": Flux2VaeDecoder,
    "vae_encoder_flux2": Flux2VaeEncoder,
    "vae_decoder_qwen_image": QwenImageVaeDecoder,
    "vae_encoder_qwen_image": QwenImageVaeEncoder,
    "vae_decoder_dc": DcVaeDecoder,
    "vae_encoder_dc": DcVaeEncoder,
}


def wrap(component: Component, module: Any) -> nn.Module:
    """Give the module the inputs and outputs of its component."""
    return WRAPPERS[component.wrapper or component.name](module)
