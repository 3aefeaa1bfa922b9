"""The miniature and its export: most tests only look at one."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import openvino
import pytest
import torch
import transformers
from filelock import FileLock

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.checkpoints.families.unet import STABLE_DIFFUSION, with_deep_cache
from hypergen_export.checkpoints.lora import Placement
from hypergen_export.conversion.convert import Job, convert
from hypergen_export.conversion.parity import Parity
from hypergen_export.conversion.progress import Progress
from hypergen_export.repository.export import ExportResult, export
from hypergen_export.repository.request import ExportRequest
from support.miniature import LATENT_CHANNELS, SAMPLE_SIZE, save_miniature

Array = npt.NDArray[Any]
Run = Callable[..., list[Array]]
COMPONENTS = {component.name: component for component in STABLE_DIFFUSION}
# Families beside 1.x, with what DeepCache needs: those that tests/end_to_end serves are exported whole, of the others
# the components whose graphs differ from all of these are converted.
EXPORTED: Mapping[str, tuple[str, ...]] = {
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", "unet_shallow"),
    "lcm": ("text_encoder", "unet", "vae_decoder", "vae_encoder", "unet_shallow"),
}
# The modules' files, as diffusers and transformers save them.
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
# Width of the text encoder of `wide`.
WIDE = 256
CONVERTED: Mapping[str, tuple[str, ...]] = {
    "sd-2": ("text_encoder", "unet"),
    "lcm-sdxl": ("unet",),
    "sd-inpainting": ("unet", "vae_encoder"),
    "sdxl-inpainting": ("unet",),
}
# Those of them that are converted in half precision, by which the UNet with the most inputs is held.
CONVERTED_DTYPES = {"lcm-sdxl": "float16"}


@pytest.fixture(scope="session")
def checkpoint_folder(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("sd-1")


@pytest.fixture(scope="session")
def checkpoint(checkpoint_folder: Path) -> Checkpoint:
    return open_checkpoint(str(checkpoint_folder))


@pytest.fixture(scope="session")
def repository(checkpoint_folder: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature in float32 for four images, with the components of `exported`. Read only: copy it."""
    output = Path(shutil.copytree(exported, tmp_path_factory.mktemp("exported") / "repository"))
    result = export(ExportRequest(model=str(checkpoint_folder), output=output, max_batch_size=4, model_id="tiny/one"))
    assert result == ExportResult(reused=tuple(COMPONENTS))
    return output


@dataclass(frozen=True)
class Converted:
    """Components of a family's miniature as ONNX, and how far each differs from torch; both by name."""

    checkpoint: Checkpoint
    dtype: str
    onnx: Mapping[str, Path]
    differences: Mapping[str, float]


@pytest.fixture(scope="session")
def converted(shared: Path, checkpoint_of: Callable[[str], Path]) -> Callable[[str], Converted]:
    """A family of CONVERTED -> its components there, without the rest of an export."""

    @functools.cache
    def make(family: str) -> Converted:
        checkpoint = open_checkpoint(str(checkpoint_of(family)))
        dtype = CONVERTED_DTYPES.get(family, "float32")
        files = {name: shared / "converted" / family / f"{name}.onnx" for name in CONVERTED[family]}
        with FileLock(shared / f"{family}.converted.lock"):
            record = shared / "converted" / f"{family}.json"
            if not record.exists():
                parity = {
                    name: convert_component(checkpoint, component_of(checkpoint, name), file, dtype)
                    for name, file in files.items()
                }
                record.write_text(json.dumps({name: entry.difference for name, entry in parity.items()}))
        return Converted(checkpoint, dtype, files, json.loads(record.read_text()))

    return make


def component_of(checkpoint: Checkpoint, name: str) -> Component:
    """A component of the checkpoint's family, DeepCache's among them."""
    (component,) = (each for each in with_deep_cache(checkpoint.family.components) if each.name == name)
    return component


def convert_component(
    checkpoint: Checkpoint,
    component: Component,
    onnx: Path,
    dtype: str = "float32",
    *,
    casts: bool = False,
    placements: Sequence[Placement] = (),
) -> Parity:
    """Write the ONNX file, for an engine's builder if the graph may cast weights, and compare it with torch."""
    onnx.parent.mkdir(parents=True, exist_ok=True)
    finish = (lambda *_: None) if casts else None
    job = Job(component=component, dtype=dtype, onnx=onnx, finish=finish, placements=placements)
    with closing(Progress(0)) as progress:
        return convert(checkpoint, [job], progress)[component.name]


@dataclass(frozen=True)
class ForEngines:
    """A component's file for an engine's builder, and how far it is from torch. Read only."""

    checkpoint: Checkpoint
    component: Component
    onnx: Path
    difference: float


@pytest.fixture(scope="session")
def for_engines(
    shared: Path, checkpoint_of: Callable[[str], Path], wide_folder: Path
) -> Callable[[str, str, str], ForEngines]:
    """A family, or `wide`, with a component and a precision -> its file for an engine's builder."""

    @functools.cache
    def make(family: str, name: str, dtype: str) -> ForEngines:
        checkpoint = open_checkpoint(str(wide_folder if family == "wide" else checkpoint_of(family)))
        component = component_of(checkpoint, name)
        folder = shared / "for-engines" / family / name / dtype
        record = folder / "difference.json"
        with FileLock(shared / f"{family}.{name}.{dtype}.lock"):
            if not record.exists():
                parity = convert_component(checkpoint, component, folder / "1" / "model.onnx", dtype, casts=True)
                record.write_text(json.dumps(parity.difference))
        return ForEngines(checkpoint, component, folder / "1" / "model.onnx", json.loads(record.read_text()))

    return make


@pytest.fixture(scope="session")
def wide_folder(shared: Path) -> Path:
    """A checkpoint whose modules have tensors above the size that is loaded. Read only."""
    folder = shared / "checkpoints" / "wide"
    with FileLock(shared / "wide.lock"):
        return folder if folder.exists() else _save_wide(folder)


@pytest.fixture(scope="session")
def wide_repository(shared: Path, wide_folder: Path) -> Path:
    """Its export in float32. Read only."""
    output = shared / "wide-repository"
    with FileLock(shared / "wide-repository.lock"):
        if not output.exists():
            export(ExportRequest(model=str(wide_folder), output=output))
    return output


def _save_wide(folder: Path) -> Path:
    save_miniature(folder)
    config = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.update({"hidden_size": WIDE, "intermediate_size": 2 * WIDE, "num_hidden_layers": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        modules = {
            "text_encoder": transformers.CLIPTextModel(config),
            "unet": diffusers.UNet2DConditionModel(
                sample_size=SAMPLE_SIZE,
                layers_per_block=1,
                block_out_channels=(32, 64, 128),
                down_block_types=("DownBlock2D",) * 3,
                up_block_types=("UpBlock2D",) * 3,
                norm_num_groups=8,
                cross_attention_dim=WIDE,
            ),
            "vae": diffusers.AutoencoderKL(
                latent_channels=LATENT_CHANNELS,
                block_out_channels=(96,) * 4,
                layers_per_block=0,
                norm_num_groups=8,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
        }
    for name, module in modules.items():
        shutil.rmtree(folder / name)
        module.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def wide(wide_folder: Path) -> Checkpoint:
    return open_checkpoint(str(wide_folder))


@pytest.fixture
def checkpoint_copy(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint to break. Times are kept, so that its export is still up to date."""
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "checkpoint"))


@pytest.fixture
def repository_copy(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "repository"))


@pytest.fixture(scope="session")
def engine(repository: Path) -> Callable[[str], Run]:
    """Component name -> the exported file in OpenVINO: torch tensors in, arrays out."""
    core = openvino.Core()

    @functools.cache
    def load(name: str) -> Run:
        path = repository / name / "1" / "model.onnx"
        compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = COMPONENTS[name].outputs

        def run(*inputs: torch.Tensor) -> list[Array]:
            results = compiled([tensor.numpy() for tensor in inputs])
            return [np.asarray(results[tensor.name]) for tensor in outputs]

        return run

    return load


@pytest.fixture(scope="session")
def components() -> dict[str, Component]:
    return COMPONENTS


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a json file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leftovers(folder: Path) -> list[str]:
    """What an unsuccessful export must not leave in `folder`: anything but what the test itself put there."""
    return sorted(path.name for path in folder.iterdir() if path.name != "checkpoint")
