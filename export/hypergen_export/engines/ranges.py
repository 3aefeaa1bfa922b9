"""What the layers of a denoiser read while its diffusers pipeline generates images, and what eight bits cost then.

Computed in torch, layer by layer as the engine's graph has it: inputs with one scale for the whole tensor, weights with
one for each output channel, both symmetric. Importing this module imports torch and diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.merging import merge_lora
from hypergen_export.engines.accuracy import Array, relative_error
from hypergen_export.engines.calibration import HELD_OUT, IMAGES, generate
from hypergen_export.engines.formats import FORMATS, Format


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The largest magnitude of what each layer reads, by its name, and the error of all layers in such numbers."""

    magnitudes: Mapping[str, float]
    error: float


@torch.no_grad()
def measure_ranges(checkpoint: Checkpoint, component: Component, dtype: str, report: Callable[[float], None]) -> Ranges:
    """The ranges of a denoiser's linear layers and convolutions, but those that its family keeps.

    The error is that of calls that the ranges do not come from. Raises ConversionError, BrokenCheckpointError.
    """
    module = load_module(checkpoint, component)
    if component.lora:
        merge_lora(component.module, module, component.lora)
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not component.keeps(f"{name}.weight", dtype)
    }
    recorder = _Recorder(module, layers)
    for image, _ in enumerate(generate(checkpoint, component, module, report), start=1):
        if image == IMAGES - HELD_OUT:
            recorder.hold_out()
    recorder.stop()
    expected = [_arrays(call.output) for call in recorder.calls]
    _quantize(layers, recorder.magnitudes, FORMATS[dtype])
    given = [_arrays(module(*call.args, **call.kwargs)) for call in recorder.calls]
    return Ranges(magnitudes=recorder.magnitudes, error=relative_error(expected, given))


@dataclass(frozen=True)
class _Call:
    """A call of the denoiser as its pipeline makes it, and what it returned."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Any


class _Recorder:
    """Records what layers read, and after that what the whole module is called with."""

    def __init__(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.magnitudes: dict[str, float] = {}
        self.calls: list[_Call] = []
        self._module = module
        self._hooks = [layer.register_forward_pre_hook(self._watch(name)) for name, layer in layers.items()]

    def hold_out(self) -> None:
        """From now on record calls instead of ranges."""
        self.stop()
        self._hooks = [self._module.register_forward_hook(self._keep, with_kwargs=True)]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.magnitudes[name] = max(self.magnitudes.get(name, 0.0), float(inputs[0].abs().amax()))

        return watch

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Copies: schedulers may write to what a pipeline passes.
        self.calls.append(_Call(*tree_map(_copied, (args, kwargs, output))))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _arrays(output: Any) -> list[Array]:
    return [leaf.float().numpy() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _quantize(layers: Mapping[str, nn.Module], magnitudes: Mapping[str, float], form: Format) -> None:
    """Let the layers that were called compute with rounded weights and inputs."""
    for name, magnitude in magnitudes.items():
        weight, scale = layers[name].get_parameter("weight"), form.scale(torch.tensor(magnitude))
        scales = form.weight_scales(weight)
        weight.copy_(form.rounded(weight, scales.reshape(-1, *[1] * (weight.ndim - 1))))
        layers[name].register_forward_pre_hook(_rounding(form, scale))


def _rounding(form: Format, scale: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, inputs: (form.rounded(inputs[0], scale), *inputs[1:])
