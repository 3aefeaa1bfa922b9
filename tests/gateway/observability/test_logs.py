"""What a running `hypergen serve` writes: text for people, JSON lines for machines."""

from __future__ import annotations

import json
import logging
import socket
from dataclasses import dataclass

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.http.middleware import RequestRecord
from hypergen_gateway.http.request_id import current_request_id
from hypergen_gateway.observability.logs import JsonLines
from support.fake_backend import FakeBackend, in_memory
from support.running_server import KEY, Server, free_port, start_server, stop_server

NOBODY = "127.0.0.1:1"  # a Triton that is not there


def start(*arguments: str) -> Server:
    return start_server("--triton-url", NOBODY, *arguments, model="", ready=False)


def say_garbage(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"this is not HTTP\r\n\r\n")
        connection.recv(1024)


def test_json_logs_have_one_object_per_line_none_about_malformed_data_and_none_with_the_key() -> None:
    server = start("--log-format", "json")
    headers = {"Authorization": f"Bearer {KEY}", "x-request-id": "mine-1"}
    refused = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a"}, headers=headers)
    assert refused.status_code == 503
    say_garbage(server.port)
    assert stop_server(server) == 0
    lines = [json.loads(line) for line in server.lines]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    (access,) = [line for line in lines if line["logger"] == "hypergen_gateway.access" and line["status"] == 503]
    assert access["request_id"] == "mine-1"
    assert (access["method"], access["route"], access["level"]) == ("POST", "/v1/images/generations", "info")
    assert isinstance(access["ms"], int)
    assert not [line for line in lines if line["logger"].startswith("uvicorn")]
    assert any(line["message"].startswith("Serving on") for line in lines)
    assert not any(KEY in line for line in server.lines)


def test_as_text_the_same_is_for_people() -> None:
    server = start()
    httpx.get(f"{server.url}/docs", headers={"x-request-id": "mine-1"})
    assert stop_server(server) == 0
    assert any(line.endswith(" ms mine-1") and "GET /docs 200" in line for line in server.lines)
    assert any(line.startswith("Serving on") for line in server.lines)
    assert len({line for line in server.lines if line.startswith("Serving on")}) == 1


async def test_a_probe_is_logged_when_its_answer_changes(caplog: pytest.LogCaptureFixture) -> None:
    """While a model is exported, an orchestrator's probes would fill the terminal."""
    backend = FakeBackend()
    caplog.set_level(logging.INFO, "hypergen_gateway.access")
    async with in_memory(create_app(Config(), backend)) as client:
        for is_ready in (False, False, True, True, True, False):
            backend.is_ready = is_ready
            await client.get("/health/ready")
            await client.get("/health/live")
            await client.get("/docs")
    answers = [(each.msg.route, each.msg.status) for each in caplog.records if isinstance(each.msg, RequestRecord)]
    assert [status for route, status in answers if route == "/health/ready"] == [503, 200, 503]
    assert [status for route, status in answers if route == "/health/live"] == [200]
    assert [status for route, status in answers if route == "/docs"] == [200] * 6


@dataclass
class Said:
    """A message with fields."""

    text: str
    images: object

    def __str__(self) -> str:
        return self.text

    def fields(self) -> dict[str, object]:
        return {"images": self.images}


def record(message: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("a.logger", logging.ERROR, __file__, 1, message, None, None)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_a_line_has_its_request_s_id_its_fields_and_its_traceback() -> None:
    token = current_request_id.set("mine-2")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        text = JsonLines().format(record(Said('"quoted"', 2), exc_info=(ValueError, error, None)))
    finally:
        current_request_id.reset(token)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["images"], line["request_id"]) == ('"quoted"', 2, "mine-2")
    assert line["exception"].endswith("ValueError: two\nlines")


def test_what_is_no_json_by_itself_is_written_as_text() -> None:
    line = json.loads(JsonLines().format(record(Said("a", {free_port}))))
    assert "free_port" in line["images"]
    assert "request_id" not in line


def test_time_is_in_utc_and_sortable() -> None:
    made = record("a", created=0.25)
    assert json.loads(JsonLines().format(made))["time"] == "1970-01-01T00:00:00.250+00:00"


@pytest.mark.parametrize("value", ["yaml", ""])
def test_another_format_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(AssertionError, match=r"--log-format.*(is not one of 'text', 'json'|must not be empty)"):
        start("--log-format", value)
