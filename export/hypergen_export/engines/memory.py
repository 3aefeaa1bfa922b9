"""GPU memory of a checkpoint's TensorRT engines, estimated from its configs and the headers of its weight files.

Weights are exact: every tensor that a component computes with, in the precision of its engine. Activations are an
estimate. An engine reserves the largest set of values that are alive at the same time, which is taken to be a multiple
of what the widest layer reads and writes for a token or a pixel. The multiples are those that TensorRT-RTX states when
it builds layers of the published widths (`tests/benchmarks/engine_memory.py`). Does not import torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component, LoraPool, Sizes
from hypergen_export.checkpoints.families.tensors import PREVIEW_DECODER
from hypergen_export.checkpoints.weights import stored_tensors, tensor_files
from hypergen_export.engines.profiles import Profile, Shapes, profiles
from hypergen_export.errors import BrokenCheckpointError

# CUDA's context, and what TensorRT and Triton allocate themselves. Assumed, not measured.
FIXED_BYTES = 2**30
# What `--max-batch-size` accepts at most, and the steps in which a fitting one is looked for.
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# By the wrapper of a denoiser: values that are alive at the same time, as a multiple of the widest layer's.
_LIVE = {
    "flux1": 3.2,
    "flux2": 2.0,
    "qwen_image": 2.0,
    "sana": 3.5,
    "stable_diffusion_3": 2.6,
    "stable_diffusion_3_without_t5": 2.6,
    "z_image": 4.0,
}
_LIVE_OTHERWISE = 4.0
_LIVE_CONVOLUTIONS = {"unet": 4.0, "vae_decoder": 1.7, "vae_encoder": 2.25}
# Scores of the VAE's only attention, before and after the softmax: its head is too wide for a fused kernel.
_SCORES = 2
# Layers that work on a vector for each image instead of each token, and tables.
_NOT_PER_TOKEN = re.compile(r"norm|modulation|distilled_guidance|(?:^|[._])mod[._]|embed|shared|time")
_TABLE = re.compile(r"(token|position)_embedding\.")
_OUTERMOST = {
    "vae_decoder": re.compile(r"decoder\.up_blocks\.(\d+)\."),
    "vae_encoder": re.compile(r"encoder\.down_blocks\.(0)\."),
    "vae_decoder_dc": re.compile(r"decoder\.up_blocks\.(0)\."),
    "unet": re.compile(r"up_blocks\.(\d+)\."),
}

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that one component's engine takes on the GPU, with weights in `dtype`."""

    name: str
    dtype: str
    weights: int
    activations: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint's components as engines in `dtype`."""

    checkpoint: Checkpoint
    components: Sequence[Component]
    dtype: str

    def needs(self, shapes: Shapes) -> list[Need]:
        """What each component takes for these shapes. Raises BrokenCheckpointError."""
        return [self._need(component, shapes) for component in self.components]

    def total(self, shapes: Shapes) -> int:
        """Bytes on the GPU, with what CUDA and Triton take themselves."""
        return FIXED_BYTES + sum(need.weights + need.activations for need in self.needs(shapes))

    def largest_batch(self, shapes: Shapes, limit: int) -> int:
        """The most images in a denoiser call of which all engines fit into `limit` bytes; 0 if one does not."""
        rows = self.checkpoint.family.guided_rows
        fitting = [images for images in BATCHES if self.total(replace(shapes, rows=rows * images)) <= limit]
        return max(fitting, default=0)

    def _need(self, component: Component, shapes: Shapes) -> Need:
        tensors = used_tensors(self.checkpoint, component)
        weights = sum(
            _elements(shape) * _item_bytes(component, self.dtype, name, shape) for name, shape in tensors.items()
        )
        dtype = component.weights_dtype(self.dtype)
        # A profile keeps its memory once it was used.
        live = sum(_live_values(component, tensors, profile, shapes.sizes) for profile in profiles(component, shapes))
        return Need(
            name=component.name,
            dtype=self.dtype if component.is_quantized(self.dtype) else dtype,
            weights=weights + _pool_elements(component, tensors) * _ITEM_BYTES[dtype],
            activations=int(live * _ITEM_BYTES[dtype]),
        )


def _item_bytes(component: Component, dtype: str, name: str, shape: Shape) -> int:
    """The bytes of a weight in an export in `dtype`: one where it is quantised."""
    is_layer = name.endswith(".weight") and len(shape) in (2, 4)
    if component.is_quantized(dtype) and is_layer and not component.keeps(name, dtype):
        return 1
    return _ITEM_BYTES[component.weights_dtype(dtype)]


def used_tensors(checkpoint: Checkpoint, component: Component) -> Mapping[str, Shape]:
    """Name -> shape of the tensors in the checkpoint that the component computes with. Raises BrokenCheckpointError."""
    tensors = _stored_tensors(checkpoint, component.module)
    return {name: shape for name, shape in tensors.items() if not name.startswith(component.unused)}


def parameters(checkpoint: Checkpoint, component: Component) -> int:
    """The elements of a component's module, used or not. Raises BrokenCheckpointError."""
    return sum(math.prod(shape) for shape in _stored_tensors(checkpoint, component.module).values())


def _stored_tensors(checkpoint: Checkpoint, module: str) -> Mapping[str, Shape]:
    folder, weights = checkpoint.folder_of(module), checkpoint.weights(module)
    if weights.format != "safetensors":
        raise BrokenCheckpointError(f"{folder}: only safetensors state what is in them, and these weights are pickled")
    stored = (tensor for file in tensor_files(folder, weights) for tensor in stored_tensors(file).values())
    return {tensor.name.removeprefix("model."): tensor.shape for tensor in stored}


def _elements(shape: Shape) -> int:
    """A three-dimensional convolution is cut to its last slice, as an image is one frame."""
    return math.prod(shape) // (shape[2] if len(shape) == 5 else 1)


def _pool_elements(component: Component, tensors: Mapping[str, Shape]) -> int:
    """The weights of a component's rank pool, in branches beside its linear layers and convolutions."""
    if component.pool is None:
        return 0
    weights = (shape for name, shape in tensors.items() if name.endswith(".weight") and not _TABLE.search(name))
    layers = [shape for shape in weights if len(shape) == 2 or (len(shape) == 4 and _has_branch(shape, component.pool))]
    return sum(component.pool.rank * (outputs + math.prod(inputs)) for outputs, *inputs in layers)


def _has_branch(convolution: Shape, pool: LoraPool) -> bool:
    return pool.kernels or set(convolution[2:]) == {1}


def _live_values(component: Component, tensors: Mapping[str, Shape], profile: Profile, sizes: Sizes) -> float:
    """Values that are alive at the same time in the largest call of a profile."""
    inputs = {name: bounds.largest for name, bounds in profile.items()}
    if component.module in ("vae", PREVIEW_DECODER.module):
        kind = "vae_decoder" if "latents" in inputs else "vae_encoder"
        rows, latent_pixels = _latents(inputs, sizes)
        blocks = component.wrapper if component.wrapper in _OUTERMOST else kind
        width = _LIVE_CONVOLUTIONS[kind] * _widest(_outermost(blocks, tensors))
        return rows * max(latent_pixels * sizes["vae_scale_factor"] ** 2 * width, _SCORES * latent_pixels**2)
    if component.module == "unet":
        rows, _, height, width = inputs["sample"]
        return rows * height * width * _LIVE_CONVOLUTIONS["unet"] * _widest(_outermost("unet", tensors))
    live = _LIVE.get(component.wrapper, _LIVE_OTHERWISE)
    return _tokens(inputs, sizes) * live * _widest(_per_token(tensors))


def _latents(inputs: Mapping[str, Shape], sizes: Sizes) -> tuple[int, float]:
    """Rows of a VAE's call, and how many pixels the latents of a row have."""
    if "latents" in inputs:
        rows, _, height, width = inputs["latents"]
        return rows, height * width
    rows, height, width, _ = inputs["image"]
    return rows, height * width / sizes["vae_scale_factor"] ** 2


def _tokens(inputs: Mapping[str, Shape], sizes: Sizes) -> int:
    """Tokens of a call: those of prompts, and for a denoiser those of the images."""
    if "sample" not in inputs:
        return math.prod(inputs["input_ids"][:2])
    rows, _, height, width = inputs["sample"]
    image = (height // sizes["patch_size"]) * (width // sizes["patch_size"])
    others = (inputs[name][1] for name in ("encoder_hidden_states", "references") if name in inputs)
    return rows * (image + sum(others))


def _widest(layers: Sequence[Shape]) -> int:
    """What the widest layer reads and writes."""
    return max(outputs + inputs for outputs, inputs, *_ in layers)


def _per_token(tensors: Mapping[str, Shape]) -> list[Shape]:
    """Linear layers, and convolutions of a pixel, which is a token."""
    matrices = {name: shape for name, shape in tensors.items() if len(shape) == 2 or shape[2:] == (1, 1)}
    return [shape for name, shape in matrices.items() if not _NOT_PER_TOKEN.search(name)]


def _outermost(component: str, tensors: Mapping[str, Shape]) -> list[Shape]:
    """The convolutions of the block that works on the most pixels; an AutoencoderTiny's are of one width."""
    convolutions = {name: shape for name, shape in tensors.items() if len(shape) >= 4}
    matches = ((_OUTERMOST[component].match(name), shape) for name, shape in convolutions.items())
    found = [(int(match[1]), shape) for match, shape in matches if match]
    if not found:
        return list(convolutions.values())
    last = max(block for block, _ in found)
    return [shape for block, shape in found if block == last]
