"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.embeddings import Embedding
from hypergen_export.checkpoints.lora import Lora
from hypergen_export.engines.engine import ENGINES, OPENVINO, Size
from hypergen_export.repository.single_file import SingleFileOptions

# Quality already drops above about five.
_MAX_CACHE_INTERVAL = 10


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The options of an export. `max_batch_size` counts images; with guidance each takes several rows of a call.

    `sizes` are the image sizes to build, for engines that need them; empty for the checkpoint's default. `loras` are
    served beside the unmodified checkpoint; `lora_rank` is the least number of columns of the rank pool, for more LoRAs
    while serving. `deep_cache` adds a shallow UNet, for requests with `cache_interval`.
    `single_files` applies if `model` or another part is a single file. `vae` and `text_encoders`, a pipeline and files
    of single ones, replace the checkpoint's own. `preview_vae` decodes previews. `embeddings` are textual inversions
    that prompts may name.
    """

    model: str
    output: Path
    engine: str = OPENVINO.name
    dtype: str = "float32"
    max_batch_size: int = 8
    sizes: tuple[Size, ...] = ()
    model_id: str = ""
    loras: tuple[Lora, ...] = ()
    lora_rank: int = 0
    deep_cache: bool = False
    single_files: SingleFileOptions = field(default_factory=SingleFileOptions)
    vae: str | None = None
    preview_vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @property
    def source(self) -> dict[str, Any]:
        """What decides the images, apart from the engine: options with which the same can be exported in float32."""
        return {
            "model": _absolute(self.model),
            "vae": self.vae and _absolute(self.vae),
            "text_encoders": [_absolute(each) for each in self.text_encoders],
            "prediction_type": self.single_files.prediction_type,
            "embeddings": [f"{each.name}={each.file.absolute()}" for each in self.embeddings],
        }

    @property
    def settings(self) -> dict[str, str]:
        """The sampler's parameters that depend on the request alone."""
        return {
            "model_id": self.model_id or self.model,
            "engine": self.engine,
            "dtype": self.dtype,
            "device": ENGINES[self.engine].device,
            "embeddings": ",".join(embedding.name for embedding in self.embeddings),
            "max_cache_interval": str(_MAX_CACHE_INTERVAL if self.deep_cache else 1),
        }


def _absolute(place: str) -> str:
    """A path that is valid in any folder; ids of the hub stay as they are."""
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place
