"""Client libraries against the shipped model, as their users run them: `make clients`, or some: ARGS="jdk litellm".

Each folder beside this file is a client: a driver that a user of it would write, and the release it is held to. Each is
installed into an environment of its own under build/clients/. One server generates for all of them, with a key. Every
driver talks to it through a relay that keeps the requests, so that it is known what the client asked for by itself;
what came back is decoded and looked at. Prints a table in Markdown; fails if anything in it does.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "export/emoji")]

from PIL.Image import Image  # noqa: E402

from benchmarks.environments import BUILD, ToolError, install, run  # noqa: E402
from clients import judging  # noqa: E402
from clients.judging import References, WrongImageError  # noqa: E402
from clients.relay import Relay, WireRequest, relay_to  # noqa: E402
from support.running_server import KEY, Server, start_server, stop_server  # noqa: E402

ENVIRONMENTS = BUILD / "clients"
OPERATIONS = ("generate", "edit", "stream", "vary")
LIMIT_SECONDS = 300
# Releases that are driven as another one is: client, client with the driver.
SHARED_DRIVERS = {"openai_node_5": "openai_node", "openai_node_6": "openai_node"}
# What clients ask of others by themselves, a price list and who uses them: nothing of it is wanted here.
SILENT = {
    "AGNO_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


@dataclass(frozen=True)
class Client:
    """A folder with a driver, its own or a shared one; its name is the folder's."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def home(self) -> Path:
        """Where it is installed."""
        return ENVIRONMENTS / self.name

    @property
    def requirements(self) -> list[str]:
        file = self.folder / "requirements.txt"
        return file.read_text(encoding="utf-8").split() if file.exists() else []

    @property
    def dependencies(self) -> Mapping[str, str]:
        file = self.folder / "package.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))["dependencies"]) if file.exists() else {}

    @property
    def release(self) -> str:
        """What it is held to, as a reader knows it: its packages, or what `source.txt` says."""
        if (source := self.folder / "source.txt").exists():
            return source.read_text(encoding="utf-8").strip()
        pinned = [requirement.replace("==", " ") for requirement in self.requirements if "==" in requirement]
        return ", ".join(pinned + [" ".join(pair) for pair in self.dependencies.items()])

    def command(self) -> list[str]:
        """Installs what it needs; what then runs the driver, less the file for its results. Raises ToolError."""
        if (self.folder / "Driver.java").exists():
            return ["java", str(self.folder / "Driver.java")]
        driver = self.folder.parent / SHARED_DRIVERS.get(self.name, self.name) / "driver.mjs"
        if driver.exists():
            self._install_node()
            shutil.copyfile(driver, self.home / "driver.mjs")
            return ["node", str(HERE / "driving.mjs"), str(self.home / "driver.mjs")]
        python = install(self.home, self.requirements) if self.requirements else Path(sys.executable)
        return [str(python), "-P", str(HERE / "driving.py"), str(self.folder / "driver.py")]

    def _install_node(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        wanted, done = self.folder / "package.json", self.home / "installed"
        if done.exists() and done.read_bytes() == wanted.read_bytes():
            return
        shutil.copyfile(wanted, self.home / "package.json")
        print(f"Installing {self.release} into {self.home}", file=sys.stderr)
        run(["npm", "install", "--prefix", str(self.home), "--no-audit", "--no-fund", "--no-package-lock"])
        shutil.copyfile(wanted, done)


@dataclass(frozen=True)
class Row:
    """What came of one client: per operation that it has, what is wrong with it, or None; and what it asked for."""

    client: Client
    problems: Mapping[str, str | None]
    asked: str


@dataclass(frozen=True)
class Bench:
    """The server, what its images are held against, and the files that are sent to it."""

    server: Server
    references: References
    image: Path
    mask: Path

    def try_out(self, client: Client) -> Row:
        try:
            command = client.command()
        except ToolError as error:
            return Row(client, {"generate": f"cannot be installed: {error}"}, "")
        with relay_to("127.0.0.1", self.server.port) as relay:
            outcomes = self._drive(command, client.home, relay)
            requests = relay.requests()
        problems = {name: self._problem(name, outcome, requests) for name, outcome in outcomes.items()}
        return Row(client, problems, asked_by(requests))

    def _drive(self, command: Sequence[str], home: Path, relay: Relay) -> Mapping[str, Any]:
        home.mkdir(parents=True, exist_ok=True)
        results, log = home / "results.json", home / "log.txt"
        results.unlink(missing_ok=True)
        url = f"http://127.0.0.1:{relay.port}/v1"
        environment = (
            os.environ
            | SILENT
            | {
                "PYTHONPATH": str(HERE.parent),  # for those that `raw` speaks for
                "OPENAI_BASE_URL": url,
                "OPENAI_API_BASE": url,  # what openai 0.28, litellm and LangChain read
                "OPENAI_API_KEY": KEY,
                "HYPERGEN_PROMPT": judging.PROMPT,
                "HYPERGEN_EDIT_PROMPT": judging.EDIT_PROMPT,
                "HYPERGEN_IMAGE": str(self.image),
                "HYPERGEN_MASK": str(self.mask),
            }
        )
        with log.open("wb") as output:
            try:
                subprocess.run(
                    [*command, str(results)],
                    cwd=home,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=LIMIT_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return {"generate": {"error": f"took longer than {LIMIT_SECONDS} s"}}
        if not results.exists():
            return {"generate": {"error": f"ended without results, see {log}"}}
        return dict(json.loads(results.read_text(encoding="utf-8")))

    def _problem(self, operation: str, outcome: Mapping[str, Any], requests: Sequence[WireRequest]) -> str | None:
        """What is wrong with what came back from an operation, if anything is."""
        if "error" in outcome:
            return str(outcome["error"])
        try:
            images = [judging.decode(base64.b64decode(image)) for image in outcome["images"]]
            if not images:
                raise WrongImageError("no image came back")
            if operation == "stream" and len(images) < 2:
                raise WrongImageError("no previews")
            sent = [request for request in requests if operation_of(request) == operation]
            if not sent:
                raise WrongImageError("the server was not asked")
            self._check(operation, images[-1], sent[-1])
        except WrongImageError as error:
            return str(error)
        return None

    def _check(self, operation: str, image: Image, sent: WireRequest) -> None:
        starts_from_image = operation in ("edit", "vary")
        judging.check_size(image, sent.fields.get("size"), judging.UPLOAD if starts_from_image else judging.NATIVE)
        if not starts_from_image:
            judging.check_rocket(image, self.references)
            return
        upload = judging.decode(self.image.read_bytes())
        if operation == "edit":
            judging.check_edit(image, upload, masked="mask" in sent.files)
        else:
            judging.check_variation(image, upload, self.references)


def operation_of(request: WireRequest) -> str | None:
    path = request.target.partition("?")[0]
    if path.endswith("/images/generations"):
        return "stream" if str(request.fields.get("stream", "")).lower() == "true" else "generate"
    return {"edits": "edit", "variations": "vary"}.get(path.rpartition("/images/")[2])


def asked_by(requests: Sequence[WireRequest]) -> str:
    """What a generation asked for by itself: the model's name, the size, how images come back, what is unusual."""
    for request in requests:
        if operation_of(request) == "generate":
            told = [
                str(request.fields[name]) for name in ("model", "size", "response_format") if name in request.fields
            ]
            upgrade = request.headers.get("upgrade")
            return ", ".join([*told, *([f"Upgrade: {upgrade}"] if upgrade else [])])
    return ""


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| client | held to | generate | edit | stream | variation | asked for in a generation |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        marks = [mark(row.problems, operation) for operation in OPERATIONS]
        yield f"| {row.client.name} | {row.client.release} | {' | '.join(marks)} | {row.asked} |"


def mark(problems: Mapping[str, str | None], operation: str) -> str:
    if operation not in problems:
        return "–"
    return "fails" if problems[operation] else "yes"


def all_clients() -> list[Client]:
    names = {file.parent.name for file in HERE.glob("*/[dD]river.*")} | set(SHARED_DRIVERS)
    return [Client(HERE / name) for name in sorted(names)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Client libraries against the shipped model.")
    parser.add_argument("names", nargs="*", metavar="CLIENT", help=", ".join(each.name for each in all_clients()))
    names = parser.parse_args().names
    if unknown := set(names) - {client.name for client in all_clients()}:
        parser.error(f"there is no client {', '.join(sorted(unknown))}")
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    server = start_server(model="")
    try:
        references = judging.generate_references(server.client())
        bench = Bench(server, references, *judging.write_uploads(ENVIRONMENTS, references))
        rows = []
        for client in all_clients():
            if not names or client.name in names:
                print(f"{client.name} …", file=sys.stderr)
                rows.append(bench.try_out(client))
    finally:
        stop_server(server)
    print("\n".join(table(rows)))
    failures = [(row.client.name, *item) for row in rows for item in row.problems.items() if item[1]]
    for name, operation, problem in failures:
        print(f"{name}, {operation}: {re.sub(r'[A-Za-z0-9+/=]{200,}', '…', str(problem))[:600]}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
