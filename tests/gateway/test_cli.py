"""The command's key from a file, as a container mounts a secret, and its links: what may be wrong with either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from hypergen_gateway.cli import main
from running_server import Server, free_port, start_server, stop_server

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


def serve(*options: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["serve", *options], env=environment)


def refusal(result: Result) -> str:
    """The one line that says what is wrong."""
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


def test_the_key_in_the_file_is_the_one_that_opens_and_is_never_shown(secured: Server) -> None:
    def answer(key: str) -> int:
        return httpx.get(f"{secured.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    assert (answer(KEY), answer("another")) == (503, 401)
    assert KEY not in "\n".join(secured.lines)


def test_a_key_and_a_file_exclude_each_other(key_file: Path) -> None:
    assert "--api-key-file" in refusal(serve("--api-key", "k", "--api-key-file", str(key_file)))
    assert "--api-key-file" in refusal(serve("--api-key", "k", HYPERGEN_API_KEY_FILE=str(key_file)))


def test_a_key_may_be_given_several_times_and_none_of_them_empty() -> None:
    assert "empty" in refusal(serve("--api-key", "one", "--api-key", " "))
    assert "empty" in refusal(serve(HYPERGEN_API_KEY=" "))


def test_a_file_that_is_missing_or_may_not_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    line = refusal(serve("--api-key-file", str(tmp_path / "nowhere")))
    assert f"{tmp_path}/nowhere: No such file or directory" in line
    assert f"{tmp_path}: Is a directory" in refusal(serve("--api-key-file", str(tmp_path)))


@pytest.mark.parametrize(("content", "says"), [(b"", "no key"), (b" \n", "no key"), (b"two words\n", "line 1 is")])
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
        ("--link-bucket", "pictures", "s3://BUCKET"),
        ("--link-lifetime", "0", "--link-lifetime"),
        ("--cors-origin", "app.example.com", "https://app.example.com"),
    ],
)
def test_addresses_that_could_not_work_are_refused(option: str, value: str, says: str) -> None:
    assert says in refusal(serve(option, value))
    assert says in refusal(serve(**{f"HYPERGEN_{option.lstrip('-').upper().replace('-', '_')}": value}))


def test_a_bucket_without_boto3_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'hypergen-triton[s3]'" in refusal(serve("--link-bucket", "s3://pictures"))


def test_loras_belong_to_an_export(tmp_path: Path) -> None:
    line = refusal(serve("--triton-url", "127.0.0.1:1", "--lora", "ink=ink.safetensors"))
    assert "give --lora to 'hypergen export'" in line
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "config.pbtxt").touch()
    result = serve(str(tmp_path), "--port", str(free_port()), HYPERGEN_LORA="ink=a.safetensors clay=b.safetensors")
    assert result.exit_code == 1
    assert f"{tmp_path} is exported already: give --lora to 'hypergen export'" in result.output


def test_what_is_exported_without_a_shallow_unet_gets_none(tmp_path: Path) -> None:
    assert "give --deep-cache to 'hypergen export'" in refusal(serve("--triton-url", "127.0.0.1:8001", "--deep-cache"))
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "config.pbtxt").touch()
    result = serve("--deep-cache", str(tmp_path), "--port", str(free_port()))
    assert result.exit_code == 1
    assert f"{tmp_path} is exported already, without: give --deep-cache to 'hypergen export'" in result.output
