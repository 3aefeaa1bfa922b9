"""Cut a large module to a few of its layers, so that torch can run them beside an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def cut(module: nn.Module, kept_layers: Mapping[str, Sequence[int]]) -> None:
    """Keep some layers of the module's lists of layers: the end of a list's path -> the kept indices.

    A UNet that lost its deepest blocks keeps working, without its mid block.
    """
    for path, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            full = f"{path}.{name}"
            for ending, kept in kept_layers.items():
                if isinstance(child, nn.ModuleList) and f".{full}".endswith(f".{ending}"):
                    setattr(parent, name, _keep(child, kept))
    if hasattr(module, "mid_block") and "up_blocks" in kept_layers:
        _close_unet(module)


def _keep(layers: nn.ModuleList, kept: Sequence[int]) -> nn.ModuleList:
    """The kept layers, each once and in their order: a list may have fewer layers than indices."""
    indices = sorted({index % len(layers) for index in kept if -len(layers) <= index < len(layers)})
    return nn.ModuleList(layers[index] for index in indices)


def _close_unet(unet: Any) -> None:
    """Let the last of the kept down blocks lead to the first of the kept up blocks, at one resolution."""
    unet.down_blocks[-1].downsamplers = None
    first = unet.up_blocks[0].resnets[0]
    skipped = unet.down_blocks[-1].resnets[-1].out_channels
    unet.mid_block = _Widening(first.in_channels - skipped)


class _Widening(nn.Module):
    """Replaces a UNet's mid block: repeats the channels up to those that the next block takes."""

    has_cross_attention = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._channels = channels

    def forward(self, sample: Tensor, *_: Tensor) -> Tensor:
        repeats = -(-self._channels // sample.shape[1])
        return sample.repeat(1, repeats, 1, 1)[:, : self._channels]
