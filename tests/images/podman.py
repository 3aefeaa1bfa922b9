"""Podman: images and containers without a daemon. `.ci/with-podman` makes it run where services and limits do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What the builds take over from this machine's pip; the rest of its settings concerns this machine.
PIP_SETTINGS = ("cert", "extra-index-url", "find-links", "index-url", "proxy", "timeout", "trusted-host")


def podman(*arguments: str | Path, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """The finished command, with its output as text."""
    command = ["podman", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


def output_of(*arguments: str | Path, timeout: float = 600) -> str:
    """What the command prints, without the spaces around it. Raises AssertionError with its errors if it fails."""
    done = podman(*arguments, timeout=timeout)
    assert done.returncode == 0, f"podman {arguments[0]}: {done.stderr[-4000:]}{done.stdout[-4000:]}"
    return done.stdout.strip()


def build(
    dockerfile: Path, tag: str, context: Path, arguments: Mapping[str, str], scratch: Path
) -> subprocess.CompletedProcess[str]:
    """Build an image. `scratch` is a folder for the pip settings of this machine, which the build sees as its own."""
    command: list[str | Path] = ["build", "--format", "docker", "--isolation", "chroot", "--network", "host"]
    command += ["--pull=never", "--layers", "--file", dockerfile, "--tag", tag]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    for mount in pip_mounts(scratch):
        command += ["--volume", mount]
    return podman(*command, context, timeout=3000)


def pip_mounts(scratch: Path) -> Iterator[str]:
    """Volumes that give a build this machine's package indexes, local ones and certificates included."""
    settings = pip_settings()
    lines = [f"{name} = {value.replace(' ', f'{os.linesep}    ')}" for name, value in settings.items()]
    (scratch / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    yield f"{scratch / 'pip.conf'}:/etc/pip.conf:ro"
    words = " ".join(settings.values()).split()
    # The pages of an index on the disk point to files beside it.
    paths = [Path(word.removeprefix("file://")).parent if word.startswith("file:") else Path(word) for word in words]
    yield from (f"{path}:{path}:ro" for path in dict.fromkeys(paths) if path.is_absolute() and path.exists())


def pip_settings() -> dict[str, str]:
    """The settings of this machine's pip that concern where packages are; variables count more than files."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [line.split("=", 1) for line in listed]
    found: dict[str, str] = {}
    for key, value in sorted(pairs, key=lambda pair: pair[0].startswith(":env:")):
        name = key.rpartition(".")[2].removeprefix("default-")
        if name in PIP_SETTINGS:
            found[name] = value.strip("'")
    return found


def inspect_image(tag: str) -> dict[str, Any]:
    """The image's size in bytes, and its configuration as Docker states it."""
    (found,) = json.loads(output_of("image", "inspect", tag))
    return dict(found)
