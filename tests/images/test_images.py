"""What is in the images, as whom they run, and docker/prove against them."""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from images.compose import Project
from images.conftest import IMAGES, Images, Ran, removed
from images.podman import build, inspect_image, output_of, podman
from images.standin_plan import write_repository
from support.compose_file import ROOT

pytestmark = [pytest.mark.claim("built"), pytest.mark.timeout(3600)]

DOCKER = ROOT / "docker"
STANDIN = Path(__file__).parent / "standin"
# A user that no image knows, as OpenShift chooses one for each namespace, in group 0.
FOREIGN = "1000690000:0"
TOOLS = ("cc", "gcc", "g++", "clang", "make", "pip")
# Caches, sources and our own tests.
LEFTOVERS = "/src /root/.cache /tmp/* /var/tmp/* /cache/* /hub/* /var/cache/apt/archives/*.deb"
LOOK = f"""
for name in {" ".join(TOOLS)}; do command -v $name; done
ls -d {LEFTOVERS} 2>/dev/null
find / -xdev -path '*/hypergen_*' -name 'test*' 2>/dev/null
true
"""


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_adds_no_compiler_cache_or_tests(images: Images, name: str, ran: Ran) -> None:
    base = images.arguments["PYTHON_IMAGE" if name in ("gateway", "cpu") else "TRITON_IMAGE"]
    assert set(run(images.tag(name), LOOK).splitlines()) <= set(run(base, LOOK).splitlines())
    size = inspect_image(images.tag(name))["Size"]
    ran(name, "build", f"{size / 1e6:,.0f} MB", images.seconds[name])


def run(image: str, script: str, *options: str) -> str:
    """What a shell in a new container prints."""
    return output_of("run", "--rm", "--network", "none", *options, "--entrypoint", "sh", image, "-c", script)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_its_own_user_and_as_one_that_it_does_not_know(images: Images, name: str) -> None:
    own, group = output_of("image", "inspect", "--format", "{{.Config.User}}", images.tag(name)).split(":")
    assert run(images.tag(name), "id -u; id -g").split() == [own, group]
    folders = {"cpu": "/cache", "export": "/models /hub", "gateway": "/tmp", "triton": "/tmp"}[name]
    writes = f"for folder in {folders}; do touch $folder/written || exit 1; done; id -u"
    assert run(images.tag(name), writes, "--user", FOREIGN) == FOREIGN.partition(":")[0]


@pytest.mark.parametrize("user", ["10001:10001", FOREIGN])
def test_the_gateway_serves_from_a_file_system_that_cannot_be_written_to(images: Images, user: str, ran: Ran) -> None:
    began, name = time.monotonic(), "hypergen-images-gateway"
    options = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp"]
    command = ["serve", "--triton-url", "127.0.0.1:8001", "--api-key", "sk-images"]
    with removed(name):
        output_of("run", "--detach", "--user", user, "--name", name, *options, images.tag("gateway"), *command)
        while podman("healthcheck", "run", name).returncode != 0:
            assert output_of("inspect", "--format", "{{.State.Status}}", name) == "running", podman("logs", name).stderr
            assert time.monotonic() - began < 60
            time.sleep(0.2)
        assert podman("exec", name, "touch", "/written").returncode != 0
        output_of("stop", "--time", "20", name)
        assert output_of("inspect", "--format", "{{.State.ExitCode}}", name) == "0"
    ran("gateway", f"serve, read-only, as {user}", "healthy, stops with 0", time.monotonic() - began)


@pytest.mark.parametrize("mode", ["cpu", "gpu"])
async def test_docker_prove_proves_the_services_of_compose(
    images: Images, docker: Path, tmp_path: Path, mode: str, ran: Ran
) -> None:
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        str(DOCKER / "prove"),
        mode,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ
        | {"PATH": f"{docker}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        | {"HYPERGEN_CHECKPOINTS": str(tmp_path / "checkpoints")}
        | {"HYPERGEN_BASES": ",".join(f"{name}={value}" for name, value in images.arguments.items())}
        | ({"COMPOSE_FILE": str(STANDIN / "compose.yaml")} if mode == "gpu" else {}),
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()[-6000:]
    with Image.open(tmp_path / "hypergen-proved.png") as image:
        assert image.size == (64, 64)  # of the shipped model
    started = "cpu" if mode == "cpu" else "export, triton, gateway"
    ran(started, f"docker/prove {mode}", "image; 401; stops with 0", time.monotonic() - began)


def test_the_export_image_is_not_built_for_another_tensorrt(images: Images, tmp_path: Path) -> None:
    arguments = images.arguments | {"TENSORRT": "10.3.0.26"}
    done = build(DOCKER / "export.Dockerfile", "localhost/hypergen-refused", ROOT, arguments, tmp_path)
    assert done.returncode != 0
    assert "TENSORRT is 10.3.0.26" in done.stdout + done.stderr


def test_triton_refuses_plans_of_another_machine_before_it_starts(images: Images, tmp_path: Path, ran: Ran) -> None:
    began = time.monotonic()
    write_repository(tmp_path / "repository")
    tmp_path.chmod(0o755)
    done = podman("run", "--rm", "--network", "none", "--volume", f"{tmp_path}:/models:ro", images.tag("triton"))
    assert done.returncode == 1
    assert "check_plans: no NVIDIA GPU found: was the container given one?" in done.stderr
    ran("triton", "check_plans with a plan, no GPU", "refused in one line", time.monotonic() - began)


def test_a_drain_ends_when_triton_is_idle(images: Images, tmp_path: Path, ran: Ran) -> None:
    began = time.monotonic()
    project = Project.read(
        "hypergen-drain", {"COMPOSE_FILE": str(STANDIN / "compose.yaml"), "HYPERGEN_CHECKPOINTS": str(tmp_path)}
    )
    assert project.image("triton") == images.tag("triton")
    try:
        project.up("triton")
        project.wait_for("triton", "service_healthy")
        container = project.container("triton")
        output_of("exec", container, "/opt/hypergen/drain.py", "--quiet", "1", "--limit", "20")
        project.stop("triton")
        assert output_of("inspect", "--format", "{{.State.ExitCode}}", container) == "0"
    finally:
        project.down()
    ran("triton", "serve an OpenVINO repository, drain, stop", "healthy, stops with 0", time.monotonic() - began)


def test_the_charts_export_runs_once_and_as_any_user(images: Images, tmp_path: Path, ran: Ran) -> None:
    """The init container's script, with the engine that the stand-in has."""
    template = (DOCKER / "kubernetes/hypergen/templates/triton.yaml").read_text()
    found = re.search(r"^ +- (test -e .*)$", template, re.MULTILINE)
    assert found
    script = re.sub(r"\{\{.*?\}\}", "600", found[1])
    words = [
        "/models/.export.lock",
        "sh",
        "-c",
        script,
        "/models/key",
        "export",
        "hypergen/emoji",
        "--dtype",
        "float32",
    ]
    tmp_path.chmod(0o775)  # of root and group 0
    options = ["--user", FOREIGN, "--network", "none", "--volume", f"{tmp_path}:/models", "--volume", "/hub"]

    def export() -> str:
        entry_point = ["--entrypoint", "/opt/nvidia/nvidia_entrypoint.sh"]
        done = podman("run", "--rm", *options, *entry_point, images.tag("export"), "flock", *words)
        assert done.returncode == 0, done.stderr
        return done.stderr

    began = time.monotonic()
    assert "exported text_encoder, unet, vae_decoder, vae_encoder" in export()
    ran("export", f"the chart's init container, as {FOREIGN}", "exported", time.monotonic() - began)
    assert (tmp_path / "key" / "hypergen.json").is_file()
    assert "exported" not in export()
