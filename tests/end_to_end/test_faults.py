"""What breaks around a server, and what its clients see of it.

One server meets nearly all of it, one fault after the other, and must outlive every one. Each time, every request ends
in an image or in an error that says what to do, service is back by itself, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from support.running_server import (
    HYPERGEN,
    KEY,
    Server,
    generate,
    model_process,
    processes,
    samples_of,
    shared_memory,
    start_server,
    stop_server,
)

GENERATIONS = "/v1/images/generations"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# Under way when something breaks; then its steps are taken again.
LONG = {"size": "96x96", "num_inference_steps": 60}
# Far longer than anything that is done meanwhile; nobody waits for its end.
ENDLESS = {"size": "256x256", "num_inference_steps": 150}
SHORT = {"prompt": "cat", "size": "64x64", "num_inference_steps": 1}
BACK_SECONDS = 20.0
REQUEST_TIMEOUT = 60.0
BODY_TIMEOUT = 2.0
Seen = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Disk:
    """A file system of its own, small enough to be filled; where none can be mounted, a folder that cannot be."""

    folder: Path
    obstacle: str = ""

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Without a free byte while it lasts."""
        if self.obstacle:
            pytest.skip(f"a small file system cannot be mounted here: {self.obstacle}")
        ballast = self.folder / "ballast"
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
            assert not shutil.disk_usage(self.folder).free
            yield
        finally:
            ballast.unlink()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True)
    yield Disk(folder, mounting.stderr.decode().strip())
    if not mounting.returncode:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def sturdy(exported: Path, disk: Disk) -> Iterator[Server]:
    """Links, uploads and Triton's own files are on the small disk."""
    limits = ["--body-timeout", f"{BODY_TIMEOUT:g}", "--request-timeout", f"{REQUEST_TIMEOUT:g}"]
    place = {"TMPDIR": str(disk.folder)}
    running = start_server("--cache-dir", str(disk.folder), *limits, model=str(exported), environment=place)
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)
    assert not shared_memory(running)
    assert {left.name for left in disk.folder.iterdir()} <= {"links"}


@pytest.fixture
def seen(record_property: Callable[[str, object], None]) -> Seen:
    """Takes down what broke, what happened and after how long service was back."""

    def take_down(broken: str, happened: str, back: str) -> None:
        print(f"{broken}: {happened}; back after {back}")
        record_property("fault", (broken, happened, back))

    return take_down


@dataclass(frozen=True)
class Holdings:
    """What a server holds when nobody asks it for anything."""

    processes: tuple[tuple[str, int], ...]
    handles: int
    regions: int
    files: tuple[str, ...]
    gauges: tuple[tuple[str, float], ...]

    def within(self, before: Holdings) -> bool:
        """A connection that was kept alive then may be gone."""
        return replace(self, handles=0) == replace(before, handles=0) and self.handles <= before.handles


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def holdings(server: Server, disk: Disk) -> Holdings:
    family = psutil.Process(server.process.pid).children(recursive=True)
    said = samples_of(httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=10).text, "hypergen_gateway_")
    return Holdings(
        processes=tuple(sorted(Counter(process.name() for process in family).items())),
        handles=psutil.Process(server.process.pid).num_fds(),
        regions=len(shared_memory(server)),
        # Each start of Triton has a folder of its own, whose name ends in something random.
        files=tuple(sorted(name.rpartition("-")[0] for name in names_in(disk.folder) if name != "links")),
        gauges=tuple((name, said[name]) for name in ("active_requests", "queued_requests", "asyncio_tasks")),
    )


@asynccontextmanager
async def nothing_is_left_of_it(server: Server, disk: Disk) -> AsyncIterator[None]:
    """Afterwards the server holds no more than it held before."""
    before = await asyncio.to_thread(holdings, server, disk)
    yield
    ends = time.monotonic() + 10
    while not (now := await asyncio.to_thread(holdings, server, disk)).within(before):
        assert time.monotonic() < ends, f"{before}\n{now}"
        await asyncio.sleep(0.2)


async def outcome_of(request: Any) -> str:
    """`image`, or the status of an error that is a clear one. Anything else is a lost request, and raised."""
    try:
        await asyncio.wait_for(request, REQUEST_TIMEOUT)
    except openai.APIStatusError as error:
        if error.status_code not in (429, 503) or "Retry-After" not in error.response.headers or not error.code:
            raise
        return str(error.status_code)
    return "image"


def told(outcomes: Counter[str]) -> str:
    names = {"image": "images", "429": "told when to come again (429)", "503": "told to come again (503)"}
    return ", ".join(f"{count} {names[outcome]}" for outcome, count in sorted(outcomes.items(), reverse=True))


async def begun(
    server: Server, requests: int, triton: Server | None = None, work: dict[str, Any] = LONG
) -> list[asyncio.Task[Any]]:
    """So many long requests, of which the UNet has taken steps; `triton` is the server that has it, if another."""
    before = (triton or server).counts_of()[1]
    client = server.async_client()
    tasks = [asyncio.create_task(generate(client, prompt="cat", seed=seed, **work)) for seed in range(requests)]
    while (triton or server).counts_of()[1] < before + 2:
        assert not any(task.done() for task in tasks), "\n".join(server.lines[-20:])
        await asyncio.sleep(0.02)
    asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: asyncio.ensure_future(client.close()))
    return tasks


async def seconds_until_it_generates(server: Server, began: float) -> float:
    async with server.async_client() as client:
        while True:
            with contextlib.suppress(openai.APIStatusError):
                await generate(client, **SHORT)
                return time.monotonic() - began
            assert time.monotonic() - began < 60, "\n".join(server.lines[-20:])
            await asyncio.sleep(0.1)


def limit_of(server: Server) -> float:
    """The promise; on a machine that is too busy to start a server in a few seconds, what that takes three times."""
    (seconds,) = [match[1] for line in server.lines if (match := re.search(r"Triton is ready after ([\d.]+) s", line))]
    return max(BACK_SECONDS, 3 * float(seconds) + 5)


async def seconds_until_it_is_back(server: Server, said: int, began: float) -> float:
    """Until it has said so after its first `said` lines, and generates."""
    while not any("Triton has restarted" in line for line in server.lines[said:]):
        assert time.monotonic() - began < 60, "\n".join(server.lines[-20:])
        await asyncio.sleep(0.05)
    return await seconds_until_it_generates(server, began)


@pytest.mark.parametrize(
    ("blow", "victim"),
    [
        *(("kill -9 of", victim) for victim in ("tritonserver", "diffusion", "unet", "vae_encoder")),
        *(("no sign of life from", victim) for victim in ("tritonserver", "diffusion", "unet")),
    ],
)
async def test_triton_is_replaced_when_it_dies_and_when_it_hangs(
    sturdy: Server, disk: Disk, blow: str, victim: str, seen: Seen
) -> None:
    async with nothing_is_left_of_it(sturdy, disk):
        process = processes(sturdy, victim)[0] if victim == "tritonserver" else model_process(sturdy, victim)
        requests = await begun(sturdy, 8)
        said = len(sturdy.lines)
        began = time.monotonic()
        process.send_signal(signal.SIGKILL if blow == "kill -9 of" else signal.SIGSTOP)
        replacing = asyncio.create_task(seconds_until_it_is_back(sturdy, said, began))
        async with sturdy.async_client() as client:
            # These meet it before anybody has noticed.
            requests += [asyncio.create_task(generate(client, **SHORT)) for _ in range(4)]
            outcomes = Counter(await asyncio.gather(*(outcome_of(request) for request in requests)))
        back = await replacing
    assert not process.is_running()
    assert back < limit_of(sturdy)
    name = victim if victim == "tritonserver" else f"the process of `{victim}`"
    seen(f"{blow} {name}", f"8 requests under way, 4 that come: {told(outcomes)}", f"{back:.1f} s")


async def test_a_burst_of_500_ends_in_images_and_clear_refusals(sturdy: Server, disk: Disk, seen: Seen) -> None:
    async with nothing_is_left_of_it(sturdy, disk):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=sturdy.url, headers=HEADERS, timeout=60, limits=limits) as client:
            answers = await asyncio.gather(*(client.post(GENERATIONS, json=SHORT) for _ in range(500)))
        began = time.monotonic()
        back = await seconds_until_it_generates(sturdy, began)
    outcomes = Counter(str(answer.status_code).replace("200", "image") for answer in answers)
    assert set(outcomes) == {"image", "429"}
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 429)
    assert outcomes["image"] >= 100  # as many as may wait
    seen("500 requests at once", told(outcomes), f"{back:.1f} s")


async def test_clients_that_leave_stall_or_trickle_do_not_disturb_others(
    sturdy: Server, disk: Disk, seen: Seen
) -> None:
    async with nothing_is_left_of_it(sturdy, disk), contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(stalled(sturdy))
        trickling = [asyncio.create_task(trickle(sturdy)) for _ in range(10)]
        leaving = [asyncio.create_task(leave(sturdy)) for _ in range(20)]
        client = await stack.enter_async_context(sturdy.async_client())
        outcomes = Counter([await outcome_of(generate(client, **SHORT)) for _ in range(5)])
        refused = Counter(await asyncio.gather(*trickling))
        await asyncio.gather(*leaving)
    assert outcomes == {"image": 5}
    assert refused == {"408 request_timeout": 10}
    seen(
        "20 clients leave, 10 read nothing, 10 send a byte now and then",
        "their work stops, the last get a 408; 5 others meanwhile: 5 images",
        "–",
    )


async def connect(server: Server, length: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 16)
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    writer.write(f"{head}Content-Length: {length}\r\n\r\n".encode())
    return reader, writer


async def trickle(server: Server) -> str:
    """A byte now and then, until the server has enough of it; its status and code."""
    reader, writer = await connect(server, 1000)
    answer = asyncio.ensure_future(reader.read())
    ends = time.monotonic() + 3 * BODY_TIMEOUT
    with contextlib.suppress(ConnectionError):
        while not answer.done() and time.monotonic() < ends:
            writer.write(b" ")
            await asyncio.wait([answer], timeout=0.25)
    head, _, body = (await asyncio.wait_for(answer, 5)).partition(b"\r\n\r\n")
    writer.close()
    return f"{head.split()[1].decode()} {json.loads(body)['error']['code']}"


@asynccontextmanager
async def stalled(server: Server) -> AsyncIterator[None]:
    """Asks for a stream of images, and reads no more than that it begins."""
    body = json.dumps({"prompt": "cat", "stream": True, "partial_images": 3, "size": "96x96", "n": 2})
    reader, writer = await connect(server, len(body))
    writer.write(body.encode())
    try:
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        yield
    finally:
        writer.transport.abort()


async def leave(server: Server) -> None:
    """Asks for something long and goes."""
    async with httpx.AsyncClient(base_url=server.url, headers=HEADERS) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(GENERATIONS, json={"prompt": "cat", **ENDLESS}, timeout=0.3)


async def test_a_full_disk_is_said_and_the_server_lives_on(sturdy: Server, disk: Disk, seen: Seen) -> None:
    link = {**SHORT, "size": "512x512", "response_format": "url"}
    files, data = {"image": bytes(4 << 20)}, {"prompt": "cat"}
    async with (
        nothing_is_left_of_it(sturdy, disk),
        httpx.AsyncClient(base_url=sturdy.url, headers=HEADERS, timeout=60) as client,
    ):
        with disk.full():
            refused = [
                await client.post(GENERATIONS, json=link),
                await client.post("/v1/images/edits", files=files, data=data),
            ]
            image = await client.post(GENERATIONS, json=SHORT)
        began = time.monotonic()
        again = await client.post(GENERATIONS, json=link)
        back = time.monotonic() - began
        assert (await client.get(again.json()["data"][0]["url"])).status_code == 200
    assert [answer.status_code for answer in refused] == [507, 507]
    assert {answer.json()["error"]["code"] for answer in refused} == {"insufficient_storage"}
    assert image.status_code == 200
    assert len(list((disk.folder / "links").iterdir())) == 1, "half an image is left"
    seen("the disk is full", "links and uploads: 507; other requests: images", f"{back:.1f} s, once there is room")


def test_an_export_to_a_full_disk_says_so_and_leaves_nothing(checkpoint: Path, disk: Disk, seen: Seen) -> None:
    before = sorted(disk.folder.iterdir())
    command = [*(HYPERGEN, "export", str(checkpoint), "--engine", "openvino"), "--output", str(disk.folder / "new")]
    with disk.full():
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode
    (line,) = [line for line in ended.stderr.splitlines() if "error" in line.lower() or "free" in line]
    assert sorted(disk.folder.iterdir()) == before
    seen("the disk is full at an export", f"one line, nothing left: “{line.rpartition(': ')[2]}”", "–")


async def test_a_killed_gateway_takes_no_request_of_another_with_it(sturdy: Server, disk: Disk, seen: Seen) -> None:
    async with nothing_is_left_of_it(sturdy, disk):
        victim, other = (start_server("--triton-url", sturdy.triton_url, model="") for _ in range(2))
        try:
            killed = await begun(victim, 4, triton=sturdy, work=ENDLESS)
            living = await begun(other, 8, triton=sturdy)
            victim.process.kill()
            outcomes = Counter(await asyncio.gather(*(outcome_of(request) for request in living)))
            broken = await asyncio.gather(*killed, return_exceptions=True)
        finally:
            victim.process.kill()
            assert stop_server(other) == 0
        await asyncio.to_thread(sturdy.wait_until, lambda: active_images(sturdy) == 0, 10, "idle")
    assert outcomes == {"image": 8}
    assert all(isinstance(error, openai.APIConnectionError) for error in broken)
    seen("kill -9 of one of two gateways of a Triton", f"8 requests of the other: {told(outcomes)}", "–")


def active_images(server: Server) -> float:
    return samples_of(httpx.get(server.metrics_url, timeout=10).text, "hypergen_sampler_")["active_images"]


def run_folders(place: Path) -> set[str]:
    """The processes whose Tritons have a folder there."""
    return {entry.name.split("-")[2] for entry in place.glob("hypergen-triton-*")}


async def test_a_start_after_a_killed_gateway_clears_up_even_a_triton_that_hangs(
    exported: Path, tmp_path: Path, seen: Seen
) -> None:
    place = {"TMPDIR": str(tmp_path)}
    first = start_server("--cache-dir", str(tmp_path / "cache"), model=str(exported), environment=place)
    family = psutil.Process(first.process.pid).children(recursive=True)
    requests = await begun(first, 8, work=ENDLESS)
    processes(first, "tritonserver")[0].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    first.process.kill()
    first.process.wait(10)
    ended = await asyncio.gather(*requests, return_exceptions=True)
    second = start_server("--cache-dir", str(tmp_path / "cache"), model=str(exported), environment=place)
    try:
        back = await seconds_until_it_generates(second, began)
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert not shared_memory(first)
        assert run_folders(tmp_path) == {str(second.process.pid)}
    finally:
        assert stop_server(second) == 0
    assert all(isinstance(error, openai.APIConnectionError) for error in ended)
    assert back < limit_of(first)
    seen("kill -9 of the gateway, while Triton hangs", "the next start clears up after it", f"{back:.1f} s, with that")


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        pytest.skip("the clock cannot be set for one server alone: apt-get install faketime")
    return Clock(found[0], tmp_path / "clock")


@dataclass(frozen=True)
class Clock:
    """The time of day as a server sees it; what measures durations goes on undisturbed, as it does on Linux."""

    library: Path
    file: Path

    def set(self, offset: str) -> None:
        self.file.write_text(offset)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


async def test_the_clock_may_jump_while_images_are_generated(sturdy: Server, clock: Clock, seen: Seen) -> None:
    """The gateway's clock: Triton itself does not run reliably under the library, even if its clock never jumps."""
    clock.set("+0")
    server = start_server("--triton-url", sturdy.triton_url, model="", environment=clock.environment)
    try:
        outcomes = Counter[str]()
        for offset in ("+3600", "-7200"):
            requests = await begun(server, 4, sturdy)
            clock.set(offset)
            async with server.async_client() as client:
                created = (await client.images.generate(prompt="cat", extra_body={"num_inference_steps": 1})).created
            assert abs(created - time.time() - int(offset)) < 60, "the server does not see the clock jump"
            outcomes += Counter(await asyncio.gather(*(outcome_of(request) for request in requests)))
    finally:
        assert stop_server(server) == 0
    assert outcomes == {"image": 8}
    seen("the gateway's clock jumps an hour ahead, then three back", f"8 requests under way: {told(outcomes)}", "–")
