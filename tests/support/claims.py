"""Claims about production, and a table of the claims that the tests have proved.

A test names its claim with `@pytest.mark.claim("hadolint")`, and `pytest --claims` prints the table at the end. A claim
holds if all its tests pass. A claim with a skipped test or without tests fails the run, as a failed test does.
`make production-check` runs only these tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

# The miniature of each family, by the name that tests are parametrized with -> the models that it stands for.
FAMILIES: Mapping[str, str] = {
    "sd-1": "Stable Diffusion 1.x",
    "sd-2": "Stable Diffusion 2.x",
    "sd-turbo": "SD-Turbo",
    "sdxl": "Stable Diffusion XL",
    "sd-inpainting": "Stable Diffusion 1.x inpainting",
    "sdxl-inpainting": "Stable Diffusion XL inpainting",
    "sdxl-turbo": "SDXL-Turbo",
    "sdxl-lightning": "SDXL-Lightning",
    "lcm": "Latent Consistency Models",
    "lcm-sdxl": "Latent Consistency Models of SDXL",
    "tcd": "Trajectory Consistency Distillation",
    "flux1-dev": "FLUX.1-dev, FLUX.1-Krea",
    "flux1-kontext": "FLUX.1-Kontext",
    "flux1-schnell": "FLUX.1-schnell",
    "chroma": "Chroma",
    "flux2-klein": "FLUX.2-klein",
    "flux2-klein-base": "FLUX.2-klein-base",
    "z-image": "Z-Image",
    "sana": "Sana",
    "sana-1.5": "Sana 1.5",
    "sana-sprint": "Sana-Sprint",
    "qwen-image": "Qwen-Image",
    "stable-diffusion-3": "Stable Diffusion 3 and 3.5, skip-layer guidance",
    "stable-diffusion-3-without-t5": "Stable Diffusion 3 without T5",
}

CLAIMS: Mapping[str, str] = {
    "families": "every family's images equal those of diffusers' pipeline",
    **{name: f"{models}: images equal those of diffusers' pipeline" for name, models in FAMILIES.items()},
    "engines": "TensorRT-RTX builds every component of every family from our ONNX",
    "precision": "float16 and bfloat16 are used only inside the engines; parts that would overflow stay float32",
    "bindings": "config.pbtxt parses in Triton's protobuf and names exactly the engines' tensors, types and profiles",
    "graphs": "every CUDA graph has a shape that exactly one profile takes",
    "plans": "plans of another TensorRT or GPU, and corrupt ones, are rejected before Triton starts",
    "hadolint": "hadolint has no complaint about any Dockerfile",
    "images": "what the images copy, pin and start matches the project and the real tritonserver",
    "compose": "compose.yaml is valid in every profile, and our commands accept its options",
    "chart": "the chart passes strict linting, and its manifests are valid for the oldest and newest Kubernetes",
    "scaling": "replicas are scaled by the sampler's gauges, which a running Triton exports",
    "rules": "promtool accepts configuration and rules, and each alert fires when it should",
    "metrics": "a running Triton exports every metric that dashboards and rules query",
    "drain": "a stop waits for running images",
    "replicas": "one of two Tritons is killed under load, and no request is lost",
    "prove": "docker/prove detects what is wrong with the services it started",
    "built": "the images are built, run as their users, and docker/prove proves the services of compose.yaml",
}
# Proved by tests that run only if they are asked for, as they take minutes.
ON_REQUEST = ("built",)


@dataclass
class Evidence:
    """How the tests of one claim ended."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """`pass`, `FAIL`, or `not proved` where a test was skipped or there is none."""
        if self.outcomes["failed"]:
            return "FAIL"
        return "pass" if set(self.outcomes) == {"passed"} else "not proved"


class ClaimsTable:
    """The plugin behind `--claims`."""

    def __init__(self, with_images: bool = False) -> None:
        self.evidence = {name: Evidence() for name in CLAIMS if with_images or name not in ON_REQUEST}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: by its call, or by what kept it from being called or went wrong around it."""
        for evidence in (self.evidence[str(claim)] for name, claim in report.user_properties if name == "claim"):
            evidence.seconds += report.duration
            if report.when == "call" or report.outcome != "passed":
                evidence.outcomes[report.outcome] += 1
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                evidence.reasons.add(report.longrepr[2].removeprefix("Skipped: "))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail where not everything was proved."""
        if exitstatus == pytest.ExitCode.OK and not self.all_hold:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table."""
        terminalreporter.section("claims")
        width = max(map(len, CLAIMS.values()))
        for name, evidence in self.evidence.items():
            text = CLAIMS[name]
            colour = {"green": evidence.verdict == "pass", "red": evidence.verdict != "pass"}
            terminalreporter.write(f"{evidence.verdict:10}", **colour)
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(evidence.outcomes.items()))
            terminalreporter.write_line(f"  {text:{width}}  {counts or 'no test'}, {evidence.seconds:.0f} s")
            for reason in sorted(evidence.reasons):
                terminalreporter.write_line(f"{'':12}{reason}")

    @property
    def all_hold(self) -> bool:
        """Whether every claim is proved."""
        return all(evidence.verdict == "pass" for evidence in self.evidence.values())


def attach_claims(items: list[pytest.Item]) -> None:
    """Let each test's report say what it is evidence for: the nearest marker's claims, which stand for wider ones.

    A test of the claim "families" is also evidence for the family that it is parametrized with.
    """
    for item in items:
        marker = item.get_closest_marker("claim")
        for claim in marker.args if marker else ():
            if claim not in CLAIMS:
                raise pytest.UsageError(f"{item.nodeid}: {claim!r} is none of tests/support/claims.py")
            item.user_properties.append(("claim", claim))
            if claim == "families" and isinstance(item, pytest.Function):
                item.user_properties += [("claim", family) for family in families_of(item)]


def families_of(test: pytest.Function) -> list[str]:
    """The family that a test is parametrized with, if any."""
    parameters = test.callspec.params.values() if hasattr(test, "callspec") else ()
    return [value for value in parameters if isinstance(value, str) and value in FAMILIES]
