"""HyperGen installed and served in the ways that people have: `make installs`, or some: ARGS="wheel python3.12".

Each row installs, or takes an environment that an earlier row has made, serves the shipped model from a folder outside
the checkout, asks it for an image, looks whether that is what the prompt says, and stops it: it must exit with 0, or if
make runs it by the signal, and leave neither processes nor shared memory. Where it cannot work, one clear line must say
so. Prints a table in Markdown, each row as soon as it is known; fails if a row does. As root, for another user, mounts
and limits of its own.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "export/emoji")]

import openai  # noqa: E402

from benchmarks.environments import ROOT, ToolError, install, run  # noqa: E402
from clients import judging  # noqa: E402
from clients.judging import WrongImageError  # noqa: E402
from installs import places  # noqa: E402
from installs.places import AS_USER, INSTALL_SECONDS, USER  # noqa: E402
from installs.serving import Command, refusal, serve_an_image  # noqa: E402
from support.running_server import Server, start_server, stop_server  # noqa: E402

MODEL = "hypergen/emoji"
# Nothing listens there: whoever asks a proxy for loopback fails.
DEAD_PROXY = "http://127.0.0.1:9"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
READ_ONLY_HOME = 'mount --bind "$HOME" "$HOME" && mount -o remount,bind,ro "$HOME" && exec "$@"'


class Ground:
    """What rows share: a folder outside the checkout, a server to compare with, the wheel, an environment with it."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.server = server
        self.references = judging.generate_references(server.client())

    @functools.cached_property
    def wheel(self) -> Path:
        return places.build_wheel(self.folder / "wheel")

    @functools.cached_property
    def requirements(self) -> list[str]:
        return [f"hypergen-triton[all] @ {self.wheel.as_uri()}", places.torch_release()]

    @functools.cached_property
    def hypergen(self) -> str:
        """In an environment that other users may use, too."""
        python = places.python_for(AS_USER)
        run(["sh", str(ROOT / ".ci" / "system-packages")], INSTALL_SECONDS, PYTHON=python)
        return str(places.install_wheel(python, self.folder / "pip", self.requirements))

    @functools.cached_property
    def uv(self) -> Path:
        return install(self.folder / "uv", [places.UV]).with_name("uv")

    def home(self, name: str) -> Path:
        """An empty home folder."""
        folder = self.folder / "home" / name
        folder.mkdir(parents=True)
        return folder

    def serve(self, words: Sequence[str], home: Path, **environment: str) -> float:
        """Seconds until the shipped model is served with this home folder; its image is right, and it stops."""
        return serve_an_image(Command(words, self._variables(home, environment)), self.references)

    def refuse(self, words: Sequence[str], home: Path, expected: str) -> None:
        """Raises ToolError if the command does not say `expected` and end."""
        said = refusal(Command(words, self._variables(home, {})))
        if expected not in said:
            raise ToolError(f"it says: {said}")

    def _variables(self, home: Path, environment: dict[str, str]) -> dict[str, str]:
        return {"HOME": str(home), "XDG_CACHE_HOME": "", **environment}


@dataclass(frozen=True)
class Result:
    """What came of a row: seconds of an installation that is its own, and until the server was ready."""

    installed: float | None = None
    ready: float | None = None
    outcome: str = "an image"


@dataclass(frozen=True)
class Way:
    """A row: how it is installed or what surrounds it, in words, and what tries it."""

    name: str
    words: str
    try_out: Callable[[Ground], Result]


def timed(action: Callable[[], str]) -> tuple[str, float]:
    began = time.monotonic()
    return action(), time.monotonic() - began


def by_make(version: str, ground: Ground) -> Result:
    """`make serve` in a copy of the checkout; installed first, so that the two are timed apart."""
    return _make(ground, f"python{version}", places.find_python(version), ())


def by_make_as_user(ground: Ground) -> Result:
    """The same by somebody who may not install system packages."""
    python = places.python_for(AS_USER)
    run(["sh", str(ROOT / ".ci" / "system-packages")], INSTALL_SECONDS, PYTHON=python)
    return _make(ground, "user", python, AS_USER)


def _make(ground: Ground, name: str, python: str, prefix: Sequence[str]) -> Result:
    home = ground.home(name)
    checkout = places.copy_checkout(ground.folder / name)
    make = [*prefix, "make", "-C", str(checkout), f"PYTHON={python}"]
    # A user of the machine has its settings of pip and its cache; another one starts with nothing.
    environment = {}
    if prefix:
        environment["HOME"] = str(home)
        for folder in (home, checkout):
            run(["chown", "--recursive", f"{USER}:{USER}", str(folder)])
    try:
        _, installed = timed(lambda: run([*make, "setup"], INSTALL_SECONDS, **environment))
        return Result(installed, ground.serve([*make, "serve"], home))
    finally:
        shutil.rmtree(checkout)


def refused_by_make(ground: Ground) -> Result:
    python = places.find_python("3.13")
    checkout = places.copy_checkout(ground.folder / "python3.13")
    make = ["make", "-C", str(checkout), f"PYTHON={python}", "serve"]
    ground.refuse(make, ground.home("python3.13"), "HyperGen needs Python 3.10, 3.11 or 3.12, and ")
    if (checkout / ".venv").exists():
        raise ToolError("it made .venv all the same")
    return Result(outcome="refused in one line")


def gateway_alone(ground: Ground) -> Result:
    """Without extras, on a Python that the embedded Triton does not support, before a Triton that runs elsewhere."""
    python = places.find_python("3.13")
    folder = ground.folder / "gateway"
    hypergen, installed = timed(lambda: str(places.install_wheel(python, folder, [str(ground.wheel)])))
    home = ground.home("gateway")
    ground.refuse([hypergen, "serve"], home, "--triton-url")
    return Result(installed, ground.serve([hypergen, "serve", "--triton-url", ground.server.triton_url], home))


def by_pip(ground: Ground) -> Result:
    hypergen, installed = timed(lambda: ground.hypergen)
    return Result(installed, ground.serve([hypergen, "serve", MODEL], ground.home("pip")))


def by_uv_pip(name: str, ground: Ground) -> Result:
    """In an environment under `name`, with everything else that is written there, too."""
    python = places.find_python(places.PYTHONS[0])
    folder = ground.folder / name
    hypergen, installed = timed(lambda: str(places.uv_install(ground.uv, python, folder / "venv", ground.requirements)))
    home, temporary = ground.home(name), folder / "temporary"
    temporary.mkdir()
    return Result(installed, ground.serve([hypergen, "serve", MODEL], home, TMPDIR=str(temporary)))


def by_uv_tool(ground: Ground) -> Result:
    python = places.find_python(places.PYTHONS[0])
    folder = ground.folder / "uv tool"
    hypergen, installed = timed(lambda: str(places.uv_tool_install(ground.uv, python, folder, ground.requirements)))
    return Result(installed, ground.serve([hypergen, "serve", MODEL], ground.home("uv tool")))


def as_user(ground: Ground) -> Result:
    """The environment is root's, the home folder the user's."""
    home = ground.home("user of pip")
    os.chown(home, USER, USER)
    return Result(ready=ground.serve([*AS_USER, ground.hypergen, "serve", MODEL], home))


def read_only_home(ground: Ground) -> Result:
    home, cache = ground.home("read-only"), ground.home("cache")
    serve = [*in_namespace(READ_ONLY_HOME), ground.hypergen, "serve", MODEL]
    ground.refuse(serve, home, "see --cache-dir")
    ready = ground.serve([*serve, "--cache-dir", str(cache)], home)
    return Result(ready=ready, outcome="refused in one line; with `--cache-dir` an image")


def with_proxies(ground: Ground) -> Result:
    """Loopback is not asked of a proxy, as nobody has excepted it."""
    proxies = {name: DEAD_PROXY for each in PROXIES for name in (each, each.upper())}
    exceptions = {"no_proxy": "", "NO_PROXY": "", "no_grpc_proxy": ""}
    return Result(ready=ground.serve([ground.hypergen, "serve", MODEL], ground.home("proxy"), **proxies, **exceptions))


def with_shared_memory(ground: Ground) -> Result:
    command = [*in_namespace('mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'), ground.hypergen, "serve", MODEL]
    return Result(ready=ground.serve(command, ground.home("shm 64m")))


def without_shared_memory(ground: Ground) -> Result:
    command = [*in_namespace('mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'), ground.hypergen, "serve", MODEL]
    ground.refuse(command, ground.home("shm 1m"), "MiB of shared memory, and /dev/shm has 1.0 MiB left")
    return Result(outcome="refused in one line")


def with_files(number: int, ground: Ground) -> Result:
    command = ["sh", "-c", f'ulimit -n {number} && exec "$@"', "sh", ground.hypergen, "serve", MODEL]
    return Result(ready=ground.serve(command, ground.home(f"files {number}")))


def in_namespace(script: str) -> list[str]:
    """What runs a command, given as the script's arguments, where mounts are its own."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


WAYS = (
    *(
        Way(f"python{version}", f"`make serve PYTHON=python{version}`", functools.partial(by_make, version))
        for version in sorted(places.PYTHONS)
    ),
    Way("python3.13", "`make serve PYTHON=python3.13`", refused_by_make),
    Way("gateway", "the wheel on Python 3.13, `hypergen serve --triton-url`", gateway_alone),
    Way("user", "`make serve` by a user who is not root", by_make_as_user),
    Way("wheel", "the wheel by pip, outside the checkout", by_pip),
    Way("uv_pip", "the wheel by `uv pip install`", functools.partial(by_uv_pip, "uv-pip")),
    Way("uv_tool", "the wheel by `uv tool install`", by_uv_tool),
    Way("space", "environment, home and temporary folder under `a b`", functools.partial(by_uv_pip, "a b")),
    Way("umlaut", "the same under `jürgen`", functools.partial(by_uv_pip, "jürgen")),
    Way("other_user", "root's environment, another user's home", as_user),
    Way("read_only_home", "a home folder that cannot be written to", read_only_home),
    Way("proxy", "proxy variables that name a dead port", with_proxies),
    Way("shm_64m", "64 MB of `/dev/shm`, as Docker gives", with_shared_memory),
    Way("shm_1m", "1 MiB of `/dev/shm`", without_shared_memory),
    Way("files_256", "`ulimit -n 256`", functools.partial(with_files, 256)),
)
HEAD = ("| way | what runs | result | installed in | ready after |", "|---|---|---|---|---|")


def row(way: Way, result: Result | None) -> str:
    """A line of the table; without a result the way fails."""
    cells = (way.name, way.words, *(("fails", "", "") if result is None else told(result)))
    return f"| {' | '.join(cells)} |"


def told(result: Result) -> tuple[str, str, str]:
    return result.outcome, seconds(result.installed), seconds(result.ready)


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} s"


def try_all(ways: Sequence[Way], ground: Ground) -> int:
    """Print each row as it ends; how many fail."""
    print("\n".join(HEAD), flush=True)
    failures = 0
    for way in ways:
        print(f"{way.name} …", file=sys.stderr)
        try:
            result = way.try_out(ground)
        except (ToolError, WrongImageError, AssertionError, subprocess.TimeoutExpired, openai.OpenAIError) as error:
            failures += 1
            print(f"{way.name}: {error}", file=sys.stderr)
            result = None
        print(row(way, result), flush=True)
    return failures


def main() -> int:
    names = [way.name for way in WAYS]
    parser = argparse.ArgumentParser(description="HyperGen installed and served in the ways that people have.")
    parser.add_argument("names", nargs="*", metavar="WAY", help=", ".join(names))
    asked = parser.parse_args().names
    if unknown := set(asked) - set(names):
        parser.error(f"there is no way {', '.join(sorted(unknown))}")
    if os.getuid() != 0:
        parser.error("run it as root: it starts servers as another user, and mounts")
    server = start_server(model="")
    try:
        # Not below /tmp, which is memory on some machines; readable for the other user.
        with tempfile.TemporaryDirectory(prefix="hypergen-installs-", dir="/var/tmp") as folder:
            Path(folder).chmod(0o755)
            failures = try_all([way for way in WAYS if not asked or way.name in asked], Ground(Path(folder), server))
    finally:
        stop_server(server)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
