"""`--lora-dir`: LoRA files that come and go while the model is served.

The embedded Triton serves a copy of the export, made of links, whose rank pool is written again when other LoRAs are to
be in it. The engines read it and go on serving meanwhile; then the sampler's table of LoRAs is replaced. A LoRA that
goes leaves the table first, and its columns are free once no request uses them.

Files for which the pool has no room are served all the same: a request that names one waits until it has taken the
place of those that were not used for longest.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from hypergen_gateway.concurrency import run_with_timeout
from hypergen_gateway.embedded.environment import child_environment
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.lora_pool import LoraPool, Use
from hypergen_gateway.embedded.processes import dying_with_parent, module_command
from hypergen_gateway.errors import InvalidRequestError, UnavailableError
from hypergen_gateway.generation.backend import Lora
from hypergen_gateway.storage.lora_files import requested_name
from hypergen_gateway.triton.client import SAMPLER, TritonBackend, to_lora

logger = logging.getLogger(__name__)

SCAN_SECONDS = 1.0
WAIT_SECONDS = 0.1
RETRY_SECONDS = 10.0
# Limits of one change: the exporter reads the files and writes the pools, then the engines read those.
EXPORTER_SECONDS = 600.0
ENGINES_SECONDS = 300.0
# How long a request waits until its LoRAs are in the pool.
REQUEST_SECONDS = 120.0
POOL_FILE = "lora_pool.safetensors"
_RECORD = "hypergen.json"
_COLUMNS = "hypergen_export.repository.lora_columns"
# Size and times of a file: another file of that name is another LoRA. Archives and `cp -p` give files of one size the
# same modification time, and one that could not be read has changed when it may be; the kernel sets the change time.
# Not the inode: some network file systems number their files anew.
Version = tuple[int, int, int]


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


@dataclass(frozen=True)
class _File:
    """A LoRA file in the folder."""

    name: str
    path: Path
    version: Version
    problem: str = ""
    """Why it cannot be served, as far as its name and kind say."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that waits until its LoRAs are in the pool; then `placed` is set and the pool keeps them."""

    use: Use
    placed: asyncio.Future[None]


class LoraFolder:
    """Keeps the LoRAs of a served repository equal to the files of `folder`."""

    def __init__(self, folder: Path, repository: Path, backend: TritonBackend) -> None:
        self._folder = folder
        self._repository = repository
        self._backend = backend
        self._configured, self._pool = _read_sampler_config(repository)
        self._seen: dict[_File, float] = {}
        self._failed: dict[str, None] = {}  # names of files, the one that was tried last at the end
        self._known: dict[str, _File] = {}
        self._loras: dict[str, Lora] = {}
        self._rejected: dict[str, str] = {}
        self._waiting: list[_Waiting] = []
        self._due = set[str]()  # LoRAs that no more requests may use, until they have made room for others
        self._wake = asyncio.Event()
        backend.hold_loras = self.hold

    async def follow(self) -> None:
        """Serve what the folder holds, and follow it until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self._update()
            except Exception:  # whatever it is, the folder is followed on
                logger.exception("The LoRAs in %s cannot be updated; trying again", self._folder)
                self._stop_waiting_for_room()
                await asyncio.sleep(RETRY_SECONDS)
            with contextlib.suppress(TimeoutError):
                await run_with_timeout(self._wake.wait(), SCAN_SECONDS)

    @contextlib.asynccontextmanager
    async def hold(self, names: Iterable[str]) -> AsyncIterator[None]:
        """Keep a request's LoRAs in the pool, those of the folder, and wait until they are there.

        Raises:
            InvalidRequestError: one is not served any more, or they do not fit into the pool together.
            UnavailableError: they cannot be there in time.
        """
        use = Use(frozenset(names) - {entry["name"] for entry in self._configured})
        if self._may_begin(use):
            self._pool.begin(use)
        else:
            await self._wait_until_placed(use)
        try:
            yield
        finally:
            self._pool.end(use)
            if self._waiting:
                self._wake.set()

    async def _wait_until_placed(self, use: Use) -> None:
        waiting = _Waiting(use, asyncio.get_running_loop().create_future())
        self._check(use)
        self._waiting.append(waiting)
        self._wake.set()
        try:
            await run_with_timeout(waiting.placed, REQUEST_SECONDS)
        except TimeoutError as error:
            raise UnavailableError(
                f"The rank pool has had no room for {_listed(use.names)} in time. Try again later.",
                retry_after=5.0,
            ) from error
        except BaseException:
            self._pool.end(use)
            raise
        finally:
            self._waiting.remove(waiting)

    def _may_begin(self, use: Use) -> bool:
        return self._pool.has(use.names) and not use.names & self._due

    def _check(self, use: Use) -> None:
        """Raise InvalidRequestError for LoRAs that cannot be in the pool together, however long a request waits."""
        for name in sorted(use.names - self._loras.keys()):
            why = self._rejected.get(name, "it is not served any more")
            raise InvalidRequestError(f"Invalid value for 'loras': {name!r}: {why}.", "loras")
        needed = sum(self._loras[name].columns for name in use.names)
        if needed > len(self._pool.columns):
            raise InvalidRequestError(
                f"Invalid value for 'loras': {_listed(use.names)} have a rank of {needed} together, and the rank pool "
                f"has {len(self._pool.columns)} columns.",
                "loras",
            )

    async def _update(self) -> None:
        """Serve the files that have been as they are for a second: others may still be written."""
        found = await asyncio.to_thread(self._scan)
        now = time.monotonic()
        self._seen = {file: self._seen.get(file, now) for file in found.values()}
        settled = [file for file, since in self._seen.items() if now - since >= SCAN_SECONDS]
        if gone := self._known.keys() - found.keys():
            self._forget(gone)
        # One that replaces another: that is served until this one is.
        new = [file for file in settled if self._known.get(file.name) != file]
        unsure = self._failed.keys() | {file.name for file in new}
        wanted = [file for file in self._make_room() if file.name not in unsure]
        self._admit()
        # By themselves, as whatever a new file does to the exporter must not keep requests waiting.
        for files in (wanted, new or self._next_failed(settled)):
            if files:
                self._stop_waiting_for_room()  # what follows may take long
                await self._add(files)
                self._admit()

    def _next_failed(self, settled: Iterable[_File]) -> list[_File]:
        """One file to try again, if any: by itself, as another one may be why it failed."""
        files = {file.name: file for file in settled}
        return [files[name] for name in self._failed if name in files][:1]

    def _scan(self) -> dict[str, _File]:
        files: dict[str, _File] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            with contextlib.suppress(OSError):
                status = path.stat()
                name = requested_name(path)
                problem = ""
                if not stat.S_ISREG(status.st_mode):
                    problem = "it is not a file"
                elif not name:
                    problem = "its name must have a letter from a to z or a digit"
                elif name in files:
                    problem = f"its name in requests would be {name}, which {files[name].path.name} has"
                elif name in {entry["name"] for entry in self._configured}:
                    problem = "another LoRA has this name"
                name = path.name if problem else name
                files[name] = _File(name, path, (status.st_size, status.st_mtime_ns, status.st_ctime_ns), problem)
        return files

    def _forget(self, names: Iterable[str]) -> None:
        """No request may name them from now on; their columns stay as they are while requests use them."""
        leaving = sorted(self._loras.keys() & set(names))
        for name in names:
            self._pool.remove(name)
            for known in (self._known, self._loras, self._rejected, self._failed):
                known.pop(name, None)
        self._publish()
        if leaving:
            logger.info("LoRAs removed: %s", ", ".join(leaving))

    def _make_room(self) -> list[_File]:
        """The files that waiting requests need in the pool, the first one first; others leave it for them.

        If those are in use all the time, the next requests that name them have to wait behind the one that needs room.
        """
        wanted: dict[str, _File] = {}
        self._due = set()
        kept = set[str]()
        columns = 0
        for waiting in self._waiting:
            try:
                self._check(waiting.use)
            except InvalidRequestError as error:  # of files that have changed since
                if not waiting.placed.done():
                    waiting.placed.set_exception(error)
                continue
            kept |= waiting.use.names
            missing = waiting.use.names - self._pool.held.keys() - wanted.keys()
            columns += sum(self._loras[name].columns for name in missing)
            evicted = self._pool.find_room(columns, keep=kept)
            if evicted is None:
                self._due = self._pool.find_due(columns, keep=kept)
                break
            for name in evicted:
                self._pool.remove(name)
            wanted |= {name: self._known[name] for name in sorted(missing)}
        if wanted:
            self._publish()
        return list(wanted.values())

    def _stop_waiting_for_room(self) -> None:
        """Let requests use all LoRAs in the pool again."""
        self._due = set()
        self._admit()

    def _admit(self) -> None:
        """Let requests begin whose LoRAs are in the pool now."""
        for waiting in self._waiting:
            if self._may_begin(waiting.use) and not waiting.placed.done():
                self._pool.begin(waiting.use)
                waiting.placed.set_result(None)

    async def _add(self, files: list[_File]) -> None:
        """Put files into the pool, as far as there is room."""
        fine = [file for file in files if not file.problem]
        request = {
            "free": self._pool.free,
            "add": [{"name": file.name, "file": str(file.path)} for file in fine],
        }
        added = {file.name for file in fine if self._known.get(file.name) != file or file.name in self._failed}
        self._known |= {file.name: file for file in files}
        rejected = {file.name: file.problem for file in files if file.problem}
        for name in added:
            self._failed.pop(name, None)
            self._failed[name] = None
        try:
            answers = await run_with_timeout(self._change_columns(request), EXPORTER_SECONDS)
            await run_with_timeout(self._wait_for_engines(), ENGINES_SECONDS)
        except Exception:
            late = added - self._loras.keys()  # others are served as they were before
            self._rejected |= rejected | dict.fromkeys(late, "it cannot be loaded now, as the log says; trying again")
            self._publish()
            raise
        for name in added:
            del self._failed[name]
        for answer in answers:
            rejected |= self._accept(answer)
        self._rejected |= rejected
        self._publish()
        for name, why in rejected.items():
            logger.warning("LoRA %s: %s", name, why)
        if served := sorted(added & self._loras.keys()):
            logger.info("LoRAs added: %s", ", ".join(served))

    def _accept(self, answer: Mapping[str, Any]) -> dict[str, str]:
        """Serve a LoRA as the exporter describes it; returns the reason if it cannot be served."""
        name = answer["name"]
        self._pool.remove(name)
        self._loras.pop(name, None)
        self._rejected.pop(name, None)
        if "error" in answer:
            return {name: answer["error"]}
        if answer["rank"] > len(self._pool.columns):
            needs = f"needs {answer['rank']} columns of the rank pool, which has {len(self._pool.columns)} for files"
            return {name: f"{self._known[name].path.name}: {needs}"}
        if answer["columns"]:
            self._pool.place(name, tuple(answer["columns"]))
        self._loras[name] = Lora(name=name, scale=1.0, columns=answer["rank"], changes=tuple(answer["changes"]))
        return {}

    async def _change_columns(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run the exporter, which writes the rank pools. Raises RuntimeError, ValueError."""
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent(*module_command(_COLUMNS), str(self._repository)),
            env=child_environment(os.environ),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, errors = await process.communicate(json.dumps(request).encode())
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode:
            reason = errors.decode("utf-8", "replace").strip()[-500:]
            raise RuntimeError(f"the exporter failed with exit code {process.returncode}: {reason}")
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

    def _publish(self) -> None:
        """Let requests name these LoRAs: first the sampler knows those in the pool, then the gateway all of them."""
        held = self._pool.held
        placed = [
            {"name": name, "scale": self._loras[name].scale, "columns": columns} for name, columns in held.items()
        ]
        table = self._repository / SAMPLER / "loras.json"
        new = table.with_suffix(".new")
        new.write_text(json.dumps([*self._configured, *placed]), encoding="utf-8")
        new.replace(table)
        own = [replace(lora, in_pool=name in held, is_of_folder=True) for name, lora in self._loras.items()]
        self._backend.loras = (*map(to_lora, self._configured), *own)
        self._backend.rejected_loras = dict(self._rejected)


def _read_sampler_config(repository: Path) -> tuple[list[Mapping[str, Any]], LoraPool]:
    """The LoRAs that the exporter has put into the repository, and the columns that they leave."""
    text = (repository / SAMPLER / "config.pbtxt").read_text(encoding="utf-8")
    parameters = text_format.Parse(text, model_config_pb2.ModelConfig()).parameters
    loras: list[Mapping[str, Any]] = json.loads(parameters["loras"].string_value)
    taken = {column for entry in loras for column in entry.get("columns", ())}
    return loras, LoraPool(frozenset(range(int(parameters["lora_rank"].string_value))) - taken)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
