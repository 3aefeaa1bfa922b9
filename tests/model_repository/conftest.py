"""A miniature checkpoint and its UNet in torch, for the sampler without Triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hypergen_sampler.conditioning import Array
from hypergen_sampler.sampling import DenoiserInputs


class TorchUNet:
    """The checkpoint's UNet as the step loop calls it, counting calls and the rows of each."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self.rows_of_calls: list[int] = []

    def __call__(self, rows: DenoiserInputs) -> dict[str, Array]:
        self.rows_of_calls.append(len(rows.sample))
        with torch.no_grad():
            output = self._unet(
                torch.from_numpy(rows.sample),
                torch.from_numpy(rows.timestep),
                torch.from_numpy(rows.conditions["encoder_hidden_states"]),
                return_dict=False,
            )[0]
        return {"model_output": np.asarray(output.numpy())}


@pytest.fixture
def unet(pipeline: Any) -> TorchUNet:
    return TorchUNet(pipeline.unet)
