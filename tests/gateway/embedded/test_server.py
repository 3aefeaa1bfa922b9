"""Triton's log and start-up failures, on the real tritonserver with repositories that cannot be loaded."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path

import psutil
import pytest

from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.server import answers, log_level_of, trace_options
from hypergen_gateway.embedded.supervisor import embedded_triton

BROKEN_MODEL = """
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("this model is broken on purpose")
    def execute(self, requests):
        return []
"""


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ('I1123 11:55:42.123456 42 server.cc:1] "started"', logging.DEBUG),
        ('W1123 11:55:42.123456 42 server.cc:1] "careful"', logging.WARNING),
        ('E1123 11:55:42.123456 42 server.cc:1] "failed to load"', logging.ERROR),
        ('E1123 11:55:42.123456 42 server.cc:241] "CudaDriverHelper has not been initialized."', logging.DEBUG),
        (
            "E1123 11:55:42.123456 42 ev_epoll1_linux.cc:373] (event_engine) Epoll1Poller:0x55 encountered epoll_wait "
            "error: Bad file descriptor",
            logging.DEBUG,
        ),
        ("Every other word of a model", logging.DEBUG),
        ("E", logging.DEBUG),
    ],
)
def test_a_line_keeps_the_weight_that_triton_gave_it(line: str, level: int) -> None:
    assert log_level_of(line) == level


async def start(repository: Path) -> None:
    async with embedded_triton(repository, start_timeout=60):
        raise AssertionError("it became ready")


async def test_a_model_that_cannot_load_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    version = tmp_path / "broken" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(BROKEN_MODEL)
    (tmp_path / "broken" / "config.pbtxt").write_text('name: "broken"\nbackend: "python"\n')
    with pytest.raises(EmbeddedError, match="this model is broken on purpose") as raised:
        await start(tmp_path)
    assert "\n" not in str(raised.value)


async def test_a_missing_repository_ends_the_start_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="at start"):
        await start(tmp_path / "nowhere")


def test_a_failed_start_leaves_no_process_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A temporary folder of its own: tests in other processes start servers, too.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(EmbeddedError):
        asyncio.run(start(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []
    assert not [child for child in psutil.Process().children() if child.name() == "tritonserver"]


def test_triton_traces_where_the_gateway_does_and_nowhere_else() -> None:
    assert trace_options({}) == []
    expected = ["mode=opentelemetry", "rate=1", "level=TIMESTAMPS", "opentelemetry,url=http://collector:4318/v1/traces"]
    for environment in (
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"},
    ):
        options = [option.removeprefix("--trace-config=") for option in trace_options(environment)]
        assert options == [*expected, "opentelemetry,resource=service.name=hypergen-triton"]


@pytest.mark.parametrize("turns", range(4))
async def test_probing_ends_though_an_answer_arrives_while_it_is_cancelled(turns: int) -> None:
    """`turns` of the event loop after an answer: whatever of it has been noticed by then."""
    pending: list[asyncio.Future[bool]] = []

    async def call(*, client_timeout: float) -> bool:  # noqa: ARG001
        pending.append(asyncio.get_running_loop().create_future())
        return await pending[-1]

    async def probe() -> None:
        while True:
            await answers(call, 60)

    probing = asyncio.create_task(probe())
    while not pending:
        await asyncio.sleep(0)
    pending[0].set_result(True)
    for _ in range(turns):
        await asyncio.sleep(0)
    probing.cancel()
    await asyncio.wait([probing], timeout=5)
    was_cancelled = probing.cancelled()
    probing.cancel()
    assert was_cancelled
