"""The Dockerfiles: nothing is built here, so what they name is held against the project and against real tools."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from pathspec import PathSpec

from hypergen_gateway.embedded.installation import find_installation
from support.project import PYPROJECT

from .conftest import DOCKER, DOCKERFILES, ROOT, run_tool

pytestmark = pytest.mark.claim("images")

PROJECT = PYPROJECT["project"]
SAMPLER = ROOT / "model_repository" / "diffusion" / "1"


def instructions(name: str) -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction of a Dockerfile, on one line each."""
    text = (DOCKER / f"{name}.Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(keyword, " ".join(rest.split())) for keyword, _, rest in (line.partition(" ") for line in lines if line)]


def arguments(name: str, keyword: str) -> list[str]:
    return [rest for word, rest in instructions(name) if word == keyword]


def default_of(name: str, argument: str) -> str:
    """The default of a build argument."""
    defaults = dict(rest.split("=", 1) for rest in arguments(name, "ARG") if "=" in rest)
    return defaults[argument]


@cache
def pins() -> dict[str, Version]:
    lines = [line for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonical(name): Version(version) for name, version in (line.split("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def context() -> set[str]:
    """The files of the repository that a build is given. For the patterns in use, Git and Docker read them alike."""
    ignored = PathSpec.from_lines("gitignore", (ROOT / ".dockerignore").read_text().splitlines())
    tops = [path for path in ROOT.iterdir() if not ignored.match_file(f"{path.name}/x")]
    files = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top]) if path.is_file()]
    return {name for name in (path.relative_to(ROOT).as_posix() for path in files) if not ignored.match_file(name)}


def test_there_are_the_images_that_compose_and_chart_name() -> None:
    assert [file.stem for file in DOCKERFILES] == ["cpu", "export", "gateway", "triton"]


@pytest.mark.claim("hadolint")
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    judged = run_tool("hadolint", "--no-color", file)
    assert (judged.returncode, judged.stdout) == (0, "")


@pytest.mark.parametrize("name", ["cpu", "export", "gateway", "triton"])
def test_no_container_runs_as_root(name: str) -> None:
    (user,) = arguments(name, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "Kubernetes can check numbers alone"


@pytest.mark.parametrize("name", ["cpu", "export", "gateway", "triton"])
def test_what_is_copied_reaches_the_build(name: str) -> None:
    files = context()
    for copy in arguments(name, "COPY"):
        *sources, _ = [word for word in copy.split() if not word.startswith("--chmod")]
        if sources[0].startswith("--from"):
            continue
        for source in sources:
            assert any(file == source or file.startswith(f"{source.rstrip('/')}/") for file in files), source


def test_the_build_is_given_all_of_a_wheel_and_no_secret() -> None:
    files = context()
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    for folder in [*wheel["packages"], *wheel["force-include"]]:
        kept = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert {path.relative_to(ROOT).as_posix() for path in kept} <= files
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= files
    assert not any(file.startswith((".git", ".venv", "tests/", "docker/secrets", "docker/.env/")) for file in files)


def test_plans_are_built_by_the_release_that_loads_them() -> None:
    assert default_of("triton", "TRITON_IMAGE") == default_of("export", "TRITON_IMAGE")
    assert arguments("triton", "FROM") == ["${TRITON_IMAGE}"]
    assert arguments("export", "FROM") == ["${TRITON_IMAGE} AS build", "${TRITON_IMAGE}"]


def test_the_triton_image_brings_what_the_sampler_imports() -> None:
    imported = set(re.findall(r"^(?:import|from) (\w+)", "\n".join(map(Path.read_text, SAMPLER.rglob("*.py"))), re.M))
    (install,) = [run for run in arguments("triton", "RUN") if "pip install" in run]
    assert {name for name in ("diffusers", "numpy", "tokenizers", "torch") if name in imported} <= set(install.split())


def test_every_requirement_is_pinned_within_what_the_project_asks_for() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["export"]]
    for extra in ("embedded", "otel", "s3"):
        wanted += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins()[canonical(requirement.name)]), requirement


def test_only_a_cpu_build_of_torch_fits() -> None:
    assert pins()["torch"].local == "cpu"
    for name in ("cpu", "export", "triton"):
        install = next(run for run in arguments(name, "RUN") if "pip install" in run)
        assert '--extra-index-url "${TORCH_INDEX}"' in install


@pytest.mark.parametrize("name", ["gateway", "cpu", "export"])
def test_a_change_of_the_sources_installs_no_requirement_anew(name: str) -> None:
    steps = instructions(name)
    sources = steps.index(("COPY", "gateway gateway"))
    requirements, project = (number for number, (_, rest) in enumerate(steps) if "pip install" in rest)
    assert requirements < sources < project
    assert "--no-deps" in steps[project][1]


def test_the_python_of_the_images_has_a_stub_in_tritons_wheel() -> None:
    match = re.fullmatch(r"python:(\d\.\d+)-slim-\w+", default_of("cpu", "PYTHON_IMAGE"))
    assert match
    assert (find_installation().stub.parents[1] / match[1]).is_dir()
    assert default_of("gateway", "PYTHON_IMAGE") == match[0]


def triton_command() -> list[str]:
    (command,) = arguments("triton", "CMD")
    check, *triton = re.findall(r'"([^"]+)"', command)
    assert Path(check).name in {path.name for path in (DOCKER / "triton").iterdir()}
    return triton


def test_the_real_tritonserver_knows_every_flag_of_the_image() -> None:
    installation = find_installation()
    libraries = ":".join(map(str, installation.library_folders))
    shown = subprocess.run(
        [str(installation.server), "--help"], env={"LD_LIBRARY_PATH": libraries}, capture_output=True, text=True
    )
    known = set(re.findall(r"^\s*(--[\w-]+)", shown.stdout + shown.stderr, re.MULTILINE))
    flags = {word.partition("=")[0] for word in triton_command()[1:]}
    assert flags
    assert flags <= known


def test_triton_has_a_thread_for_each_call_of_the_sampler() -> None:
    match = re.search(r"BLS_THREADS = (\d+)", (SAMPLER / "model.py").read_text())
    assert match
    assert f"--backend-config=python,thread-pool-size={match[1]}" in triton_command()


@pytest.mark.parametrize(
    ("name", "path"), [("gateway", "/health/live"), ("cpu", "/health/live"), ("triton", "/v2/health/ready")]
)
def test_the_health_check_uses_the_right_port(name: str, path: str) -> None:
    (check,) = arguments(name, "HEALTHCHECK")
    assert path in check


def test_tritons_health_check_uses_no_proxy() -> None:
    """Docker's client can give every container the variables of a proxy."""
    (check,) = arguments("triton", "HEALTHCHECK")
    assert '"curl", "--noproxy", "*"' in check
