"""An independent implementation of DeepCache (Ma et al., 2023) in diffusers' UNet, as a reference for ours.

The UNet keeps all its modules. In most steps the deep ones return their earlier outputs, as in the authors' package
for diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deep_features_reused(unet: Any, interval: int) -> Iterator[None]:
    """While it lasts, only the first of every `interval` calls of the UNet goes into its depth."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def repeat_answers_of(module: Any) -> None:
        answers: list[Any] = []
        forward = module.forward

        def answer(*args: Any, **kwargs: Any) -> Any:
            if (calls - 1) % interval == 0:
                answers[:] = [forward(*args, **kwargs)]
            return answers[0]

        module.forward = answer

    modules = _deep_modules(unet)
    hook = unet.register_forward_pre_hook(count)
    for module in modules:
        repeat_answers_of(module)
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            del module.forward  # the instance's, which hid the class's


def _deep_modules(unet: Any) -> list[torch.nn.Module]:
    last = unet.up_blocks[-1]
    attentions = getattr(last, "attentions", None) or []
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks[:-1], *last.resnets[:-1], *attentions[:-1]]
