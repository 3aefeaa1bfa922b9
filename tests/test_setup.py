"""Setup by `make` and CI: supported Python versions, and messages about missing dependencies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import PYTHONS, check_python
from support.project import PYPROJECT
from support.skips import lines_of

ROOT = Path(__file__).parents[1]
TESTED = [(3, 9), *PYTHONS, (3, 13), (3, 14), (4, 0)]


def requirements(extra: str) -> list[Requirement]:
    return [Requirement(each) for each in PYPROJECT["project"]["optional-dependencies"][extra]]


@pytest.mark.parametrize("version", TESTED)
def test_the_command_the_extra_and_make_take_the_same_pythons(version: tuple[int, int]) -> None:
    number = ".".join(map(str, version))
    pinned = [each for each in requirements("embedded") if each.name in ("numpy", "nvidia-pytriton")]
    environment = {"python_version": number}
    wanted = [each.marker is None or each.marker.evaluate(environment) for each in pinned]
    # Older ones are refused by requires-python.
    assert wanted == [version < (3, 13)] * 2
    script = (ROOT / ".ci" / "check-python").read_text()
    code = f"import sys; sys.version_info = {(*version, 0)}\n{script}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (version not in PYTHONS)
    if version not in PYTHONS:
        assert len(done.stderr.splitlines()) == 1
        assert f"needs Python 3.10, 3.11 or 3.12, and {sys.executable} is {number}." in done.stderr
        with pytest.raises(EmbeddedError, match=rf"3\.10, 3\.11, 3\.12, and this is {re.escape(number)}"):
            check_python(version)
    else:
        check_python(version)


def test_make_names_what_it_can_do_and_nothing_else() -> None:
    lines = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    named = [line.split()[1] for line in lines if line.startswith("make ")]
    assert set(named) == set(targets) - {"help", "setup", "setup-dev"}
    assert all(len(line) <= 120 for line in lines)


def run_script(name: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of .ci/ with nothing on its PATH but what lies in `folder`."""
    return subprocess.run(
        ["/bin/sh", str(ROOT / ".ci" / name), *arguments],
        env={"PATH": str(folder), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    """A PATH of root's with an apt-get that writes down what it is asked for, and fails before its first update."""
    for name in ("dirname", "mktemp", "rm", "tail", "env", "ls", "touch", "cat"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name)
    program(tmp_path, "id", "echo 0")
    asked = f'echo "$@" >>{tmp_path}/asked'
    program(tmp_path, "apt-get", f"{asked}\n[ $1 != update ] || touch {tmp_path}/lists\n[ -e {tmp_path}/lists ]")
    return tmp_path


def asked_of(debian: Path) -> list[str]:
    """The commands of apt-get, with what they were about."""
    lines = (debian / "asked").read_text().splitlines()
    return [f"{line.split()[0]} {line.split()[-1]}" for line in lines]


def test_packages_are_looked_up_anew_only_where_they_are_not_known(debian: Path) -> None:
    done = run_script("system-packages", debian, "faketime")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Installing Debian packages: faketime\n", "")
    assert [line.split()[0] for line in asked_of(debian)] == ["install", "update", "install"]
    (debian / "asked").unlink()
    assert run_script("system-packages", debian, "faketime").returncode == 0
    assert asked_of(debian) == ["install faketime"]


def test_a_user_who_may_not_install_is_told_what_to_run(debian: Path) -> None:
    program(debian, "id", "echo 1000")
    done = run_script("system-packages", debian, "faketime")
    assert (done.returncode, done.stderr) == (1, "Please run as root: apt-get install faketime\n")
    assert not (debian / "asked").exists()


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_tests_run_without_what_cannot_be_installed_but_in_ci(debian: Path, ci: str, code: int) -> None:
    program(debian, "id", "echo 1000")
    # The tools are there already, or cannot be had either: both are one line.
    done = run_script("test-tools", debian, CI=ci)
    assert done.returncode == code
    (line,) = done.stdout.splitlines()
    assert line.startswith("Some tests will be skipped. To run them, first run as root: apt-get install")
    assert {"nodejs", "chromium"} <= set(line.replace(";", "").split())
    assert done.stderr == ""
    assert not (debian / "asked").exists()


@pytest.mark.parametrize("name", ["chromium", "chromium-browser", "google-chrome"])
def test_any_chromium_that_the_tests_find_is_enough(debian: Path, name: str) -> None:
    """Ubuntu has none as a Debian package, and its machines in CI have Chrome."""
    program(debian, "id", "echo 1000")
    program(debian, name, "")
    assert "chromium" not in run_script("test-tools", debian).stdout


def test_a_reason_to_skip_is_said_once() -> None:
    def skipped(reason: str) -> pytest.TestReport:
        where = ("tests/x.py", 1, f"Skipped: {reason}")
        return pytest.TestReport("x", ("x", 1, "x"), {}, "skipped", where, "setup")

    reports = [skipped("no JDK"), *[skipped("helm is not installed")] * 30]
    assert lines_of(reports) == ["30 skipped: helm is not installed", "1 skipped: no JDK"]
    assert lines_of([]) == []


SKIPPING = """
import pytest

def test_that_skips():
    pytest.skip("no JDK")

@pytest.mark.gpu
def test_of_a_gpu():
    pytest.skip("no GPU")

@pytest.mark.xfail(strict=True)
def test_of_a_known_fault():
    assert False
"""


def test_in_ci_only_tests_of_a_gpu_may_skip(tmp_path: Path) -> None:
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "gateway"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull, tmp_path],
        env=os.environ | {"CI": "true", "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "= 1 failed, 1 skipped, 1 xfailed" in done.stdout
    assert "Skipped in CI: no JDK" in done.stdout


def test_ci_runs_the_readme_s_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "make check" in script
    assert "make test" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_fit_their_schema() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [check, "--builtin-schema", "vendor.github-workflows", *WORKFLOWS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_workflows_run_what_is_there_with_a_limit_and_may_write_nothing(workflow: Path) -> None:
    description = yaml.safe_load(workflow.read_text())
    assert description["permissions"] == {"contents": "read"}
    (job,) = description["jobs"].values()
    assert job["timeout-minutes"] <= 90
    command = job["steps"][-1]["run"]
    for target in job.get("strategy", {}).get("matrix", {}).get("target", []):
        assert command.endswith(" make ${{ matrix.target }}")
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)
    if "strategy" not in job:
        assert command.endswith(" CI=true .ci/run")
