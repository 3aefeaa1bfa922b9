"""`--lora-dir`: LoRA files that come and go while the model is served.

The embedded Triton serves a copy of the export, made of links, whose rank pool is written again when files change. The
engines read it and go on serving meanwhile; then the sampler's table of LoRAs is replaced. A LoRA that goes leaves
the table first, and its columns are free once no request uses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from hypergen_gateway.embedded.environment import child_environment
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.processes import die_with_parent
from hypergen_gateway.triton.client import SAMPLER, TritonBackend, to_lora

logger = logging.getLogger(__name__)

SCAN_SECONDS = 1.0
WAIT_SECONDS = 0.1
RETRY_SECONDS = 10.0
POOL_FILE = "lora_pool.safetensors"
_RECORD = "hypergen.json"
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9_.-]+")
# `python -m` without the current folder, as in `export_cache`.
_COLUMNS = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "import runpy; runpy.run_module('hypergen_export.repository.lora_columns', run_name='__main__', alter_sys=True)"
)
# Size and time of a file: another file of that name is another LoRA.
Version = tuple[int, int]


@contextlib.contextmanager
def served_copy(repository: Path) -> Iterator[Path]:
    """A copy of an exported repository, made of hard links beside it, whose files may be replaced.

    Raises:
        EmbeddedError: there can be no copy beside it.
    """
    repository = repository.resolve()  # "." has no name and no parent
    for abandoned in repository.parent.glob(f".{repository.name}.loras-*"):
        with contextlib.suppress(OSError), _locked(abandoned):
            shutil.rmtree(abandoned, ignore_errors=True)
    try:
        copy = Path(tempfile.mkdtemp(prefix=f".{repository.name}.loras-", dir=repository.parent))
    except OSError as error:
        raise EmbeddedError(
            f"--lora-dir serves a copy of {repository}, made of links beside it, and {repository.parent} cannot be "
            f"written to ({error.strerror})."
        ) from error
    try:
        with _locked(copy):
            ignore = shutil.ignore_patterns(_RECORD)
            shutil.copytree(repository, copy, copy_function=_link, ignore=ignore, dirs_exist_ok=True)
            for pool in copy.glob(f"*/1/{POOL_FILE}"):
                _let_follow(pool.parents[1] / "config.pbtxt")
            yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock that says that a server uses the folder. Raises OSError if another one does."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _let_follow(config: Path) -> None:
    """Let our OpenVINO backend follow the file of a model's rank pool."""
    new = config.with_suffix(".new")
    parameter = f'parameters {{ key: "FOLLOWED_WEIGHTS" value {{ string_value: "{POOL_FILE}" }} }}'
    new.write_text(f"{config.read_text(encoding='utf-8')}\n{parameter}\n", encoding="utf-8")
    new.replace(config)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _configured_loras(repository: Path) -> list[Mapping[str, Any]]:
    """The LoRAs that the exporter has put into the repository."""
    text = (repository / SAMPLER / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    loras: list[Mapping[str, Any]] = json.loads(config.parameters["loras"].string_value)
    return loras


@dataclass(frozen=True)
class _File:
    """A LoRA file in the folder."""

    name: str
    path: Path
    version: Version
    problem: str = ""
    """Why it cannot be served, as far as its name and kind say."""


class LoraFolder:
    """Keeps the LoRAs of a served repository equal to the files of `folder`."""

    def __init__(self, folder: Path, repository: Path, backend: TritonBackend) -> None:
        self._folder = folder
        self._repository = repository
        self._backend = backend
        self._entries: list[Mapping[str, Any]] = _configured_loras(repository)
        self._seen: dict[str, _File] = {}
        self._known: dict[str, _File] = {}
        self._placed = set[str]()
        self._busy: list[tuple[int, int, str]] = []

    async def follow(self) -> None:
        """Serve what the folder holds, and follow it until cancelled."""
        while True:
            try:
                await self._update()
            except (OSError, ValueError, RuntimeError):
                logger.exception("The LoRAs in %s cannot be updated; trying again", self._folder)
                await asyncio.sleep(RETRY_SECONDS)
            await asyncio.sleep(SCAN_SECONDS)

    async def _update(self) -> None:
        """Serve the files that have been as they are since the last scan: others may still be written."""
        found = await asyncio.to_thread(self._scan)
        settled = {name: file for name, file in found.items() if self._seen.get(name) == file}
        self._seen = found
        gone = [name for name, file in self._known.items() if found.get(name) != file]
        if gone:
            self._remove(gone)
        # What was rejected for lack of columns may fit now.
        again = self._backend.rejected_loras.keys() if self._has_freed_columns() else ()
        new = [file for name, file in settled.items() if self._known.get(name) != file or name in again]
        if new:
            await self._add(new)

    def _scan(self) -> dict[str, _File]:
        files: dict[str, _File] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            with contextlib.suppress(OSError):
                status = path.stat()
                name = _OTHER_CHARACTERS.sub("-", path.stem).strip("-")[:64]
                problem = ""
                if not stat.S_ISREG(status.st_mode):
                    problem = "it is not a file"
                elif not name:
                    problem = "its name must have a letter from a to z or a digit"
                elif name in files:
                    problem = f"its name in requests would be {name}, which {files[name].path.name} has"
                name = path.name if problem else name
                files[name] = _File(name, path, (status.st_size, status.st_mtime_ns), problem)
        return files

    def _has_freed_columns(self) -> bool:
        """Whether columns of removed LoRAs are used no more."""
        return any(not self._backend.uses(name) for _, _, name in self._busy)

    def _remove(self, names: Sequence[str]) -> None:
        """No request may name them from now on; their columns stay as they are while requests use them."""
        # A file may have the name of a LoRA that is not the folder's.
        leaving = [entry for entry in self._entries if entry["name"] in names and entry["name"] in self._placed]
        self._placed -= set(names)
        self._busy += [(entry["first"], entry["columns"], entry["name"]) for entry in leaving]
        self._known = {name: file for name, file in self._known.items() if name not in names}
        rejected = {name: why for name, why in self._backend.rejected_loras.items() if name not in names}
        self._publish([entry for entry in self._entries if entry not in leaving], rejected)
        if leaving:
            logger.info("LoRAs removed: %s", ", ".join(entry["name"] for entry in leaving))

    async def _add(self, files: Sequence[_File]) -> None:
        free = [(first, count) for first, count, name in self._busy if not self._backend.uses(name)]
        busy = [each for each in self._busy if self._backend.uses(each[2])]
        held = {entry["name"] for entry in self._entries}
        taken = [(entry["first"], entry["columns"]) for entry in self._entries if "columns" in entry]
        request = {
            "clear": free,
            "taken": [*taken, *((first, count) for first, count, _ in busy)],
            "add": [
                {"name": file.name, "file": str(file.path)}
                for file in files
                if file.name not in held and not file.problem
            ],
        }
        answers = await self._change_columns(request)
        self._busy = busy
        await self._wait_for_engines()
        placed = [{**answer, "scale": 1.0} for answer in answers if "error" not in answer]
        rejected = {answer["name"]: answer["error"] for answer in answers if "error" in answer}
        rejected |= {file.name: "another LoRA has this name" for file in files if file.name in held}
        rejected |= {file.name: file.problem for file in files if file.problem}
        self._known |= {file.name: file for file in files}
        self._placed |= {str(answer["name"]) for answer in placed}
        earlier = {name: why for name, why in self._backend.rejected_loras.items() if name not in self._placed}
        self._publish([*self._entries, *placed], {**earlier, **rejected})
        for name, why in rejected.items():
            logger.warning("LoRA %s: %s", name, why)
        if placed:
            logger.info("LoRAs added: %s", ", ".join(str(answer["name"]) for answer in placed))

    async def _change_columns(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run the exporter, which writes the rank pools. Raises RuntimeError, ValueError."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _COLUMNS, str(self._repository)),
            env=child_environment(os.environ),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=die_with_parent,
        )
        try:
            output, errors = await process.communicate(json.dumps(request).encode())
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode:
            raise RuntimeError(f"the exporter failed: {errors.decode('utf-8', 'replace').strip()[-500:]}")
        answers: list[dict[str, Any]] = json.loads(output)
        return answers

    async def _wait_for_engines(self) -> None:
        """Wait until every engine serves the pool that has been written."""
        for pool in self._repository.glob(f"*/1/{POOL_FILE}"):
            status = pool.stat()
            served = pool.with_name(f"{pool.name}.served")
            version = f"{status.st_ino}-{status.st_mtime_ns}"
            while not served.is_file() or served.read_text() != version:  # noqa: ASYNC110 - by another process
                await asyncio.sleep(WAIT_SECONDS)

    def _publish(self, entries: list[Mapping[str, Any]], rejected: Mapping[str, str]) -> None:
        """Let requests name these LoRAs: first the sampler knows them, then the gateway."""
        self._entries = entries
        table = self._repository / SAMPLER / "loras.json"
        new = table.with_suffix(".new")
        new.write_text(json.dumps(entries), encoding="utf-8")
        new.replace(table)
        self._backend.loras = tuple(map(to_lora, entries))
        self._backend.rejected_loras = dict(rejected)
