"""The command `hypergen`: its options, their environment variables, and one line for each thing that can go wrong.

Knows the words a user types. What they do is in `serving`; `export` is the exporter's own command, loaded when asked
for, so that the gateway works where torch is not installed.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from hypergen_gateway.config import Config
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.errors import HyperGenError
from hypergen_gateway.images import encode
from hypergen_gateway.keys import BadKeysError, Keys
from hypergen_gateway.logs import LogFormat, set_up_logging
from hypergen_gateway.repository import SHIPPED_MODEL, ExportFailedError, ExportOptions, default_cache_dir
from hypergen_gateway.serving import (
    PortUnavailableError,
    ServeOptions,
    TritonOptions,
    draw,
    run_until_signalled,
    serve,
)
from hypergen_gateway.sizes import LONGEST_SIDE

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


# Loaded when they are asked for: the exporter may not be installed, and serving needs no HTTP client.
_ELSEWHERE = {"export": "hypergen_export.cli", "conformance": "hypergen_gateway.conformance.command"}


class _Commands(click.Group):
    """Finds some commands in modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module(_ELSEWHERE[cmd_name]), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(version("hypergen-triton"), prog_name="hypergen")
def main() -> None:
    """Self-hosted, OpenAI-compatible image generation on NVIDIA Triton."""


def _option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that is an environment variable too: --api-key is HYPERGEN_API_KEY."""
    envvar = "HYPERGEN_" + names[0].lstrip("-").upper().replace("-", "_")
    return click.option(*names, envvar=envvar, show_envvar=True, **settings)


def _triton_options(command: Callable[..., None]) -> Any:
    """The options that say which Triton to use; they reach the command as one `TritonOptions`."""

    @_option("--triton-url", metavar="HOST:PORT", help="Use the Triton that listens there for gRPC, and start none.")
    @_option(
        "--dtype",
        type=click.Choice(list(DTYPES)),
        default="auto",
        help="Precision of the engines; auto: bfloat16 on a CPU that computes in it, else float32.",
    )
    @_option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the engines run.")
    @_option("--max-batch-size", type=click.IntRange(1, 128), default=8, help="Images that share one UNet call.")
    @_option(
        "--lora",
        metavar="[NAME=]PATH[:SCALE]",
        multiple=True,
        help="A LoRA (.safetensors, or its folder) that requests may ask for as lora_path=NAME; repeatable.",
    )
    @_option("--deep-cache", is_flag=True, help="Add a second, shallow UNet, for requests that say cache_interval.")
    @_option(
        "--cache-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=default_cache_dir,
        show_default="~/.cache/hypergen",
        help="Where exported models are kept.",
    )
    @_option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
    @_option("--log-format", type=click.Choice(["text", "json"]), default="text", help="json: one object per line.")
    @functools.wraps(command)
    def with_triton(*, model: str | None, log_level: str, log_format: LogFormat, **given: Any) -> None:
        set_up_logging(log_level, log_format)
        with _one_line_errors():
            command(triton=_read_triton_options(model, given), model=model, **given)

    return with_triton


def _read_triton_options(model: str | None, given: dict[str, Any]) -> TritonOptions:
    url, device, loras = given.pop("triton_url"), given.pop("device"), given.pop("lora")
    deep_cache = given.pop("deep_cache")
    dtype = DTYPES[given.pop("dtype")]
    if url is not None and loras:
        raise click.UsageError("--triton-url serves what is exported: give --lora to 'hypergen export'.")
    if url is not None and deep_cache:
        raise click.UsageError("--triton-url serves what is exported: give --deep-cache to 'hypergen export'.")
    if url is None and (device == "cuda" or dtype == "float16"):
        raise click.UsageError(
            "The embedded Triton runs on the CPU, in float32 or bfloat16; for a GPU, make TensorRT engines with "
            "'hypergen export --engine tensorrt', start Triton with them and name it with --triton-url."
        )
    export = ExportOptions(
        dtype=_cpu_dtype() if dtype == "auto" else dtype,
        max_batch_size=given.pop("max_batch_size"),
        cache_dir=given.pop("cache_dir"),
        loras=loras,
        deep_cache=deep_cache,
    )
    return TritonOptions(model=model or SHIPPED_MODEL, url=url, export=export)


def _cpu_dtype() -> str:
    """bfloat16 where the CPU multiplies it in hardware, else float32."""
    flags = Path("/proc/cpuinfo")
    has_bf16 = flags.exists() and any(flag in flags.read_text() for flag in (" avx512_bf16", " amx_bf16"))
    return "bfloat16" if has_bf16 else "float32"


class _OneKey(click.types.StringParamType):
    """An API key. An environment variable holds one, whatever is in it."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return [rv]


@main.command(name="serve")
@click.argument("model", required=False, envvar="HYPERGEN_MODEL")
@_option("--host", default="0.0.0.0", help="Address to listen on.")
@_option("--port", type=click.IntRange(1, 65535), default=8000, help="Port to listen on.")
@_option(
    "--api-key",
    type=_OneKey(),
    metavar="KEY",
    multiple=True,
    help="Clients must send it as 'Authorization: Bearer KEY'; repeatable. Other users of this machine can see what a "
    "command line says: a file tells them nothing. [default: no key]",
)
@_option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="Read keys from this file, 'KEY' or 'NAME: KEY' a line, now and whenever it changes; the log has the names.",
)
@_option(
    "--sizes",
    type=click.Choice(["fit", "strict"]),
    default="fit",
    help="fit: any size may be asked for, and is scaled from the nearest that the model draws; strict: only those.",
)
@_option("--max-side", type=click.IntRange(1, LONGEST_SIDE), default=4096, help="Pixels a side that may be asked for.")
@_option("--max-queue-size", type=click.IntRange(min=0), default=100, help="Requests that may wait; more get a 429.")
@_option("--request-timeout", type=click.FloatRange(min=1), default=600.0, help="Seconds until a request is given up.")
@_option("--body-timeout", type=click.FloatRange(min=1), default=30.0, help="Seconds for a body; one more per 32 KiB.")
@_option("--retry-grace", type=click.FloatRange(min=0), default=5.0, help="Seconds work goes on when its client left.")
@_option(
    "--cors-origin",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    help="A website whose scripts may use the API, such as https://app.example.com; repeatable. '*' is every website.",
)
@_option("--public-url", metavar="URL", help="Where clients reach the server, for links. [default: as they came]")
@_option("--link-lifetime", type=click.FloatRange(min=1), default=3600.0, help="Seconds that a picture's link lasts.")
@_option("--link-secret", metavar="SECRET", help="Signs links, so that they outlive a restart. [default: random]")
@_option("--link-bucket", metavar="s3://BUCKET/PREFIX", help="Keep pictures with links there. [default: the cache]")
@_option("--metrics-need-key", is_flag=True, help="Ask for the API key on /metrics, too.")
@_option("--reload", is_flag=True, help="Start again when the project's code changes.")
@_triton_options
def serve_command(*, triton: TritonOptions, model: str | None, reload: bool, **given: Any) -> None:
    """Serve MODEL (a diffusers checkpoint's hub id or folder, or an exported repository) behind OpenAI's API.

    Without MODEL it serves the small checkpoint that ships with the project.
    """
    # With somebody else's Triton and no MODEL given, the model says its own id.
    served_id = None if triton.url and model is None else triton.model
    host, port = given.pop("host"), given.pop("port")
    _check_keys(given["api_key"], given["api_key_file"])
    if given["link_bucket"] is not None and importlib.util.find_spec("boto3") is None:
        raise click.UsageError("--link-bucket needs boto3: pip install 'hypergen-triton[s3]'.")
    link_folder = triton.export.cache_dir / "links"
    try:
        gateway = Config(model_id=served_id, link_folder=link_folder, **given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    options = ServeOptions(host=host, port=port, triton=triton, gateway=gateway)
    if reload:
        _run_reloading(options)
    else:
        run_until_signalled(serve(options))


def _check_keys(given: tuple[str, ...], file: Path | None) -> None:
    """Says what is wrong with the keys before anything is started."""
    if given and file is not None:
        raise click.UsageError("--api-key and --api-key-file exclude each other.")
    try:
        Keys(given, file)
    except BadKeysError as error:
        raise click.UsageError(f"The API keys cannot be read from {file}: {error}.") from error


@main.command()
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("out.png"))
@click.option("--model", envvar="HYPERGEN_MODEL", show_envvar=True, help="[default: the shipped checkpoint]")
@click.option("--negative-prompt")
@click.option("--size", metavar="WxH", help="[default: the model's own]")
@click.option("--num-inference-steps", "--steps", type=int, help="[default: the model's own]")
@click.option("--guidance-scale", type=float, help="[default: the model's own]")
@click.option("--scheduler", help="[default: the checkpoint's own]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="[default: random]")
@_triton_options
def generate(*, triton: TritonOptions, output: Path, size: str | None, **given: Any) -> None:
    """Draw one picture of PROMPT into a PNG file."""
    given.pop("model")
    width, height = _read_size(size)
    seed = secrets.randbits(32) if given["seed"] is None else given["seed"]
    if not output.parent.is_dir():
        raise click.UsageError(f"There is no folder {output.parent} to write {output.name} into.")
    picture = run_until_signalled(draw(triton, given | {"width": width, "height": height, "seed": seed}))
    output.write_bytes(encode(picture.pixels))
    click.echo(f"{output}: {picture.pixels.shape[1]}x{picture.pixels.shape[0]}, seed {picture.seed}")


def _read_size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise click.UsageError(f"--size must be WIDTHxHEIGHT, such as 512x512, not {text!r}.")
    return int(width), int(height)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Every error that a user can mend is one line and an exit code other than 0, never a traceback."""
    try:
        yield
    except ExportFailedError as error:
        raise SystemExit(error.exit_code) from error
    except HyperGenError as error:
        raise click.ClickException(error.message) from error
    except (EmbeddedError, PortUnavailableError) as error:
        raise click.ClickException(str(error)) from error
    except asyncio.CancelledError:
        raise SystemExit(130) from None


def _run_reloading(options: ServeOptions) -> None:
    from uvicorn import Config as UvicornConfig
    from uvicorn.supervisors import ChangeReload

    watched = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "model_repository")]
    config = UvicornConfig("", reload=True, reload_dirs=[folder for folder in watched if Path(folder).is_dir()])
    ChangeReload(config, target=functools.partial(_serve_again, options), sockets=[]).run()


def _serve_again(options: ServeOptions, sockets: Any) -> None:
    """One life of a reloaded server; `sockets` is what uvicorn hands over, none here."""
    assert not sockets
    set_up_logging("info", "text")
    with _one_line_errors():
        run_until_signalled(serve(options))
