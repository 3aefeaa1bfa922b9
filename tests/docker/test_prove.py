"""The script that proves the images, with our real gateway and a stand-in for Docker, which no test has.

They show that the script looks: each thing that may be wrong makes it fail and be named, and it always cleans up.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import UnavailableError
from support.fake_backend import FakeBackend, on_loopback

from .conftest import DOCKER

pytestmark = pytest.mark.claim("prove")

KEY = "the-right-key"
FAKE_DOCKER = """#!/bin/sh
echo "$*" >>"$DOCKER_CALLS"
case "$*" in
    info) exit "${DOCKER_INFO:-0}" ;;
    *" build "*) exit "${DOCKER_BUILD:-0}" ;;
    *" port triton 8001") echo "${DOCKER_PORT:-:0}" ;;
    inspect*) echo "${DOCKER_EXIT_CODE:-0}" ;;
esac
"""


@dataclass(frozen=True)
class Proof:
    """How a run of the script ended."""

    code: int
    said: str
    docker_calls: list[str]
    image: Path

    def done(self, word: str) -> bool:
        """Whether a compose command was run."""
        return any(f" {word} " in f"{call} " for call in self.docker_calls)


async def prove(
    folder: Path, backend: FakeBackend, *arguments: str, key: str | None = KEY, **environment: str
) -> Proof:
    """Run the script while a gateway that takes `key` listens where it will look."""
    (folder / "bin").mkdir()
    (folder / "bin" / "docker").write_text(FAKE_DOCKER)
    (folder / "bin" / "docker").chmod(0o755)
    (folder / "key").write_text(f"{KEY}\n")
    async with on_loopback(create_app(Config(api_key=key), backend)) as url:
        process = await asyncio.create_subprocess_exec(
            str(DOCKER / "prove"),
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ
            | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(folder)}
            | {"HYPERGEN_PORT": url.rpartition(":")[2], "HYPERGEN_API_KEY_FILE": str(folder / "key")}
            | {"DOCKER_CALLS": str(folder / "calls")}
            | environment,
        )
        said, _ = await process.communicate()
    assert process.returncode is not None
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return Proof(process.returncode, said.decode(), calls, folder / "hypergen-proved.png")


@pytest.mark.parametrize(("mode", "served"), [("gpu", "gateway"), ("cpu", "cpu")])
async def test_an_image_and_a_rejected_key_prove_it(tmp_path: Path, mode: str, served: str) -> None:
    proof = await prove(tmp_path, FakeBackend(), mode)
    assert proof.code == 0, proof.said
    assert "== proved: " in proof.said
    assert proof.image.read_bytes().startswith(b"\x89PNG")
    project = "compose --project-name hypergen-prove " + ("--profile cpu " if mode == "cpu" else "")
    commands = [call.removeprefix(project) for call in proof.docker_calls]
    assert f"up --detach {served}" in commands
    assert f"stop {served}" in commands
    assert commands[-1] == "down --volumes --remove-orphans --timeout 30"
    assert KEY not in proof.said


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"DOCKER_BUILD": "1"}, "an image was not built"),
        ({"DOCKER_PORT": "0.0.0.0:8001"}, "Triton's port 8001 is published"),
        ({"DOCKER_EXIT_CODE": "137"}, "gateway ended with exit code 137"),
    ],
)
async def test_what_docker_shows_to_be_wrong_is_named(tmp_path: Path, environment: dict[str, str], says: str) -> None:
    proof = await prove(tmp_path, FakeBackend(), **environment)
    assert proof.code == 1
    assert f"NOT PROVED: {says}" in proof.said
    assert proof.done("down")
    assert not proof.image.exists()


async def test_a_gateway_that_takes_any_key_is_found_out(tmp_path: Path) -> None:
    proof = await prove(tmp_path, FakeBackend(), key=None)
    assert proof.code == 1
    assert "NOT PROVED: a wrong key got 200 instead of 401" in proof.said
    assert proof.done("down")


async def test_a_server_that_cannot_generate_is_found_out(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.failure = UnavailableError("The image model is not available.")
    proof = await prove(tmp_path, backend)
    assert proof.code == 1
    assert "the request for an image got 503" in proof.said


async def test_it_does_not_wait_for_ever(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.is_ready = False
    proof = await prove(tmp_path, backend, LIMIT="2")
    assert proof.code == 1
    assert "NOT PROVED: not ready after 2 s" in proof.said
    assert proof.done("down")


async def test_without_a_daemon_it_says_so_and_touches_nothing(tmp_path: Path) -> None:
    proof = await prove(tmp_path, FakeBackend(), DOCKER_INFO="1")
    assert proof.code == 1
    assert "NOT PROVED: no Docker daemon answers" in proof.said
    assert proof.docker_calls == ["info"]


async def test_an_unknown_mode_is_told_the_known_ones(tmp_path: Path) -> None:
    proof = await prove(tmp_path, FakeBackend(), "tpu")
    assert (proof.code, proof.said) == (2, "usage: docker/prove [gpu|cpu]\n")
