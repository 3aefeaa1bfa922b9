"""Wrappers of UNets, whole and cut for DeepCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# No latent size is divisible by 2**30, so with this `num_upsamplers` a UNet takes diffusers' forward_upsample_size path
# for every size: each upsampler is given the size of its skip connection. The other path doubles sizes, which is right
# only for multiples of 2**levels, and a traced graph contains only one path.
_ALWAYS_FORWARD_UPSAMPLE_SIZE = 30


class _DeepFeatures:
    """Deep features: stored by a UNet that outputs them, read by a shallow one."""

    features: Tensor


class _Embeddings:
    """Embeddings given to the wrapper instead of being computed by the module."""

    time: Tensor
    size_embeds: Tensor


class _TimeProjection(nn.Module):
    """Replaces diffusers' `Timesteps`; returns the given embedding."""

    def __init__(self, embeddings: _Embeddings, name: str) -> None:
        super().__init__()
        self._embeddings, self._name = embeddings, name

    def forward(self, _: Tensor) -> Tensor:
        embedding: Tensor = getattr(self._embeddings, self._name)
        return embedding


class UNet(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D] -> model_output [B, C, h, w].

    Further inputs if the config requires them: timestep_cond [B, G], text_embeds [B, P], size_embeds [B, 6 × S],
    masked_image [B, 1 + C, h, w] or image_latents [B, C, h, w], which are further channels of the sample; for a
    `ShallowUNet` also deep_features [B, D, h, w]. `time` and `size_embeds` are sinusoidal embeddings of the timestep
    and of six sizes. The caller computes them, since their angles would be rounded in bfloat16.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        unet.num_upsamplers = _ALWAYS_FORWARD_UPSAMPLE_SIZE
        self._embeddings = _Embeddings()
        unet.time_proj = _TimeProjection(self._embeddings, "time")
        unet.add_time_proj = _TimeProjection(self._embeddings, "size_embeds")
        self.unet = unet
        self._deep = _DeepFeatures()

    def forward(  # noqa: PLR0913 - diffusers' inputs
        self,
        sample: Tensor,
        time: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        size_embeds: Tensor | None = None,
        masked_image: Tensor | None = None,
        image_latents: Tensor | None = None,
        deep_features: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        # Embeddings stay float32 until diffusers casts them.
        dtype = self.unet.dtype
        self._embeddings.time = time
        if size_embeds is not None:
            self._embeddings.size_embeds = size_embeds
        if deep_features is not None:
            self._deep.features = deep_features.to(dtype)
        channels = torch.cat([each for each in (sample, masked_image, image_latents) if each is not None], dim=1)
        model_output: Tensor = self.unet(
            channels.to(dtype),
            time[:, 0],
            encoder_hidden_states.to(dtype),
            timestep_cond=None if timestep_cond is None else timestep_cond.to(dtype),
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": size_embeds},
            return_dict=False,
        )[0]
        return self._outputs(model_output.to(torch.float32))

    def _outputs(self, model_output: Tensor) -> Tensor | tuple[Tensor, ...]:
        return model_output


class FeatureExportingUNet(UNet):
    """A UNet that also returns deep_features [B, D, h, w]: the input of the last block's last layer."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        # The layer's input is concatenated with conv_in's output, its skip connection, along the channels.
        skip_channels = unet.conv_in.out_channels

        def store(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._deep.features = inputs[0][:, : inputs[0].shape[1] - skip_channels]

        unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(store)

    def _outputs(self, model_output: Tensor) -> tuple[Tensor, ...]:
        return model_output, self._deep.features.to(torch.float32)


class ShallowUNet(UNet):
    """A UNet that takes its deep features as an input.

    Keeps the first convolution, the last layer of the last block and the layers after it. It is still a UNet of
    diffusers, which computes the embeddings of time, size and text.
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
    """Replaces a UNet's mid block; returns the given deep features."""

    has_cross_attention = False

    def __init__(self, deep: _DeepFeatures) -> None:
        super().__init__()
        self._deep = deep

    def forward(self, *_: Tensor) -> Tensor:
        return self._deep.features
