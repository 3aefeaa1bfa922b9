"""Modules of a checkpoint with the inputs and outputs of the repository's contract.

Each wrapper takes a loaded module of transformers or diffusers and does inside the graph what diffusers' pipeline
does around it, so that the sampler exchanges finished tensors and a picture leaves the decoder as bytes. Floats go
in and out as float32 whatever the module computes in: the casts are part of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hypergen_export.checkpoints.components import Component

# No latent is divisible by 2**30, so a UNet that believes to have this many upsamplers takes, for every size,
# diffusers' forward_upsample_size path: each upsampler is told the size of the skip connection it must meet.
# The other path doubles sizes blindly and is right only for multiples of 2**levels; a traced graph has just one.
_ALWAYS_FORWARD_UPSAMPLE_SIZE = 30


class TextEncoder(nn.Module):
    """input_ids [B, L] -> encoder_hidden_states [B, L, D], the last layer's, normalised: what the UNet attends to."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states: Tensor = self.text_encoder(input_ids.to(torch.int64), return_dict=False)[0]
        return hidden_states.to(torch.float32)


class PenultimateTextEncoder(nn.Module):
    """input_ids [B, L] -> encoder_hidden_states [B, L, D], those before the last layer, as they are."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.text_encoder(input_ids.to(torch.int64), output_hidden_states=True)
        hidden_states: Tensor = output.hidden_states[-2]
        return hidden_states.to(torch.float32)


class PooledTextEncoder(nn.Module):
    """input_ids [B, L] -> those hidden states, and text_embeds [B, P], the projection of the whole prompt."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.text_encoder(input_ids.to(torch.int64), output_hidden_states=True)
        return output.hidden_states[-2].to(torch.float32), output.text_embeds.to(torch.float32)


class _Deep:
    """What lies between the two ends of a UNet: kept by one that tells of it, taken by one that lacks it."""

    features: Tensor


class _Given:
    """What is handed to a wrapper, for a part of the module that would else have computed it."""

    time: Tensor
    size_embeds: Tensor


class _TimeProjection(nn.Module):
    """In the place of diffusers' `Timesteps`."""

    def __init__(self, given: _Given, name: str) -> None:
        super().__init__()
        self._given, self._name = given, name

    def forward(self, _: Tensor) -> Tensor:
        embedding: Tensor = getattr(self._given, self._name)
        return embedding


class UNet(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D] -> model_output [B, C, h, w].

    The others only where its config wants them: timestep_cond [B, G], text_embeds [B, P], size_embeds [B, 6 × S]; and
    where it is a `ShallowUNet`, deep_features [B, D, h, w]. `time` and `size_embeds` are sines and cosines of the
    timestep and of six sizes, which whoever calls computes: in bfloat16 their angles would be rounded.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        unet.num_upsamplers = _ALWAYS_FORWARD_UPSAMPLE_SIZE
        self._given = _Given()
        unet.time_proj = _TimeProjection(self._given, "time")
        unet.add_time_proj = _TimeProjection(self._given, "size_embeds")
        self.unet = unet
        self._deep = _Deep()

    def forward(  # noqa: PLR0913 - diffusers' inputs
        self,
        sample: Tensor,
        time: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        size_embeds: Tensor | None = None,
        deep_features: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        # What is embedded stays float32 until diffusers casts it.
        dtype = self.unet.dtype
        self._given.time = time
        if size_embeds is not None:
            self._given.size_embeds = size_embeds
        if deep_features is not None:
            self._deep.features = deep_features.to(dtype)
        model_output: Tensor = self.unet(
            sample.to(dtype),
            time[:, 0],
            encoder_hidden_states.to(dtype),
            timestep_cond=None if timestep_cond is None else timestep_cond.to(dtype),
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": size_embeds},
            return_dict=False,
        )[0]
        return self._answer(model_output.to(torch.float32))

    def _answer(self, model_output: Tensor) -> Tensor | tuple[Tensor, ...]:
        return model_output


class FeatureExportingUNet(UNet):
    """A UNet -> also deep_features [B, D, h, w]: what enters the last layer of the last block from below."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        # Beside it enters, along the channels, what conv_in made.
        beside = unet.conv_in.out_channels

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            self._deep.features = given[0][:, : given[0].shape[1] - beside]

        unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(keep)

    def _answer(self, model_output: Tensor) -> tuple[Tensor, ...]:
        return model_output, self._deep.features.to(torch.float32)


class ShallowUNet(UNet):
    """A UNet that is given its deep features: its first convolution, the last layer of its last block and what follows.

    It remains a UNet of diffusers, which does the rest: embeddings of time, size and text above all.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        last = unet.up_blocks[-1]
        last.resnets = last.resnets[-1:]
        if getattr(last, "attentions", None) is not None:
            last.attentions = last.attentions[-1:]
        unet.down_blocks, unet.up_blocks = nn.ModuleList(), nn.ModuleList([last])
        unet.mid_block = _CachedMidBlock(self._deep)


class _CachedMidBlock(nn.Module):
    """In the place of a UNet's middle."""

    has_cross_attention = False

    def __init__(self, deep: _Deep) -> None:
        super().__init__()
        self._taken = deep

    def forward(self, *_: Tensor) -> Tensor:
        return self._taken.features


class VaeDecoder(nn.Module):
    """latents [B, C, h, w] as the scheduler leaves them -> image [B, H, W, 3] uint8.

    `per_channel`: the pipeline heeds a mean and a standard deviation of the latents, where the config states them.
    """

    def __init__(self, vae: Any, *, per_channel: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.scale, self.shift = _scale_and_shift(vae.config, per_channel)

    def forward(self, latents: Tensor) -> Tensor:
        unscaled = (latents / self.scale + self.shift).to(self.vae.dtype)
        decoded: Tensor = self.vae.decode(unscaled, return_dict=False)[0].to(torch.float32)
        unit = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (unit * 255).round().to(torch.uint8)


class VaeEncoder(nn.Module):
    """image [B, H, W, 3] uint8 -> mean and std [B, C, h, w] of the posterior, in the scheduler's scale."""

    def __init__(self, vae: Any, *, per_channel: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.scale, self.shift = _scale_and_shift(vae.config, per_channel)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # Cast first: of bytes, TensorRT knows nothing but the cast.
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) / 255 * 2 - 1
        posterior = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        mean, std = posterior.mean.to(torch.float32), posterior.std.to(torch.float32)
        return (mean - self.shift) * self.scale, std * self.scale


def _scale_and_shift(config: Any, per_channel: bool) -> tuple[float | Tensor, float | Tensor]:
    """Latents of the scheduler are (latents of the VAE - shift) * scale. No pipeline of a UNet heeds `shift_factor`."""
    scale = float(config.scaling_factor)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if not per_channel or mean is None or std is None:
        return scale, 0.0
    return scale / torch.tensor(std).view(1, -1, 1, 1), torch.tensor(mean).view(1, -1, 1, 1)


# Component.wrapper, or its name -> what is put around its module.
WRAPPERS: Mapping[str, Callable[[Any], nn.Module]] = {
    "text_encoder": TextEncoder,
    "penultimate_text_encoder": PenultimateTextEncoder,
    "pooled_text_encoder": PooledTextEncoder,
    "unet": UNet,
    "telling_unet": FeatureExportingUNet,
    "unet_shallow": ShallowUNet,
    "vae_decoder": VaeDecoder,
    "vae_encoder": VaeEncoder,
    "vae_decoder_per_channel": functools.partial(VaeDecoder, per_channel=True),
    "vae_encoder_per_channel": functools.partial(VaeEncoder, per_channel=True),
}


def wrap(component: Component, module: Any) -> nn.Module:
    """The module with the inputs and outputs of its row in the table."""
    return WRAPPERS[component.wrapper or component.name](module)
