"""The check before Triton starts, with TensorRT and NVIDIA's driver played by libraries of a few lines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.claim("plans")

CHECK = Path(__file__).parents[3] / "docker" / "triton" / "check_plans.py"
PLAN = "unet/1/model.plan"
RECORD: dict[str, Any] = {
    "library": "tensorrt",
    "version": "11.1.0.106",
    "gpu": "NVIDIA Test GPU",
    "compute_capability": "8.6",
}
LIBRARIES = {
    "libnvinfer.so": "int getInferLibVersion() { return 110100; }",
    "libcuda.so.1": """
#include <stdio.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 3; return 0; }
int cuDeviceGetName(char *name, int length, int device) { return snprintf(name, length, "NVIDIA Test GPU"), 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 8 : 6; return 0; }
""",
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("libraries")
    for name, source in LIBRARIES.items():
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(folder / name), "-"]
        subprocess.run(command, input=source, text=True, check=True)
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """An export with a plan for the machine that the libraries play."""
    folder = tmp_path / "repository"
    (folder / PLAN).parent.mkdir(parents=True)
    (folder / PLAN).write_bytes(b"a plan")
    write_record(folder)
    (folder / "hypergen.json").write_text(json.dumps({"files": {PLAN: 6, "unet/config.pbtxt": 900}}))
    return folder


def write_record(repository: Path, **changes: Any) -> None:
    (repository / f"{PLAN}.json").write_text(json.dumps(RECORD | changes))


def check(repository: Path, libraries: Path | None) -> tuple[int, str, str]:
    """Exit code, and what it says on stdout, which is the server's, and on stderr."""
    server = ["sh", "-c", 'echo "serving $1"', "sh", f"--model-repository={repository}"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries or "")}
    command = [sys.executable, str(CHECK), *server]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def refusal(repository: Path, libraries: Path | None) -> str:
    code, out, said = check(repository, libraries)
    assert (code, out) == (1, "")
    return said


def test_plans_built_here_are_served(repository: Path, libraries: Path) -> None:
    assert check(repository, libraries) == (0, f"serving --model-repository={repository}\n", "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": "11.0.0.114"}, "it was built by TensorRT 11.0.0.114, but this Triton has TensorRT 11.1.0"),
        (
            {"gpu": "NVIDIA H100", "compute_capability": "9.0"},
            "it was built for NVIDIA H100 (compute capability 9.0), but this GPU is NVIDIA Test GPU (8.6)",
        ),
        ({"library": "tensorrt_rtx"}, "it was built by tensorrt_rtx, whose plans Triton does not load"),
    ],
)
def test_a_plan_for_another_machine_is_refused_by_name(
    repository: Path, libraries: Path, changes: dict[str, Any], says: str
) -> None:
    write_record(repository, **changes)
    said = refusal(repository, libraries)
    assert f"check_plans: {PLAN}: {says}\n" in said
    assert "export the model on this machine" in said


def test_another_model_of_the_same_kind_is_served_with_a_remark(repository: Path, libraries: Path) -> None:
    write_record(repository, gpu="NVIDIA A10")
    code, out, said = check(repository, libraries)
    assert (code, out.split()[0]) == (0, "serving")
    assert "built on NVIDIA A10, but this GPU is NVIDIA Test GPU" in said


def test_a_plan_that_is_not_whole_is_refused(repository: Path, libraries: Path) -> None:
    (repository / PLAN).write_bytes(b"a pl")
    assert f"{PLAN} is missing or incomplete" in refusal(repository, libraries)
    (repository / PLAN).unlink()
    assert f"{PLAN} is missing or incomplete" in refusal(repository, libraries)


@pytest.mark.parametrize("content", ["", "[]", '{"library": "tensorrt"}'])
def test_a_broken_record_is_refused(repository: Path, libraries: Path, content: str) -> None:
    (repository / f"{PLAN}.json").write_text(content)
    assert f"{PLAN}: its record model.plan.json is missing or broken" in refusal(repository, libraries)


def test_a_folder_that_no_export_wrote_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} is not a complete export" in refusal(tmp_path, None)


def test_a_machine_without_tensorrt_or_gpu_is_told_so(repository: Path, libraries: Path, tmp_path: Path) -> None:
    (tmp_path / "libraries").mkdir()
    for name, says in [
        ("libcuda.so.1", "TensorRT (libnvinfer.so) is not"),
        ("libnvinfer.so", "no NVIDIA GPU found"),
    ]:
        folder = tmp_path / "libraries" / name
        folder.mkdir()
        shutil.copy(libraries / name, folder)
        said = refusal(repository, folder)
        assert said.startswith(f"check_plans: {says}")
        assert "Traceback" not in said


def test_without_a_repository_it_says_how_it_is_called() -> None:
    done = subprocess.run([sys.executable, str(CHECK), "tritonserver"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("check_plans: usage:")


def compare_release(release: str, libraries: Path) -> tuple[int, str]:
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, str(CHECK), "--tensorrt", release]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_an_image_is_built_only_with_the_bindings_of_its_tensorrt(libraries: Path, tmp_path: Path) -> None:
    assert compare_release("11.1.0.106", libraries) == (0, "")
    code, said = compare_release("11.10.0.2", libraries)
    assert code == 1
    assert said.startswith("check_plans: TRITON_IMAGE has TensorRT 11.1.0, but TENSORRT is 11.10.0.2: set TENSORRT")
    assert compare_release("11.1.0.106", tmp_path)[0] == 1
