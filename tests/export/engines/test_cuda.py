"""NVIDIA's driver, played by a library of a few lines where a C compiler is at hand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hypergen_export.engines.cuda import Gpu, first_gpu
from hypergen_export.errors import NoGpuError

DRIVER = """
#include <stdio.h>
int cuInit(unsigned flags) { return INIT_RESULT; }
int cuDeviceGet(int *device, int ordinal) { *device = 3; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    return device == 3 ? (snprintf(name, length, "NVIDIA Test GPU"), 0) : 101;
}
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 8 : which == 76 ? 6 : -1;
    return device == 3 ? 0 : 101;
}
"""


def compile_driver(folder: Path, init_result: int) -> str:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", f"-DINIT_RESULT={init_result}", "-o", library, source], check=True)
    return str(library)


def test_the_driver_names_its_first_gpu(tmp_path: Path) -> None:
    assert first_gpu(compile_driver(tmp_path, 0)) == Gpu(name="NVIDIA Test GPU", compute_capability="8.6")


def test_a_driver_that_sees_no_gpu_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoGpuError, match="CUDA error 100"):
        first_gpu(compile_driver(tmp_path, 100))


def test_a_machine_without_the_driver_has_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(NoGpuError, match="no NVIDIA GPU found"):
        first_gpu(str(tmp_path / "libcuda.so.1"))
