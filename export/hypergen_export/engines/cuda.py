"""The first GPU, queried from NVIDIA's driver through ctypes, so that no package is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from hypergen_export.errors import NoGpuError

_DRIVER = "libcuda.so.1"
_NAME_BYTES = 256
# CUdevice_attribute, in cuda.h
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU's name and its compute capability, such as "9.0"."""

    name: str
    compute_capability: str


def first_gpu(library: str = _DRIVER) -> Gpu:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves visible. Raises NoGpuError."""
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise NoGpuError("no NVIDIA GPU found; TensorRT engines must be built on one") from error
    _check(driver.cuInit(0))
    device = ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(device), 0))
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _check(driver.cuDeviceGetName(name, _NAME_BYTES, device))
    major = _attribute(driver, device, _COMPUTE_CAPABILITY_MAJOR)
    minor = _attribute(driver, device, _COMPUTE_CAPABILITY_MINOR)
    return Gpu(name=name.value.decode(), compute_capability=f"{major}.{minor}")


def _attribute(driver: ctypes.CDLL, device: ctypes.c_int, which: int) -> int:
    value = ctypes.c_int()
    _check(driver.cuDeviceGetAttribute(ctypes.byref(value), which, device))
    return value.value


def _check(result: int) -> None:
    if result:
        raise NoGpuError(f"NVIDIA's driver finds no GPU (CUDA error {result}); TensorRT engines must be built on one")
