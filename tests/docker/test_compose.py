"""compose.yaml: valid by the specification, and saying what our commands, images and ports mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from hypergen_gateway.serving import DRAIN_SECONDS
from support.compose_file import FILE, VARIABLE, read_compose

from .conftest import DOCKER, DOCKERFILES, read_command, run_tool

pytestmark = pytest.mark.claim("compose")


def compose(**environment: str) -> dict[str, Any]:
    """The file with its variables filled in: from `environment`, else their defaults."""
    return read_compose(environment)


def services(**environment: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose(**environment)["services"]
    return found


def of_profile(profile: str | None) -> set[str]:
    """The services that a profile adds; None: those that need none."""
    return {name for name, service in services().items() if service.get("profiles", [None]) == [profile]}


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def test_it_is_valid_by_the_compose_specification(tmp_path: Path) -> None:
    judged = run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE)
    assert judged.returncode == 0, judged.stdout
    # With profiles resolved and every variable filled in as well.
    files = []
    for profile in (None, "cpu", "observability"):
        kept = of_profile(None) | of_profile(profile)
        content = compose() | {"services": {name: services()[name] for name in kept}}
        files.append(tmp_path / f"{profile}.yaml")
        files[-1].write_text(yaml.safe_dump(content))
    judged = run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)
    assert judged.returncode == 0, judged.stdout


def test_the_profiles_hold_the_services_that_they_should() -> None:
    assert of_profile(None) == {"export", "triton", "gateway"}
    assert of_profile("cpu") == {"cpu"}
    assert of_profile("observability") == {"prometheus", "grafana"}


@pytest.mark.parametrize("profile", [None, "cpu", "observability"])
def test_a_profile_needs_nothing_of_another(profile: str | None) -> None:
    there = of_profile(None) | of_profile(profile)
    for name in of_profile(profile):
        assert set(services()[name].get("depends_on", ())) <= there


def test_every_variable_has_its_default_in_the_example_file() -> None:
    used = {match[1]: match[2] for match in VARIABLE.finditer(FILE.read_text()) if match[2] != "hypergen/emoji"}
    # Variables that are passed on as they are, or not at all.
    used |= {
        name: "" for each in services().values() for name, value in each.get("environment", {}).items() if value is None
    }
    example = (DOCKER / ".env.example").read_text()
    assert dict(re.findall(r"^#(\w+)=(.*)$", example, re.MULTILINE)) == used
    assert "$" not in VARIABLE.sub("", FILE.read_text())


@pytest.mark.parametrize("name", ["gateway", "cpu"])
def test_serve_understands_its_command(name: str) -> None:
    given = services(HYPERGEN_MAX_QUEUE_SIZE="7", HYPERGEN_LOG_LEVEL="debug")[name]["command"]
    options = read_command(given)
    assert (options["max_queue_size"], options["log_level"]) == (7, "debug")
    assert str(options["api_key_file"]) == "/run/secrets/api_key"


def test_serve_refuses_what_it_would_refuse_outside() -> None:
    with pytest.raises(click.UsageError):
        read_command(services(HYPERGEN_MAX_QUEUE_SIZE="many")["gateway"]["command"])


def test_the_gateway_finds_triton_by_its_name() -> None:
    assert read_command(services()["gateway"]["command"])["triton_url"] == "triton:8001"


def test_export_understands_its_command() -> None:
    options = read_command(services(HYPERGEN_MODEL="/checkpoints/mine")["export"]["command"])
    assert (options["model"], options["engine"], options["dtype"]) == ("/checkpoints/mine", "tensorrt", "float16")
    assert options["max_batch_size"] == 4


def test_a_transformer_is_a_matter_of_variables() -> None:
    names = {"HYPERGEN_MODEL": "Tongyi-MAI/Z-Image-Turbo", "HYPERGEN_DTYPE": "bfloat16"}
    options = read_command(services(**names, HYPERGEN_EXPORT_SIZES="1024x1024")["export"]["command"])
    assert (options["model"], options["dtype"], options["sizes"]) == (*names.values(), "1024x1024")


def test_an_export_lands_where_triton_looks() -> None:
    command = services()["export"]["command"]
    output = Path(command[command.index("--output") + 1])
    assert f"--model-repository={output}" in (DOCKER / "triton.Dockerfile").read_text()
    # Renaming into place works inside a volume, not over its mount point.
    for name in ("export", "triton"):
        assert f"models:{output.parent}" in [volume.removesuffix(":ro") for volume in services()[name]["volumes"]]


def test_triton_is_reached_from_inside_alone() -> None:
    triton = services()["triton"]
    assert "ports" not in triton
    assert triton["networks"] == ["inside"]
    assert compose()["networks"]["inside"] == {"internal": True}
    assert {name for name, service in services().items() if "inside" in service["networks"]} == {
        "triton",
        "gateway",
        "prometheus",
        "grafana",
    }


def test_only_the_api_and_on_this_machine_grafana_are_published() -> None:
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published == {
        "gateway": ["8000:8000"],
        "cpu": ["8000:8000"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_each_waits_for_what_it_needs() -> None:
    assert services()["triton"]["depends_on"] == {"export": {"condition": "service_completed_successfully"}}
    assert services()["gateway"]["depends_on"] == {"triton": {"condition": "service_healthy"}}


def test_the_gpu_that_builds_is_the_gpu_that_serves() -> None:
    devices = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in services(HYPERGEN_GPU="1").items()
        if "deploy" in service
    }
    wanted = [{"driver": "nvidia", "device_ids": ["1"], "capabilities": ["gpu"]}]
    assert devices == {"export": wanted, "triton": wanted}


def test_all_come_back_but_the_export() -> None:
    restarts = {name: service["restart"] for name, service in services().items()}
    assert restarts.pop("export") == "no"
    assert set(restarts.values()) == {"unless-stopped"}


def test_running_images_have_time_to_finish() -> None:
    graces = {name: seconds(services()[name]["stop_grace_period"]) for name in ("gateway", "cpu", "triton")}
    assert graces["gateway"] > DRAIN_SECONDS
    assert graces["cpu"] > DRAIN_SECONDS + 10
    match = re.search(r"--exit-timeout-secs=(\d+)", (DOCKER / "triton.Dockerfile").read_text())
    assert match
    assert graces["triton"] > int(match[1])


@pytest.mark.parametrize("name", sorted(services()))
def test_no_container_may_more_than_it_needs(name: str) -> None:
    service = services()[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"]["max-size"]
    assert not {"privileged", "network_mode", "pid", "user"} & service.keys()


def test_the_gateway_writes_nothing() -> None:
    assert services()["gateway"]["read_only"] is True


def test_the_key_is_a_file_and_in_no_environment() -> None:
    assert compose(HYPERGEN_API_KEY_FILE="/etc/key")["secrets"] == {"api_key": {"file": "/etc/key"}}
    assert {name for name, service in services().items() if "secrets" in service} == {"gateway", "cpu"}
    assert not [name for service in services().values() for name in service.get("environment", {}) if "KEY" in name]


def test_what_is_built_and_mounted_is_there() -> None:
    for service in services().values():
        if "build" in service:
            file = FILE.parent / service["build"]["context"] / service["build"]["dockerfile"]
            assert file.resolve() in DOCKERFILES
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose()["volumes"] or source == "./checkpoints" or (FILE.parent / source).exists()


def test_images_of_others_are_pinned() -> None:
    others = [service["image"] for service in services().values() if "build" not in service]
    assert all(re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", image) for image in others)
    assert len(others) == 2
