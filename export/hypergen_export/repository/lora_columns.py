"""Put LoRAs into the rank pools of an export while it is served, or take them out.

`python -m hypergen_export.repository.lora_columns REPOSITORY` reads a request as JSON from stdin: `clear` and `taken`
are columns as [first, count], those to empty and those of other LoRAs; `add` are files with names. For each file it
writes where the LoRA is (`first`, `columns`), which modules it changes (`changes`), or an `error`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.components import POOL_FILE
from hypergen_export.checkpoints.lora import Lora, Placement
from hypergen_export.conversion.pooling import PoolWeights
from hypergen_export.errors import BadLoraError

Columns = tuple[int, int]


def change_columns(repository: Path, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Change all pools of a repository; returns what became of each file. Raises OSError."""
    pools = _Pools(repository)
    for first, count in request["clear"]:
        pools.clear(first, count)
    taken = [(first, count) for first, count in request["taken"]]
    answers: list[dict[str, Any]] = []
    for entry in request["add"]:
        lora = Lora(name=entry["name"], file=Path(entry["file"]))
        try:
            first = pools.add(lora, taken)
        except BadLoraError as error:
            answers.append({"name": lora.name, "error": str(error).replace(f"{lora.file.parent}/", "")})
            continue
        except Exception as error:  # a malformed file must not keep the others from being served
            answers.append({"name": lora.name, "error": f"{lora.file.name}: is malformed ({type(error).__name__})"})
            continue
        taken.append((first, lora.rank))
        answers.append({"name": lora.name, "first": first, "columns": lora.rank, "changes": sorted(lora.modules)})
    pools.write()
    return answers


class _Pools:
    """The rank pools of a repository, in memory until they are written."""

    def __init__(self, repository: Path) -> None:
        files = sorted(repository.glob(f"*/1/{POOL_FILE}"))
        self._tensors = {pool: pool.read() for pool in (PoolWeights(file.parent) for file in files)}
        self._rank = next(iter(self._tensors)).rank
        self._modules = {pool.module for pool in self._tensors}

    def clear(self, first: int, count: int) -> None:
        for pool, tensors in self._tensors.items():
            pool.clear(first, count, tensors)

    def add(self, lora: Lora, taken: Iterable[Columns]) -> int:
        """Put a LoRA into free columns; returns the first. Raises BadLoraError."""
        for module in sorted(lora.modules - self._modules):
            raise BadLoraError(f"{lora.file}: changes {module}, which this model does not have")
        if not lora.is_low_rank:
            raise BadLoraError(f"{lora.file}: is a DoRA, has biases or a rank above 256: only --lora can serve it")
        first = _find_gap(lora.rank, self._rank, taken)
        if first is None:
            raise BadLoraError(f"{lora.file}: needs {lora.rank} columns of the rank pool, and too few are free")
        # Of a LoRA that was there before or whose change was interrupted, whichever layers this one changes.
        self.clear(first, lora.rank)
        try:
            for pool, tensors in self._tensors.items():
                pool.place(Placement(lora, first), tensors)
        except Exception:
            self.clear(first, lora.rank)
            raise
        return first

    def write(self) -> None:
        for pool, tensors in self._tensors.items():
            pool.write(tensors)


def _find_gap(count: int, rank: int, taken: Iterable[Columns]) -> int | None:
    """The first of `count` free columns in a row."""
    first = 0
    for begin, columns in sorted((*taken, (rank, 0))):
        if begin - first >= count:
            return first
        first = max(first, begin + columns)
    return None


if __name__ == "__main__":
    json.dump(change_columns(Path(sys.argv[1]), json.load(sys.stdin)), sys.stdout)
