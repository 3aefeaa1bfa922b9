#!/usr/bin/env python3
"""Checks a repository's TensorRT plans against this machine, then becomes Triton; run in Triton's place.

    check_plans.py tritonserver --model-repository=/models/repository …

A plan runs in the release of TensorRT and on the kind of GPU that it was built with. Triton itself finds that out one
component at a time and in the words of TensorRT; here it is one line per plan, with what to do about it, before
anything is loaded. It knows the records that the exporter wrote: `hypergen.json`, and `model.plan.json` beside each
plan.
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
# Of any major release from 10 on; the image holds one.
TENSORRT = ("libnvinfer.so", "libnvinfer.so.12", "libnvinfer.so.11", "libnvinfer.so.10")
DRIVER = "libcuda.so.1"
NAME_BYTES = 256
# CUdevice_attribute, in cuda.h
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Machine:
    """What would run the plans: the release of TensorRT as "11.1.0", and the first GPU."""

    tensorrt: str
    gpu: str
    compute_capability: str


class NotHereError(Exception):
    """No plan can be run here; `str()` is the reason."""


def main(command: list[str]) -> NoReturn:
    """Become the command, or exit with 1 where a plan would not run."""
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


def refusals_of(repository: Path) -> Iterator[str]:
    """A line for each thing that keeps the repository from being served here."""
    try:
        files: Mapping[str, int] = json.loads((repository / "hypergen.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{repository} holds no whole export: hypergen.json is missing or broken"
        return
    plans = sorted(name for name in files if name.endswith(".plan"))
    for name in plans:
        found = repository / name
        if not found.is_file() or found.stat().st_size != files[name]:
            yield f"{name} is missing or not whole"
    if plans:
        yield from plans_refused(repository, plans)


def plans_refused(repository: Path, plans: list[str]) -> Iterator[str]:
    """A line for each plan that was built for another machine than this."""
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
    """Why a plan with this record does not run on the machine; another model of GPU of its kind only gets a remark."""
    if record["library"] != "tensorrt":
        yield f"it was built by {record['library']}, whose plans Triton does not load"
        return
    if record["version"].split(".")[:3] != machine.tensorrt.split("."):
        yield f"it was built by TensorRT {record['version']}, and this Triton has TensorRT {machine.tensorrt}"
    if record["compute_capability"] != machine.compute_capability:
        yield (
            f"it was built for {record['gpu']} (compute capability {record['compute_capability']}), and this GPU is "
            f"{machine.gpu} ({machine.compute_capability})"
        )
    elif record["gpu"] != machine.gpu:
        say(f"a plan was tuned on {record['gpu']}, and this GPU is {machine.gpu}: it may be slower than one built here")


def this_machine() -> Machine:
    """Raises NotHereError where TensorRT or a GPU is missing."""
    return Machine(tensorrt_version(), *first_gpu())


def tensorrt_version() -> str:
    """Asked of the library that Triton's backend loads."""
    for name in TENSORRT:
        try:
            number = ctypes.CDLL(name).getInferLibVersion()
        except (OSError, AttributeError):
            continue
        # As NvInferVersion.h has it since 10.
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    raise NotHereError("there is no TensorRT here (libnvinfer.so), in which alone plans run")


def first_gpu() -> tuple[str, str]:
    """Name and compute capability of the first GPU that is visible, asked of NVIDIA's driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise NotHereError("there is no NVIDIA GPU here: was the container given one?") from None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
    asked = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    asked = asked or driver.cuDeviceGetName(name, NAME_BYTES, device)
    if asked:
        raise NotHereError(f"NVIDIA's driver shows no GPU here (CUDA error {asked}): was the container given one?")
    numbers = [attribute(driver, device, which) for which in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR)]
    return name.value.decode(), f"{numbers[0]}.{numbers[1]}"


def attribute(driver: ctypes.CDLL, device: ctypes.c_int, which: int) -> int:
    """One number about a device."""
    value = ctypes.c_int()
    if error := driver.cuDeviceGetAttribute(ctypes.byref(value), which, device):
        raise NotHereError(f"NVIDIA's driver does not describe its GPU (CUDA error {error})")
    return value.value


def say(line: str) -> None:
    """To where Triton logs."""
    print(f"check_plans: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
