"""Put LoRAs into the rank pools of an export while it is served.

`python -m hypergen_export.repository.lora_columns REPOSITORY` reads a request as JSON from stdin: `add` are files with
names, and `free` the columns that they may take. For each file it writes its `rank`, which modules it changes
(`changes`) and the `columns` that it has now, which are none if too few are free, or an `error`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.components import POOL_FILE
from hypergen_export.checkpoints.lora import Lora, Placement
from hypergen_export.conversion.pooling import PoolWeights
from hypergen_export.errors import BadLoraError


def change_columns(repository: Path, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Change all pools of a repository; returns what became of each file. Raises OSError."""
    pools = _Pools(repository, request["free"])
    answers: list[dict[str, Any]] = []
    for entry in request["add"]:
        lora = Lora(name=entry["name"], file=Path(entry["file"]))
        try:
            columns = pools.add(lora)
        except BadLoraError as error:
            answers.append({"name": lora.name, "error": str(error).replace(f"{lora.file.parent}/", "")})
        except Exception as error:  # a malformed file must not keep the others from being served
            answers.append({"name": lora.name, "error": f"{lora.file.name}: is malformed ({type(error).__name__})"})
        else:
            changes = sorted(lora.modules)
            answers.append({"name": lora.name, "rank": lora.rank, "changes": changes, "columns": columns})
    pools.write()
    return answers


class _Pools:
    """The rank pools of a repository, in memory until they are written."""

    def __init__(self, repository: Path, free: list[int]) -> None:
        files = sorted(repository.glob(f"*/1/{POOL_FILE}"))
        self._tensors = {pool: pool.read() for pool in (PoolWeights(file.parent) for file in files)}
        self._modules = {pool.module for pool in self._tensors}
        self._free = free
        self._has_changed = False

    def add(self, lora: Lora) -> list[int]:
        """Put a LoRA into free columns and return them; none if too few are free. Raises BadLoraError."""
        for module in sorted(lora.modules - self._modules):
            raise BadLoraError(f"{lora.file}: changes {module}, for which this model has no rank pool{lora.made_for}")
        if lora.embeddings:
            raise BadLoraError(
                f"{lora.file}: teaches the word {lora.embeddings[0][:64]}, which only --lora can add to the model"
            )
        if not lora.is_low_rank:
            raise BadLoraError(f"{lora.file}: is a DoRA, has biases or a rank above 256: only --lora can serve it")
        if lora.rank > len(self._free):  # a folder may have hundreds, which are not read before they are requested
            for pool in self._tensors:
                pool.check(lora)
            return []
        columns, rest = self._free[: lora.rank], self._free[lora.rank :]
        # Of a LoRA that was there before or whose change was interrupted, whichever layers this one changes.
        self._clear(columns)
        try:
            for pool, tensors in self._tensors.items():
                pool.place(Placement(lora, tuple(columns)), tensors)
        except Exception:
            self._clear(columns)
            raise
        self._free, self._has_changed = rest, True
        return columns

    def _clear(self, columns: list[int]) -> None:
        for pool, tensors in self._tensors.items():
            pool.clear(columns, tensors)

    def write(self) -> None:
        """Replace the files, which the engines then read again, unless nothing has changed."""
        if self._has_changed:
            for pool, tensors in self._tensors.items():
                pool.write(tensors)


if __name__ == "__main__":
    json.dump(change_columns(Path(sys.argv[1]), json.load(sys.stdin)), sys.stdout)
