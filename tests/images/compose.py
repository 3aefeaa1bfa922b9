"""The services of docker/compose.yaml, run by podman as Compose runs them.

Stands in for `docker` where there is no daemon, with the commands that docker/prove gives:

    python -m images.compose compose --project-name NAME up --detach cpu

COMPOSE_FILE may name one more file, whose services change those of compose.yaml, as for Compose. Not read: restarts,
logs' sizes and devices, since nothing here has a GPU.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import yaml

from images.podman import build, output_of, podman
from support.compose_file import FILE, ROOT, read_compose

START_SECONDS = 900
# More than any service starts, and fewer than conmon may have.
PROCESSES = 2**15
FLAGS = {"read_only": "--read-only", "init": "--init"}
VALUES = {"shm_size": "--shm-size"}
LISTS = {"cap_drop": "--cap-drop", "security_opt": "--security-opt", "tmpfs": "--tmpfs", "ports": "--publish"}


@dataclass(frozen=True)
class Project:
    """The file's services under a project's name."""

    name: str
    file: Mapping[str, Any]

    @classmethod
    def read(cls, name: str, environment: Mapping[str, str]) -> Project:
        """compose.yaml, with the variables and the further file of the environment."""
        file = read_compose(environment)
        if further := environment.get("COMPOSE_FILE"):
            for service, changes in yaml.safe_load(Path(further).read_text())["services"].items():
                file["services"][service] |= changes
        return cls(name, file)

    def container(self, service: str) -> str:
        """The name of its only container."""
        return f"{self.name}-{service}-1"

    def image(self, service: str) -> str:
        """Images without a registry are this machine's."""
        return f"localhost/{self.file['services'][service]['image']}"

    def needed_by(self, service: str) -> dict[str, str]:
        """Services that must be up before this one, and their condition."""
        needs = self.file["services"][service].get("depends_on", {})
        return {name: need["condition"] for name, need in needs.items()}

    def build(self, service: str, base: Mapping[str, str]) -> None:
        """Build the service's image. `base` replaces arguments that name an image."""
        built = self.file["services"][service]["build"]
        context = FILE.parent / built["context"]
        with TemporaryDirectory() as scratch:
            arguments = {**built.get("args", {}), **base}
            done = build(context / built["dockerfile"], self.image(service), context, arguments, Path(scratch))
        if done.returncode != 0:
            raise click.ClickException(f"{service} was not built: {done.stderr[-4000:]}")

    def up(self, service: str) -> None:
        """Start a service after those that it needs, in the state that it needs them in."""
        for needed, condition in self.needed_by(service).items():
            self.up(needed)
            self.wait_for(needed, condition)
        self.create_networks(service)
        command = ["run", "--detach", "--pull=never", "--name", self.container(service), *self.options(service)]
        output_of(*command, self.image(service), *self.file["services"][service].get("command", []))

    def wait_for(self, service: str, condition: str) -> None:
        """Wait for `service_healthy` or `service_completed_successfully`. Raises ClickException if it cannot come."""
        deadline = time.monotonic() + START_SECONDS
        while not self.is_in(service, condition):
            if time.monotonic() > deadline:
                raise click.ClickException(f"{service} is not {condition} after {START_SECONDS} s")
            time.sleep(0.5)

    def is_in(self, service: str, condition: str) -> bool:
        """Whether it is in this state. Raises ClickException if it has ended otherwise."""
        status, code = output_of(
            "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", self.container(service)
        ).split()
        has_ended = status in ("exited", "stopped")
        if has_ended and (code != "0" or condition == "service_healthy"):
            raise click.ClickException(f"{service} has ended with exit code {code}")
        # Without systemd, podman has no timer for health checks.
        return has_ended or (condition == "service_healthy" and self.is_healthy(service))

    def is_healthy(self, service: str) -> bool:
        """What the image's HEALTHCHECK says now."""
        return podman("healthcheck", "run", self.container(service)).returncode == 0

    def create_networks(self, service: str) -> None:
        """The networks of a service, unless they exist."""
        for name in self.file["services"][service]["networks"]:
            options = self.file["networks"][name] or {}
            if podman("network", "exists", f"{self.name}_{name}").returncode != 0:
                output_of(
                    "network", "create", *(["--internal"] if options.get("internal") else []), f"{self.name}_{name}"
                )

    def options(self, service: str) -> Iterator[str]:
        """What the file says of a service, as options of `podman run`."""
        stated = self.file["services"][service]
        yield from (flag for key, flag in FLAGS.items() if stated.get(key))
        for key, flag in VALUES.items():
            yield from [flag, str(stated[key])] if key in stated else []
        for key, flag in LISTS.items():
            for value in stated.get(key, []):
                yield from (flag, value)
        for name in stated["networks"]:
            yield from ("--network", f"{self.name}_{name}")
        yield from ("--network-alias", service)
        for name, value in stated.get("environment", {}).items():
            yield from ("--env", name if value is None else f"{name}={value}")
        for name, limit in limits(stated.get("ulimits", {})).items():
            yield from ("--ulimit", f"{name}={limit}:{limit}")
        for mount in self.mounts(stated):
            yield from ("--volume", mount)

    def mounts(self, stated: Mapping[str, Any]) -> Iterator[str]:
        """Named volumes under the project's name, folders by their path, secrets as files."""
        for volume in stated.get("volumes", []):
            source, rest = volume.split(":", 1)
            if source in self.file["volumes"]:
                yield f"{self.name}_{volume}"
            else:
                folder = (FILE.parent / source).resolve()
                folder.mkdir(parents=True, exist_ok=True)
                yield f"{folder}:{rest}"
        for name in stated.get("secrets", []):
            file = (FILE.parent / self.file["secrets"][name]["file"]).resolve()
            yield f"{file}:/run/secrets/{name}:ro"

    def stop(self, service: str) -> None:
        """Stop a service within its grace period."""
        grace = self.file["services"][service].get("stop_grace_period", "10s").removesuffix("s")
        output_of("stop", "--time", grace, self.container(service))

    def down(self) -> None:
        """Remove containers, networks and volumes of the project."""
        for service in reversed(list(self.file["services"])):
            podman("rm", "--force", "--time", "10", self.container(service))
        for name in self.file["networks"]:
            podman("network", "rm", "--force", f"{self.name}_{name}")
        for name in self.file["volumes"]:
            podman("volume", "rm", "--force", f"{self.name}_{name}")


def limits(stated: Mapping[str, str | int]) -> dict[str, int]:
    """The limits as far as this process may set them. Where some are given, podman would raise two others, too."""
    found = {}
    for name, limit in {"nofile": -1, "nproc": PROCESSES, **stated}.items() if stated else ():
        _, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
        known = [each for each in (int(limit), hard) if each != resource.RLIM_INFINITY]
        found[name] = min(known, default=-1)
    return found


@click.group()
def docker() -> None:
    """The commands of docker/prove."""


@docker.command()
def info() -> None:
    """Whether containers can be run."""
    output_of("info")


@docker.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1)
def inspect(words: tuple[str, ...]) -> None:
    """As podman does it."""
    click.echo(output_of("inspect", *words))


@docker.group(name="compose")
@click.option("--project-name", required=True)
@click.option("--profile", expose_value=False)
@click.pass_context
def compose(context: click.Context, project_name: str) -> None:
    """Services of docker/compose.yaml."""
    context.obj = Project.read(project_name, os.environ)


@compose.command(name="build")
@click.argument("services", nargs=-1)
@click.pass_obj
def build_images(project: Project, services: tuple[str, ...]) -> None:
    """Build images, on the bases that HYPERGEN_BASES names: PYTHON_IMAGE=…,TRITON_IMAGE=…."""
    bases = dict(base.split("=", 1) for base in os.environ.get("HYPERGEN_BASES", "").split(",") if base)
    for service in services:
        stated = inspect_dockerfile(project, service)
        project.build(service, {name: image for name, image in bases.items() if name in stated})


def inspect_dockerfile(project: Project, service: str) -> str:
    """The service's Dockerfile."""
    return (ROOT / str(project.file["services"][service]["build"]["dockerfile"])).read_text()


@compose.command()
@click.option("--detach", is_flag=True, required=True, expose_value=False)
@click.argument("service")
@click.pass_obj
def up(project: Project, service: str) -> None:
    """Start a service and what it needs."""
    project.up(service)


@compose.command()
@click.argument("service")
@click.pass_obj
def stop(project: Project, service: str) -> None:
    """Stop a service."""
    project.stop(service)


@compose.command()
@click.option("--all", is_flag=True, expose_value=False)
@click.option("--quiet", is_flag=True, expose_value=False)
@click.argument("service")
@click.pass_obj
def ps(project: Project, service: str) -> None:
    """The container's id."""
    click.echo(output_of("inspect", "--format", "{{.Id}}", project.container(service)))


@compose.command()
@click.argument("service")
@click.argument("number")
@click.pass_obj
def port(project: Project, service: str, number: str) -> None:
    """Where a port is published."""
    click.echo(output_of("port", project.container(service), number))


@compose.command()
@click.option("--tail", default="all")
@click.argument("services", nargs=-1)
@click.pass_obj
def logs(project: Project, tail: str, services: tuple[str, ...]) -> None:
    """What services have said."""
    for service in services:
        done = podman("logs", "--tail", "-1" if tail == "all" else tail, project.container(service))
        click.echo(f"== {service}\n{done.stdout}{done.stderr}")


@compose.command()
@click.option("--volumes", is_flag=True, expose_value=False)
@click.option("--remove-orphans", is_flag=True, expose_value=False)
@click.option("--timeout", expose_value=False)
@click.pass_obj
def down(project: Project) -> None:
    """Remove everything of the project."""
    project.down()


if __name__ == "__main__":
    sys.exit(docker())
