#!/usr/bin/env python3
"""Check a repository's TensorRT plans against this machine, then replace this process with Triton.

    check_plans.py tritonserver --model-repository=/models/repository …
    check_plans.py --tensorrt 11.1.0.106       only compare the release with that of this image, while it is built

A plan runs only in the TensorRT release and on the kind of GPU that it was built with. Triton itself fails on the first
mismatch while loading, with TensorRT's own error. This script reports one line per plan, and what to do, before
anything is loaded. It reads the exporter's records: `hypergen.json`, and `model.plan.json` beside each plan.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

OPTION = "--model-repository="
RELEASE_OPTION = "--tensorrt"
# Major releases from 10 on; the image contains one of them.
TENSORRT = ("libnvinfer.so", "libnvinfer.so.12", "libnvinfer.so.11", "libnvinfer.so.10")
DRIVER = "libcuda.so.1"
NAME_BYTES = 256
# CUdevice_attribute, in cuda.h
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Machine:
    """This machine's TensorRT release, such as "11.1.0", and its first GPU."""

    tensorrt: str
    gpu: str
    compute_capability: str


class NotHereError(Exception):
    """This machine cannot run plans; `str()` is the reason."""


def main(command: list[str]) -> NoReturn:
    """Run the command in place of this process, or exit with 1 if a plan would not run."""
    if command[:1] == [RELEASE_OPTION]:
        sys.exit(check_release(command[1]))
    repository = next((Path(word.removeprefix(OPTION)) for word in command if word.startswith(OPTION)), None)
    if repository is None:
        say(f"usage: check_plans.py tritonserver {OPTION}FOLDER …")
        sys.exit(2)
    refusals = list(refusals_of(repository))
    for refusal in refusals:
        say(refusal)
    if refusals:
        say("export the model on this machine, with the TensorRT of this Triton: hypergen export … --engine tensorrt")
        sys.exit(1)
    os.execvp(command[0], command)


def check_release(release: str) -> int:
    """0 if this TensorRT is the release of the bindings, such as "11.1.0.106", which load it; otherwise 1."""
    try:
        found = tensorrt_version()
    except NotHereError as error:
        say(str(error))
        return 1
    if release.split(".")[:3] == found.split("."):
        return 0
    say(f"TRITON_IMAGE has TensorRT {found}, but TENSORRT is {release}: set TENSORRT to a release {found}.x")
    return 1


def refusals_of(repository: Path) -> Iterator[str]:
    """One line for each reason why the repository cannot be served on this machine."""
    try:
        files: Mapping[str, int] = json.loads((repository / "hypergen.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{repository} is not a complete export: hypergen.json is missing or broken"
        return
    plans = sorted(name for name in files if name.endswith(".plan"))
    for name in plans:
        found = repository / name
        if not found.is_file() or found.stat().st_size != files[name]:
            yield f"{name} is missing or incomplete"
    if plans:
        yield from plans_refused(repository, plans)


def plans_refused(repository: Path, plans: list[str]) -> Iterator[str]:
    """One line for each plan that was built for another kind of machine."""
    try:
        machine = this_machine()
    except NotHereError as error:
        yield str(error)
        return
    for name in plans:
        try:
            record = json.loads((repository / f"{name}.json").read_text())
            yield from (f"{name}: {reason}" for reason in mismatches(record, machine))
        except (OSError, ValueError, KeyError, TypeError):
            yield f"{name}: its record {Path(name).name}.json is missing or broken"


def mismatches(record: Mapping[str, Any], machine: Machine) -> Iterator[str]:
    """Why a plan with this record does not run on the machine. Another GPU of the same kind only gets a warning."""
    if record["library"] != "tensorrt":
        yield f"it was built by {record['library']}, whose plans Triton does not load"
        return
    if record["version"].split(".")[:3] != machine.tensorrt.split("."):
        yield f"it was built by TensorRT {record['version']}, but this Triton has TensorRT {machine.tensorrt}"
    if record["compute_capability"] != machine.compute_capability:
        yield (
            f"it was built for {record['gpu']} (compute capability {record['compute_capability']}), but this GPU is "
            f"{machine.gpu} ({machine.compute_capability})"
        )
    elif record["gpu"] != machine.gpu:
        say(f"a plan was built on {record['gpu']}, but this GPU is {machine.gpu}: a plan built here may be faster")


def this_machine() -> Machine:
    """This machine. Raises NotHereError if TensorRT or a GPU is missing."""
    return Machine(tensorrt_version(), *first_gpu())


def tensorrt_version() -> str:
    """The release of the library that Triton's backend loads."""
    for name in TENSORRT:
        try:
            number = ctypes.CDLL(name).getInferLibVersion()
        except (OSError, AttributeError):
            continue
        # The encoding of NvInferVersion.h since release 10.
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    raise NotHereError("TensorRT (libnvinfer.so) is not installed, so plans cannot run")


def first_gpu() -> tuple[str, str]:
    """Name and compute capability of the first visible GPU, from NVIDIA's driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise NotHereError("no NVIDIA GPU found: was the container given one?") from None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
    error = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    error = error or driver.cuDeviceGetName(name, NAME_BYTES, device)
    if error:
        raise NotHereError(f"NVIDIA's driver finds no GPU (CUDA error {error}): was the container given one?")
    numbers = [attribute(driver, device, which) for which in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR)]
    return name.value.decode(), f"{numbers[0]}.{numbers[1]}"


def attribute(driver: ctypes.CDLL, device: ctypes.c_int, which: int) -> int:
    """An attribute of the device."""
    value = ctypes.c_int()
    if error := driver.cuDeviceGetAttribute(ctypes.byref(value), which, device):
        raise NotHereError(f"NVIDIA's driver does not describe the GPU (CUDA error {error})")
    return value.value


def say(line: str) -> None:
    """Write to standard error, where Triton logs."""
    print(f"check_plans: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
