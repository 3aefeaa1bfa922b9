"""Machines as people have them: whatever paths, folders and variables surround a server, it starts, and obeys no other.

The real tritonserver starts one small model each time, which tells what it sees.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import psutil
import pytest
from openvino import opset13 as ops

from hypergen_gateway.embedded import supervisor
from hypergen_gateway.embedded.environment import absolute_folders, child_environment
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import find_installation
from hypergen_gateway.embedded.server import STANDSTILL_SECONDS, Launch, TritonServer, free_ports
from hypergen_gateway.embedded.supervisor import embedded_triton
from support.running_server import free_port

MODEL = """
import json, os, sys
import numpy
from pathlib import Path

try:
    import only_here
except ImportError:
    only_here = None

class TritonPythonModel:
    def initialize(self, args):
        seen = {"path": sys.path, "folder": os.getcwd(), "variables": dict(os.environ), "has_package": bool(only_here)}
        Path(os.environ["HYPERGEN_TEST_SEEN"]).write_text(json.dumps(seen))

    def execute(self, requests):
        return []
"""
# What shells, search paths and interpreters take otherwise than it is written.
ODD_NAMES = ("a b (c) $HOME & jürgen; `id` *?[d]", "'a\nb\":c\\~%")
# A command that a shell or an interpreter would run, were it to obey; the file would be there then.
TRAP = 'open({!r}, "w").close()'


@pytest.fixture
def seen_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "seen.json"
    monkeypatch.setenv("HYPERGEN_TEST_SEEN", str(file))
    return file


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder for this server alone: tests in other processes start some, too."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def make_repository(folder: Path) -> Path:
    version = folder / "telling" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (folder / "telling" / "config.pbtxt").write_text('name: "telling"\nbackend: "python"\n')
    return folder


def add_openvino_model(repository: Path) -> None:
    """Add a model whose Python file is that of our backend."""
    version = repository / "positive" / "1"
    version.mkdir(parents=True)
    x = ops.parameter([-1, 4], np.float32, name="x")
    openvino.save_model(openvino.Model([ops.result(ops.relu(x), name="y")], [x], "positive"), version / "model.xml")
    tensors = "".join(
        f'{kind} {{ name: "{name}" data_type: TYPE_FP32 dims: 4 }} ' for kind, name in (("input", "x"), ("output", "y"))
    )
    (repository / "positive" / "config.pbtxt").write_text(
        f'name: "positive" backend: "openvino" max_batch_size: 2 default_model_filename: "model.xml" {tensors}'
    )


def run(repository: Path, meanwhile: Callable[[], None] = lambda: None, *, seconds: float = 60.0) -> None:
    """Start a server and end it again; `meanwhile` is called while it is ready."""

    async def start_and_stop() -> None:
        async with embedded_triton(repository, start_timeout=seconds):
            await asyncio.to_thread(meanwhile)

    asyncio.run(start_and_stop())


def seen_by_model(repository: Path, file: Path) -> dict[str, Any]:
    run(repository)
    seen: dict[str, Any] = json.loads(file.read_text())
    return seen


class TestPaths:
    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_a_repository_may_lie_anywhere(self, name: str, tmp_path: Path, seen_file: Path, place: Path) -> None:
        run(make_repository(tmp_path / name))
        assert seen_file.exists()
        assert not list(place.iterdir())

    def test_a_relative_repository_is_that_of_the_current_folder(
        self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_repository(tmp_path / "repository")
        monkeypatch.chdir(tmp_path)
        run(Path("repository"))
        assert seen_file.exists()

    @pytest.mark.parametrize("name", ["jürgen's packages", "a:b"])
    def test_packages_may_lie_anywhere(
        self, name: str, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As with `pip install --user`, or in an environment under such a path."""
        (tmp_path / name).mkdir()
        (tmp_path / name / "only_here.py").touch()
        monkeypatch.syspath_prepend(tmp_path / name)
        seen = seen_by_model(make_repository(tmp_path / "repository"), seen_file)
        assert seen["has_package"]
        assert all(path.isascii() for path in seen["path"])

    def test_a_temporary_folder_that_no_shell_takes_is_not_used(
        self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a b").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a b"))
        seen = seen_by_model(make_repository(tmp_path / "repository"), seen_file)
        assert Path(seen["folder"]).parent in (Path("/tmp"), Path("/var/tmp"))


class TestCurrentFolder:
    def test_no_module_of_it_is_run(self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not even where a search path has an empty entry, as `PYTHONPATH=$PYTHONPATH:/lib` often has."""
        checkpoint, trapped = tmp_path / "checkpoint", tmp_path / "trapped"
        checkpoint.mkdir()
        for module in ("json", "numpy", "site", "sitecustomize", "openvino", "triton_python_backend_utils"):
            (checkpoint / f"{module}.py").write_text(TRAP.format(str(trapped)))
        for program in ("bash", "env", "python3", "triton_python_backend_stub"):
            (checkpoint / program).write_text(f"#!/bin/sh\ntouch {trapped}\n")
            (checkpoint / program).chmod(0o755)
        monkeypatch.chdir(checkpoint)
        for name in ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH"):
            monkeypatch.setenv(name, f":.:{os.environ.get(name, '')}:")
        seen = seen_by_model(make_repository(tmp_path / "repository"), seen_file)
        assert not trapped.exists()
        assert str(checkpoint) not in seen["path"]
        assert Path(seen["folder"]).name.startswith("hypergen-triton-")
        for name in ("PATH", "LD_LIBRARY_PATH"):
            assert all(Path(entry).is_absolute() for entry in seen["variables"][name].split(":")), name

    def test_search_paths_keep_their_other_entries(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert absolute_folders(f":/bin:.:./:src:{tmp_path}:") == ["/bin", str(tmp_path / "src"), str(tmp_path)]
        assert child_environment({"PYTHONPATH": ":", "LD_LIBRARY_PATH": "", "A": "b"}) == {"PATH": os.defpath, "A": "b"}


class TestVariables:
    def test_no_proxy_comes_between(self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
            monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
        for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        run(make_repository(tmp_path / "repository"), seconds=15)
        assert seen_file.exists()

    def test_what_a_shell_would_run_at_its_start_is_not(
        self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "startup").write_text("exit 1\n")
        for name in ("BASH_ENV", "ENV"):
            monkeypatch.setenv(name, str(tmp_path / "startup"))
        monkeypatch.setenv("SHELLOPTS", "noexec")
        run(make_repository(tmp_path / "repository"), seconds=15)
        assert seen_file.exists()

    def test_there_may_be_no_path_no_home_and_no_locale(
        self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "USER", "LOGNAME"):
            monkeypatch.delenv(name, raising=False)
        seen = seen_by_model(make_repository(tmp_path / "repository"), seen_file)
        assert seen["variables"]["PATH"].endswith(os.defpath)
        assert seen["variables"]["HOME"] == seen["folder"]

    def test_what_python_itself_was_told_does_not_keep_a_model_from_its_packages(
        self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"PYTHONHOME": "/nowhere", "PYTHONWARNINGS": "error", "PYTHONNOUSERSITE": "1"}.items():
            monkeypatch.setenv(name, value)
        run(make_repository(tmp_path / "repository"), seconds=15)
        assert seen_file.exists()

    def test_models_are_triton_s_own_whatever_modules_lie_among_packages(
        self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It imports a model's file as `1.model` and a backend's as `model`, and searches their own folders last."""
        repository, packages, trapped = (tmp_path / name for name in ("repository", "packages", "trapped"))
        add_openvino_model(make_repository(repository))
        (packages / "1").mkdir(parents=True)
        for name in ("model", "1/model", "compilations"):
            (packages / f"{name}.py").write_text(TRAP.format(str(trapped)))
        (packages / "only_here.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(packages))
        monkeypatch.syspath_prepend(packages)
        assert seen_by_model(repository, seen_file)["has_package"]
        assert not trapped.exists()

    def test_a_loader_still_finds_the_libraries_that_the_user_named(
        self, tmp_path: Path, seen_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/mkl/lib")
        seen = seen_by_model(make_repository(tmp_path / "repository"), seen_file)
        *ours, last = seen["variables"]["LD_LIBRARY_PATH"].split(":")
        assert last == "/opt/mkl/lib"
        assert all(Path(seen["folder"]) in Path(each).parents for each in ours)


class TestTemporaryFolder:
    def test_a_server_whose_folder_was_deleted_comes_back_on_a_new_one(
        self, tmp_path: Path, seen_file: Path, place: Path
    ) -> None:
        def delete_it_and_kill_the_server() -> None:
            (first,) = place.iterdir()
            shutil.rmtree(first)
            seen_file.unlink()
            (server,) = [child for child in psutil.Process().children() if child.name() == "tritonserver"]
            server.kill()
            ends = time.monotonic() + 30
            while not seen_file.exists():
                assert time.monotonic() < ends
                time.sleep(0.05)
            (second,) = place.iterdir()
            assert second != first

        run(make_repository(tmp_path / "repository"), delete_it_and_kill_the_server)
        assert not list(place.iterdir())

    def test_other_users_can_read_neither_it_nor_the_shared_memory(
        self, tmp_path: Path, seen_file: Path, place: Path
    ) -> None:
        def look() -> None:
            (folder,) = place.iterdir()
            modes = {stat.S_IMODE(region.stat().st_mode) for region in Path("/dev/shm").glob(f"{folder.name}*")}
            assert modes == {0o600}
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

        run(make_repository(tmp_path / "repository"), look)
        assert seen_file.exists()


def test_too_little_shared_memory_is_said_before_an_export(tmp_path: Path) -> None:
    """Docker gives 64 MB, and some platforms less."""
    cache = tmp_path / "cache"
    serve = [sys.executable, "-m", "hypergen_gateway", "serve", "--port", str(free_port()), "--cache-dir", str(cache)]
    done = run_with_shared_memory("1m", *serve)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert "8 MiB of shared memory, and /dev/shm has 1.0 MiB left" in line
    assert "--shm-size" in line
    assert not list(cache.glob("emoji*"))


def test_shared_memory_without_a_limit_is_enough() -> None:
    """It states that it has no blocks, none of which are free."""
    check = "from hypergen_gateway.embedded.run_folder import check_shared_memory; check_shared_memory()"
    done = run_with_shared_memory("0", sys.executable, "-c", check)
    assert (done.returncode, done.stderr) == (0, "")


def run_with_shared_memory(size: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose /dev/shm has this size."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    if problem := subprocess.run([*private, "true"], capture_output=True, text=True).stderr:
        pytest.skip(problem)
    return subprocess.run([*private, *command], capture_output=True, text=True, timeout=60, check=False)


def crash_at_start(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tritonserver be this script, which may go on to the real one."""
    installation = find_installation()
    server = folder / "tritonserver"
    server.write_text(f'#!/bin/sh\n{script}\nexec {installation.server} "$@"\n')
    server.chmod(0o755)
    monkeypatch.setattr(supervisor, "find_installation", lambda: replace(installation, server=server))


def test_a_start_that_crashes_is_tried_once_more(
    seen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = tmp_path / "crashed"
    crash_at_start(f"[ -e {crashed} ] || {{ touch {crashed}; kill -ABRT $$; }}", tmp_path, monkeypatch)
    run(make_repository(tmp_path / "repository"))
    assert crashed.exists()
    assert seen_file.exists()


def test_a_start_that_crashes_twice_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "starts"
    crash_at_start(f"echo started >>{starts}; kill -ABRT $$", tmp_path, monkeypatch)
    with pytest.raises(EmbeddedError, match="exited with code -6 at start"):
        run(make_repository(tmp_path / "repository"))
    assert starts.read_text() == "started\n" * 2


def error_with_stub(script: str, repository: Path, tmp_path: Path) -> str:
    """What is said where a model's process is this script."""
    stub = tmp_path / "triton_python_backend_stub"
    stub.write_text(script)
    launch = Launch(replace(find_installation(), stub=stub), repository, free_ports())

    async def start() -> str:
        server = await TritonServer.start(launch)
        try:
            with pytest.raises(EmbeddedError) as raised:
                await server.wait_ready(60)
            return str(raised.value)
        finally:
            await server.stop(1)

    return asyncio.run(start())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\necho 'libfoo.so: cannot open shared object file' >&2; exit 127\n", "libfoo.so: cannot open"),
        ("#!/no/such/interpreter\n", "not found|No such file"),
    ],
)
def test_a_model_s_process_that_cannot_start_is_an_error_within_seconds_that_says_why(
    script: str, reason: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    error = error_with_stub(script, make_repository(tmp_path / "repository"), tmp_path)
    assert re.search(reason, error)
    assert "\n" not in error
    assert time.monotonic() - began < 20


def test_a_start_at_which_nothing_happens_is_given_up(tmp_path: Path) -> None:
    """As where so few threads are allowed that Triton waits for one that it has not got."""
    began = time.monotonic()
    error = error_with_stub("#!/bin/sh\nexec sleep 600\n", make_repository(tmp_path / "repository"), tmp_path)
    assert f"nothing for {STANDSTILL_SECONDS} s" in error
    assert time.monotonic() - began < STANDSTILL_SECONDS + 20


def test_a_machine_without_bash_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedError, match="bash"):
        run(make_repository(tmp_path / "repository"))
