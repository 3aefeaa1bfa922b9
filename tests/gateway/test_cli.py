"""The options: what each may hold, as a word and as an environment variable, and the one line about anything else."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.cli import main
from hypergen_gateway.concurrency import cancel
from hypergen_gateway.config import Config
from hypergen_gateway.embedded.export_cache import default_cache_dir
from hypergen_gateway.generation.backend import GeneratedImage, GenerationRequest
from hypergen_gateway.serving import ClipSkipError, ServeOptions, TritonOptions
from hypergen_gateway.serving import serve as run_server
from support.fake_backend import FakeBackend, flat_image
from support.fake_triton import FakeTriton, serving
from support.running_server import HYPERGEN, Server, free_port, start_server, stop_server

KEY = "s3cr3t-from-a-file"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "api_key"
    file.write_text(f"{KEY}\n")
    return file


@pytest.fixture
def secured(key_file: Path) -> Iterator[Server]:
    """A gateway before a Triton that is not there: enough to see who is let in."""
    options = ["--triton-url", f"127.0.0.1:{free_port()}", "--api-key-file", str(key_file)]
    running = start_server(*options, model="", key=None, ready=False)
    yield running
    assert stop_server(running) == 0


# An address for documentation, which no machine has: where something is wrongly accepted, no server starts.
NOWHERE = "192.0.2.1"


def serve(*options: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["serve", *options], env={"HYPERGEN_HOST": NOWHERE, **environment})


def generate(*options: str, **environment: str) -> Result:
    """Asks a Triton that is not there."""
    return CliRunner().invoke(main, ["generate", "cat", "--triton-url", "127.0.0.1:1", *options], env=environment)


def refusal(result: Result) -> str:
    """The one line that says what is wrong."""
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


def test_the_key_in_the_file_is_the_one_that_opens_and_is_never_shown(secured: Server) -> None:
    def answer(key: str) -> int:
        return httpx.get(f"{secured.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    assert (answer(KEY), answer("another")) == (503, 401)
    assert KEY not in "\n".join(secured.lines)


@pytest.mark.parametrize("word", [b"a \xff cat", b"\xed\xa0\xbd"])
def test_text_in_another_encoding_is_one_line(word: bytes) -> None:
    text = os.fsdecode(word)
    for words in (["generate", text], ["serve", text], ["serve", "--api-key", text], ["conformance", text]):
        assert "is not valid utf-8" in refusal(CliRunner().invoke(main, words))
    assert "HYPERGEN_LINK_SECRET" in refusal(serve(HYPERGEN_LINK_SECRET=text))


def test_an_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([HYPERGEN, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: standard output: No space left on device\n"


def test_a_file_of_keys_may_be_a_pipe_and_begin_with_a_byte_order_mark(backend: FakeBackend) -> None:
    reading, writing = os.pipe()
    os.write(writing, f"\ufeffalice: {KEY}\n".encode())
    os.close(writing)
    config = Config(api_key_file=Path(f"/dev/fd/{reading}"))
    for _ in range(2):  # the options are checked before the application is made
        create_app(config, backend)
        found = config.keys.find(KEY.encode())
        assert found is not None
        assert found.name == "alice"
    os.close(reading)


def test_a_key_and_a_file_exclude_each_other(key_file: Path) -> None:
    assert "--api-key-file" in refusal(serve("--api-key", "k", "--api-key-file", str(key_file)))
    assert "--api-key-file" in refusal(serve("--api-key", "k", HYPERGEN_API_KEY_FILE=str(key_file)))


def test_a_key_may_be_given_several_times_and_none_of_them_empty() -> None:
    assert "empty" in refusal(serve("--api-key", "one", "--api-key", " "))
    assert "empty" in refusal(serve(HYPERGEN_API_KEY=" "))


@pytest.mark.parametrize("name", ["API_KEY", "API_KEY_FILE", "LINK_SECRET"])
def test_a_secret_whose_variable_is_set_but_empty_is_refused_rather_than_taken_for_none(name: str) -> None:
    line = refusal(serve(**{f"HYPERGEN_{name}": ""}))
    assert f"HYPERGEN_{name}" in line
    assert "set but empty" in line


def test_a_client_s_key_whose_variable_is_set_but_empty_is_refused_too() -> None:
    result = CliRunner().invoke(main, ["conformance", "http://127.0.0.1:1"], env={"HYPERGEN_API_KEY": ""})
    assert "set but empty" in refusal(result)


@pytest.mark.parametrize("key", ["a\x00b", "a\nb", "a\x7fb", "ключ"])
def test_a_key_that_no_client_could_send_is_refused_and_not_shown(key: str, key_file: Path) -> None:
    for line in (
        refusal(serve("--api-key", key)),
        refusal(CliRunner().invoke(main, ["conformance", "http://127.0.0.1:1", "--api-key", key])),
    ):
        assert "API key" in line
        assert key not in line
    key_file.write_text(f"alice: {key.split()[0]} {key.split()[-1]}\n" if "\n" in key else f"alice: {key}\n")
    assert key not in refusal(serve("--api-key-file", str(key_file)))


def values_of(command: str) -> list[str]:
    """The options of a command that take a value, and its arguments."""
    context = click.Context(main)
    found = main.get_command(context, command)
    assert found is not None
    taking = [each for each in found.params if not (isinstance(each, click.Option) and each.is_flag)]
    return [each.opts[-1] for each in taking]


@pytest.mark.parametrize("command", ["serve", "generate", "export", "conformance"])
def test_a_value_that_is_given_and_empty_is_refused(command: str) -> None:
    # An empty negative prompt is one that says nothing; sizes to export are read, and refused, as a list.
    others = {"generate": ["--negative-prompt"], "export": ["--sizes"]}.get(command, [])
    options = [each for each in values_of(command) if each.startswith("--") and each not in others]
    arguments = ["x" for each in values_of(command) if not each.startswith("-")]
    needed = ["--output", "x"] if command == "export" else []
    for option in options:
        assert option in refusal(CliRunner().invoke(main, [command, *arguments, *needed, option, ""]))
    assert "empty" in refusal(CliRunner().invoke(main, [command, *needed, ""]))


def test_what_compose_writes_for_a_variable_that_is_not_set_is_as_if_it_were_not_there() -> None:
    secrets = {"--api-key", "--api-key-file", "--link-secret"}
    names = [each.lstrip("-").upper().replace("-", "_") for each in values_of("serve") if each not in secrets]
    empty = dict.fromkeys([f"HYPERGEN_{name}" for name in [*names, "DEEP_CACHE", "METRICS_NEED_KEY", "RELOAD"]], "")
    result = serve("--host", NOWHERE, **empty)
    assert result.exit_code == 1
    assert f"Cannot listen on {NOWHERE}:8000" in result.output


def test_a_folder_that_no_lora_can_be_added_to_is_refused(
    key_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["--api-key-file", str(key_file), "--lora-dir", str(tmp_path)]
    # The root user may write anywhere.
    monkeypatch.setattr("os.access", lambda folder, mode: Path(folder) != tmp_path or not mode & os.W_OK)
    line = refusal(serve(*keys, "--lora-admin", "anna"))
    assert line == f"Error: --lora-admin: files cannot be added to {tmp_path} (Permission denied)."
    assert f"Cannot listen on {NOWHERE}" in serve(*keys).output


@pytest.mark.parametrize("address", ["tcp://10.96.0.1:8000", "udp://10.96.0.1:53"])
def test_the_address_of_a_service_in_kubernetes_is_no_port(address: str) -> None:
    result = serve("--host", NOWHERE, HYPERGEN_PORT=address)
    assert f"Cannot listen on {NOWHERE}:8000" in result.output


SECONDS = ["--request-timeout", "--body-timeout", "--keep-alive", "--retry-grace", "--link-lifetime"]
NUMBERS = [*SECONDS, "--max-queue-size", "--max-batch-size", "--port"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1", "1e12", "9" * 400, "9" * 5000, "1_0x", "ten"])
@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_that_no_clock_or_counter_holds_is_refused(option: str, value: str) -> None:
    assert option in refusal(serve(f"{option}={value}"))
    assert option in refusal(serve(**{f"HYPERGEN_{option.lstrip('-').upper().replace('-', '_')}": value}))


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-1", "1e12"])
def test_a_number_of_the_other_commands_is_held_to_its_range_too(value: str) -> None:
    for option in ("--timeout", "--burst"):
        assert option in refusal(CliRunner().invoke(main, ["conformance", "http://127.0.0.1:1", f"{option}={value}"]))
    for option in ("--steps", "--guidance-scale", "--seed", "--max-batch-size"):
        assert option in refusal(generate(f"{option}={value}"))


@pytest.mark.parametrize(
    "size", ["64", "64x", "x64", "64x64x64", "-64x64", "0x64", "9" * 12 + "x64", "64 x 64", "64X6e1"]
)
def test_a_size_that_is_none_is_refused(size: str) -> None:
    assert "--size" in refusal(generate("--size", size))


def test_a_file_that_is_missing_or_may_not_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    line = refusal(serve("--api-key-file", str(tmp_path / "nowhere")))
    assert f"{tmp_path}/nowhere: No such file or directory" in line
    assert f"{tmp_path}: Is a directory" in refusal(serve("--api-key-file", str(tmp_path)))


@pytest.mark.parametrize(("content", "says"), [(b"", "no key"), (b" \n", "no key"), (b"two words\n", "line 1 must be")])
def test_a_file_that_does_not_hold_keys_is_refused(key_file: Path, content: bytes, says: str) -> None:
    key_file.write_bytes(content)
    line = refusal(serve("--api-key-file", str(key_file)))
    assert says in line
    assert "two" not in line


def test_a_file_that_is_not_text_is_refused(key_file: Path) -> None:
    key_file.write_bytes(b"\xff\xfe")
    assert "not text" in refusal(serve("--api-key-file", str(key_file)))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--public-url", "images.example.com", "https://images.example.com"),
        ("--link-secret", "short", "16 characters"),
        ("--link-bucket", "images", "s3://BUCKET"),
        ("--link-lifetime", "0", "--link-lifetime"),
        ("--cors-origin", "app.example.com", "https://app.example.com"),
    ],
)
def test_addresses_that_could_not_work_are_refused(option: str, value: str, says: str) -> None:
    assert says in refusal(serve(option, value))
    assert says in refusal(serve(**{f"HYPERGEN_{option.lstrip('-').upper().replace('-', '_')}": value}))


def test_a_bucket_without_boto3_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'hypergen-triton[s3]'" in refusal(serve("--link-bucket", "s3://images"))


def test_loras_belong_to_an_export(tmp_path: Path) -> None:
    line = refusal(serve("--triton-url", "127.0.0.1:1", "--lora", "ink=ink.safetensors"))
    assert "pass --lora to 'hypergen export'" in line
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "config.pbtxt").touch()
    result = serve(
        str(tmp_path), "--host=127.0.0.1", f"--port={free_port()}", HYPERGEN_LORA="ink=a.safetensors clay=b.safetensors"
    )
    assert result.exit_code == 1
    assert f"{tmp_path} is exported already: pass --lora to 'hypergen export'" in result.output
    (tmp_path / "unet" / "1").mkdir(parents=True)
    (tmp_path / "unet" / "1" / "lora_pool.safetensors").touch()
    given = (str(tmp_path), "--host=127.0.0.1", f"--port={free_port()}", "--lora-dir", str(tmp_path))
    assert "is exported already: pass --lora-rank to 'hypergen export'" in serve(*given, "--lora-rank=8").output


def test_one_image_has_no_use_for_a_folder_of_loras(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["generate", "a fox", "--lora-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "No such option" in result.output


@pytest.mark.parametrize("option", ["--embedding=toy=toy.pt", "--embedding-dir=toys"])
def test_textual_inversions_belong_to_an_export(option: str, tmp_path: Path) -> None:
    name = option[: option.index("=")]
    assert f"pass {name} to 'hypergen export'" in refusal(serve("--triton-url", "127.0.0.1:1", option))
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "config.pbtxt").touch()
    result = serve(str(tmp_path), "--host=127.0.0.1", f"--port={free_port()}", option)
    assert f"{tmp_path} is exported already: pass --embedding to 'hypergen export'" in result.output


def test_what_is_exported_without_a_shallow_unet_gets_none(tmp_path: Path) -> None:
    assert "pass --deep-cache to 'hypergen export'" in refusal(serve("--triton-url", "127.0.0.1:8001", "--deep-cache"))
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "config.pbtxt").touch()
    result = serve("--deep-cache", str(tmp_path), "--host=127.0.0.1", f"--port={free_port()}")
    assert result.exit_code == 1
    assert f"{tmp_path} has no shallow UNet: pass --deep-cache to 'hypergen export'" in result.output


@pytest.mark.parametrize("address", ["http://127.0.0.1:8001", "triton", "::1:8001"])
def test_an_address_of_triton_that_grpc_would_misread_is_refused(address: str) -> None:
    for line in (refusal(serve("--triton-url", address)), refusal(serve(HYPERGEN_TRITON_URL=address))):
        assert "--triton-url must be HOST:PORT" in line
        assert repr(address) in line


def test_the_start_says_why_no_model_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=_answer_as_http, args=(silent,), daemon=True).start()
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        server = start_server("--triton-url", url, model="", key=None, ready=False)
        (line,) = [line for line in server.lines if line.startswith("No model is available")]
        assert stop_server(server) == 0
    assert line.startswith(f"No model is available at {url} yet (")
    assert "HTTP/2" in line


def _answer_as_http(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


class TestHomes:
    """Users who have none, and folders that are none."""

    @pytest.fixture(autouse=True)
    def nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HOME", "XDG_CACHE_HOME", "HYPERGEN_CACHE_DIR"):
            monkeypatch.delenv(name, raising=False)
        # What Python finds of a uid that /etc/passwd does not know.
        monkeypatch.setattr(Path, "home", self._no_home)

    @staticmethod
    def _no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def test_a_user_without_one_is_told_of_cache_dir(self) -> None:
        assert "--cache-dir" in refusal(serve())
        assert "--cache-dir" in refusal(CliRunner().invoke(main, ["generate", "cat"]))

    def test_a_command_that_needs_none_does_not_ask_for_one(self) -> None:
        result = serve("--triton-url", "127.0.0.1:1")
        assert f"Cannot listen on {NOWHERE}" in result.output
        assert "No model is available" in generate().output

    def test_whose_cache_is_given_has_a_home_there(self, tmp_path: Path) -> None:
        assert f"Cannot listen on {NOWHERE}" in serve("--cache-dir", str(tmp_path)).output
        assert os.environ["HOME"] == str(tmp_path)

    def test_a_relative_cache_of_xdg_is_ignored(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
        assert default_cache_dir() is None
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_cache_dir() == tmp_path / "hypergen"


@pytest.mark.parametrize("place", ["file/below", "dangling", "/proc/none", "/dev/full"])
def test_a_cache_that_cannot_be_written_is_named_with_its_option(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nothing")
    result = serve("--cache-dir", str(tmp_path / place))
    assert "--cache-dir" in refusal(result)
    assert str(tmp_path / place) in result.output


def test_what_is_exported_has_its_own_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("exported/diffusion", "checkpoint"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "exported" / "diffusion" / "config.pbtxt").touch()
    served: list[ServeOptions] = []

    async def note(options: ServeOptions) -> None:
        served.append(options)

    monkeypatch.setattr("hypergen_gateway.cli.serve", note)
    monkeypatch.chdir(tmp_path)
    for options in (["./exported"], ["./checkpoint"], ["a/b"], [], ["--triton-url=a:1"], ["--triton-url=a:1", "a/b"]):
        assert serve(*options, HYPERGEN_CACHE_DIR=str(tmp_path)).exit_code == 0
    ids = [options.gateway.model_id for options in served]
    assert ids == [None, "./checkpoint", "a/b", "hypergen/emoji", None, "a/b"]


class TestOutput:
    """The file of `generate`, which is looked at before anything is generated."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[TritonOptions]:
        """The options of each call; each generates the same image."""
        calls: list[TritonOptions] = []

        async def generate(options: TritonOptions, fields: dict[str, Any]) -> GeneratedImage:
            calls.append(options)
            made = GenerationRequest(
                prompt="cat",
                width=16,
                height=8,
                seed=fields["seed"],
                num_inference_steps=1,
                guidance_scale=1.0,
            )
            return flat_image(made, 0)

        monkeypatch.setattr("hypergen_gateway.cli.generate_image", generate)
        return calls

    @pytest.mark.parametrize(
        ("name", "kind"), [("x.png", "PNG"), ("x", "PNG"), ("x.JPG", "JPEG"), ("x.jpeg", "JPEG"), ("a.b.webp", "WEBP")]
    )
    def test_its_name_says_the_kind(self, calls: list[TritonOptions], name: str, kind: str, tmp_path: Path) -> None:
        file = tmp_path / name
        file.write_bytes(b"x" * 100_000)  # longer than what replaces it
        result = generate("-o", str(file), "--seed", "7")
        assert result.output == f"{file}: 16x8, seed 7\n"
        with Image.open(file) as image:
            assert (image.format, image.size) == (kind, (16, 8))
        assert file.stat().st_size < 10_000
        assert len(calls) == 1

    def test_a_dash_is_standard_output(self, calls: list[TritonOptions]) -> None:
        result = generate("-o", "-", "--seed", "7")
        with Image.open(io.BytesIO(result.stdout_bytes)) as image:
            assert (image.format, image.size) == ("PNG", (16, 8))
        assert result.stderr == "-: 16x8, seed 7\n"
        assert not Path("-").exists()
        assert calls

    @pytest.mark.parametrize("name", ["x.gif", "x.txt", ".", "file/x.png", "nowhere/x.png", "/proc/none.png"])
    def test_one_that_cannot_be_written_is_refused_before_anything_is_native(
        self, calls: list[TritonOptions], name: str, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        result = generate("-o", str(tmp_path / name))
        assert result.exit_code in (1, 2)
        assert "--output" in result.output
        assert isinstance(result.exception, SystemExit)
        assert not calls

    def test_a_full_disk_is_one_line(self, calls: list[TritonOptions]) -> None:
        result = generate("-o", "/dev/full")
        assert result.exit_code == 1
        assert result.output == "Error: --output: /dev/full: No space left on device\n"
        assert calls

    def test_a_failure_leaves_what_was_there(self, tmp_path: Path) -> None:
        file = tmp_path / "x.png"
        assert generate("-o", str(file)).exit_code == 1
        assert not file.exists()
        file.write_bytes(b"an image")
        assert generate("-o", str(file)).exit_code == 1
        assert file.read_bytes() == b"an image"


@pytest.mark.parametrize("how", ["none", "file", "named", "variable"])
async def test_the_command_that_is_printed_saves_an_image(how: str, tmp_path: Path) -> None:
    file = tmp_path / "a key's file"
    file.write_text("\n  # for everybody\n\n alice:   sk-1\nsk-2\n" if how == "named" else "sk-1\n")
    options = {"none": [], "variable": ["--api-key", "sk-1"]}.get(how, ["--api-key-file", str(file)])
    async with serving(FakeTriton()) as url:
        server = await asyncio.to_thread(start_server, "--triton-url", url, *options, model="", key=None)
        try:
            said = "\n".join(server.lines)
            command = re.search(r"^  curl .*?> image.png$", said, re.DOTALL | re.MULTILINE)
            assert command is not None, said
            assert "sk-1" not in said
            environment = {"HYPERGEN_API_KEY": "sk-1"} if how == "variable" else {}
            done = await asyncio.to_thread(run_shell, command[0], tmp_path, environment)
            assert (done.returncode, done.stderr) == (0, "")
            with Image.open(tmp_path / "image.png") as image:
                assert (image.format, image.size) == ("PNG", (64, 48))  # the fake model's own size
            if how == "variable":  # what is missing or wrong is said, and not by a traceback
                unset = await asyncio.to_thread(run_shell, command[0], tmp_path, {})
                assert "set it to the API key" in unset.stderr
                assert "Traceback" not in unset.stderr
                wrong = await asyncio.to_thread(run_shell, command[0], tmp_path, {"HYPERGEN_API_KEY": "sk-3"})
                assert wrong.stderr == "Incorrect API key.\n"
        finally:
            assert await asyncio.to_thread(stop_server, server) == 0


async def test_more_skipped_layers_than_the_model_has_are_refused_at_start() -> None:
    async with serving(FakeTriton()) as url:
        triton = TritonOptions(model="", url=url, export=None)
        options = ServeOptions(host="127.0.0.1", port=free_port(), triton=triton, gateway=Config(clip_skip=12))
        accepted = asyncio.create_task(run_server(options))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{options.port}") as client:
            await asyncio.wait_for(_until_a_model_is_listed(client), 30)
        await cancel(accepted)
        with pytest.raises(ClipSkipError, match=r"^--clip-skip: must be from 0 to 12 for this model, not 13"):
            await run_server(replace(options, gateway=Config(clip_skip=13)))


async def _until_a_model_is_listed(client: httpx.AsyncClient) -> None:
    while True:
        with suppress(httpx.TransportError):
            if (await client.get("/v1/models")).status_code == 200:
                return
        await asyncio.sleep(0.05)


def run_shell(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_reloading_server_keeps_its_log_s_level_and_format() -> None:
    options = ["--triton-url", "127.0.0.1:1", "--reload", "--log-level", "warning", "--log-format", "json"]
    server = start_server(*options, model="", key=None, ready=False)
    httpx.get(f"{server.url}/health/live")
    stop_server(server)
    lines = [json.loads(line) for line in server.lines]
    assert any(line["message"].startswith("Serving on") for line in lines)
    assert not [line for line in lines if line["logger"] == "hypergen_gateway.access"]  # those are of level info


def test_a_reloading_server_runs_no_module_of_the_current_folder_but_finds_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, trapped = tmp_path / "checkpoint", tmp_path / "trapped"
    checkpoint.mkdir()
    for module in ("multiprocessing", "pickle", "json", "runpy", "uvicorn", "hypergen_gateway"):
        (checkpoint / f"{module}.py").write_text(f"open({str(trapped)!r}, 'a').write('{module} ')")
    (checkpoint / "keys").write_text(KEY)
    monkeypatch.chdir(checkpoint)
    options = ["--triton-url", "127.0.0.1:1", "--reload", "--api-key-file", "keys"]
    server = start_server(*options, model="", key=None, ready=False)
    try:
        answers = [
            httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}) for key in (KEY, "x")
        ]
    finally:
        stop_server(server)
    assert [answer.status_code for answer in answers] == [503, 401]
    assert not trapped.exists()


@pytest.mark.parametrize("package", ["hypergen_gateway", "hypergen_export"])
def test_a_package_that_is_run_imports_nothing_else_from_the_current_folder(package: str, tmp_path: Path) -> None:
    trapped = tmp_path / "trapped"
    for module in ("click", "logging", "json", "asyncio", "pathlib", "uvicorn", "numpy", "torch"):
        (tmp_path / f"{module}.py").write_text(f"open({str(trapped)!r}, 'a').write('{module} ')")
    command = [sys.executable, "-m", package, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not trapped.exists(), trapped.read_text()
    assert done.returncode == 0, done.stderr


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hypergen_gateway", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("python -m hypergen_gateway, version ") or done.stdout.startswith(
        "hypergen, version "
    )
