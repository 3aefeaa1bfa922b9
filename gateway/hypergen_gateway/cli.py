"""The `hypergen` command line: options, their environment variables, and one-line error messages.

`serving` implements the commands. `export` is the exporter's own command, imported on demand so that the gateway works
without torch.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import logging
import os
import re
import secrets
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from hypergen_gateway.api.scheduler_names import scheduler_of
from hypergen_gateway.config import MAX_QUEUE_SIZE, Config
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.export_cache import (
    SHIPPED_MODEL,
    ExportFailedError,
    ExportOptions,
    default_cache_dir,
    find_write_error,
    is_repository,
)
from hypergen_gateway.errors import HyperGenError
from hypergen_gateway.generation.images import FileFormat, FormatName, encode
from hypergen_gateway.generation.sizes import LONGEST_SIDE
from hypergen_gateway.http.addresses import PortUnavailableError, is_grpc_address
from hypergen_gateway.observability.logs import LogFormat, set_up_logging
from hypergen_gateway.options import (
    A_WEEK,
    A_YEAR,
    Argument,
    KeyText,
    Number,
    Option,
    PortOption,
    SecretOption,
    option,
)
from hypergen_gateway.passport.errors import PassportError
from hypergen_gateway.passport.measure import FIELDS, Measured, PassportOptions, check_psnr, describe, find_passport
from hypergen_gateway.passport.measure import measure as measure_passport
from hypergen_gateway.passport.prompts import MAX_COUNT, read_prompts
from hypergen_gateway.passport.table import by_setting, description, sheet, table, together
from hypergen_gateway.serving import (
    ClipSkipError,
    ServeOptions,
    TritonOptions,
    generate_image,
    run_until_signalled,
    serve,
)

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "int8": "int8",
    "int8-weights": "int8-weights",
    "int4-weights": "int4-weights",
}

# File formats by file name extension; standard output has none.
FORMATS: Mapping[str, FormatName] = {"": "png", ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
STANDARD_OUTPUT = Path("-")
# Of the sampler's inputs.
MAX_INT32 = 2**31 - 1

# Commands imported on demand: the exporter may not be installed, and serving needs no HTTP client.
_LAZY_COMMANDS = {
    "conformance": "hypergen_gateway.conformance.command",
    "estimate": "hypergen_export.cli",
    "export": "hypergen_export.cli",
}


class _LazyGroup(click.Group):
    """A command group that imports some of its commands on demand and reports I/O errors in one line."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Run the command. Output that cannot be written, for example to a full disk, gives no traceback."""
        try:
            return super().main(*arguments, **settings)
        except OSError as error:
            click.echo(f"Error: {error.filename or 'standard output'}: {error.strerror or error}", err=True)
            raise SystemExit(1) from error

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command. Reject undecodable text here, as later errors could not name the option that it came from."""
        variables = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("HYPERGEN_")]
        for text in (*args, *variables):
            if not _is_text(text):
                raise click.UsageError(f"{text!a} is not valid {sys.getfilesystemencoding()}.")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_LAZY_COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY_COMMANDS:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module(_LAZY_COMMANDS[cmd_name]), cmd_name)
        return command


def _is_text(text: str) -> bool:
    """Whether `text` can be encoded: Python represents undecodable bytes as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(version("hypergen-triton"), prog_name="hypergen")
def main() -> None:
    """Self-hosted, OpenAI-compatible image generation on NVIDIA Triton."""


def _triton_options(command: Callable[..., None]) -> Any:
    """Options that select a Triton; the command receives them as one `TritonOptions`."""

    @option("--triton-url", metavar="HOST:PORT", help="gRPC address of a running Triton, instead of an embedded one.")
    @option(
        "--dtype",
        type=click.Choice(list(DTYPES)),
        default="auto",
        help="Precision of the engines; auto: bfloat16 if the CPU supports it, else float32. int…: quantised.",
    )
    @option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        help="Device of the embedded Triton.",
    )
    @option("--max-batch-size", type=click.IntRange(1, 128), default=8, help="Images per denoiser call.")
    @option(
        "--lora",
        metavar="[NAME=]PATH[:SCALE]",
        multiple=True,
        help="A LoRA (.safetensors file or its folder) that requests name in loras or lora_path; repeatable.",
    )
    @option(
        "--lora-rank",
        type=click.IntRange(0, 1024),
        default=0,
        help="Least columns for LoRAs, of which each takes as many as its rank.",
    )
    @option(
        "--vae",
        metavar="PATH|ID",
        help="VAE in place of the model's own: a folder, hub id or .safetensors file; also an AutoencoderTiny.",
    )
    @option(
        "--preview-vae",
        metavar="PATH|ID",
        help="AutoencoderTiny that decodes previews, which then cost little: a folder, hub id or .safetensors file.",
    )
    @option(
        "--text-encoder",
        metavar="PATH|ID",
        multiple=True,
        help="Text encoder in place of the model's own: a pipeline, whose tokenizers are used, too, or the "
        ".safetensors or .gguf file of a single one; repeatable.",
    )
    @option(
        "--prediction-type",
        type=click.Choice(["epsilon", "v_prediction"]),
        help="What the model of a single file predicts.",
        show_default="as the file says",
    )
    @option(
        "--embedding",
        metavar="[NAME=]PATH",
        multiple=True,
        help="A textual inversion (.safetensors, .pt, .bin) that prompts name; repeatable.",
    )
    @option(
        "--embedding-dir",
        type=click.Path(path_type=Path),
        help="Folder of textual inversions, each named as its file.",
        show_default="none",
    )
    @option("--deep-cache", is_flag=True, help="Add a shallow UNet for requests with cache_interval (DeepCache).")
    @option(
        "--cache-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for exported models, converted single files and linked images.",
        show_default="~/.cache/hypergen",
    )
    @option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        help="Minimum level of log lines; debug includes Triton's log.",
    )
    @option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        help="json: one object per line.",
    )
    @functools.wraps(command)
    def with_triton(*, model: str | None, log_level: str, log_format: LogFormat, **given: Any) -> None:
        set_up_logging(log_level, log_format)
        with _one_line_errors():
            command(triton=_read_triton_options(model, given), model=model, **given)

    return with_triton


def _read_triton_options(model: str | None, given: dict[str, Any]) -> TritonOptions:
    url, device, loras = given.pop("triton_url"), given.pop("device"), given.pop("lora")
    deep_cache, max_batch_size = given.pop("deep_cache"), given.pop("max_batch_size")
    embeddings, embedding_dir = given.pop("embedding"), given.pop("embedding_dir")
    lora_rank, lora_dir = given.pop("lora_rank"), given.pop("lora_dir", None)  # which one image has no use for
    parts = {name: given.pop(name) for name in ("prediction_type", "vae", "preview_vae")}
    text_encoders = given.pop("text_encoder")
    dtype = DTYPES[given.pop("dtype")]
    model = model or SHIPPED_MODEL
    if url is not None:
        of_export = {f"--{name.replace('_', '-')}": value for name, value in parts.items()}
        of_export |= {"--lora": loras, "--lora-rank": lora_rank, "--lora-dir": lora_dir}
        of_export |= {"--text-encoder": text_encoders, "--embedding": embeddings, "--embedding-dir": embedding_dir}
        _check_triton_url(url, of_export | {"--deep-cache": deep_cache})
        return TritonOptions(model=model, url=url, export=None)
    if device == "cuda" or dtype == "float16":
        raise click.UsageError(
            "The embedded Triton runs on the CPU, and not in float16. For a GPU, build TensorRT engines with "
            "'hypergen export --engine tensorrt', start Triton with them and pass its address as --triton-url."
        )
    cache_dir = given["cache_dir"] or default_cache_dir()
    if cache_dir is None:
        raise click.UsageError("This user has no home folder: pass --cache-dir, the folder for exported models.")
    _ensure_home(cache_dir)
    export = ExportOptions(
        dtype=_cpu_dtype() if dtype == "auto" else dtype,
        max_batch_size=max_batch_size,
        cache_dir=cache_dir,
        loras=loras,
        lora_rank=lora_rank,
        lora_dir=lora_dir,
        deep_cache=deep_cache,
        **parts,
        text_encoders=text_encoders,
        embeddings=embeddings,
        embedding_dir=embedding_dir,
    )
    return TritonOptions(model=model, url=None, export=export)


def _ensure_home(cache_dir: Path) -> None:
    """Set HOME for a user without one: libraries of the exporter and the models need it, even if they store nothing."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(cache_dir.absolute())


def _check_triton_url(url: str, of_export: Mapping[str, Any]) -> None:
    """`of_export`: the options that apply to an export, which is made already."""
    if not is_grpc_address(url):
        raise click.UsageError(
            f"--triton-url must be HOST:PORT of Triton's gRPC, such as 127.0.0.1:8001 or [::1]:8001, not {url!r}."
        )
    given = next((name for name, value in of_export.items() if value), None)
    if given:
        raise click.UsageError(f"--triton-url serves an exported repository: pass {given} to 'hypergen export'.")


def _cpu_dtype() -> str:
    """bfloat16 if the CPU has instructions for it, else float32."""
    flags = Path("/proc/cpuinfo")
    has_bf16 = flags.exists() and any(flag in flags.read_text() for flag in (" avx512_bf16", " amx_bf16"))
    return "bfloat16" if has_bf16 else "float32"


@main.command(name="serve", short_help="Serve a model through the OpenAI images API.")
@click.argument("model", cls=Argument, required=False, envvar="HYPERGEN_MODEL")
@option("--host", default="0.0.0.0", help="Address or host name to listen on; '::' is both IPv4 and IPv6.")
@option("--port", cls=PortOption, type=click.IntRange(1, 65535), default=8000, help="Port to listen on.")
@option(
    "--api-key",
    cls=SecretOption,
    type=KeyText(),
    metavar="KEY",
    multiple=True,
    help="API key that clients must send as 'Authorization: Bearer KEY'; repeatable. Other users of this machine can "
    "read command lines: prefer a file or the variable.",
    show_default="no key",
)
@option(
    "--api-key-file",
    cls=SecretOption,
    type=click.Path(path_type=Path),
    help="File of API keys, one 'KEY' or 'NAME: KEY' per line; reloaded when it changes. Logs show NAME.",
)
@option(
    "--sizes",
    type=click.Choice(["fit", "strict"]),
    default="fit",
    help="fit: accept any size and scale from the nearest that the model generates; strict: accept only those.",
)
@option(
    "--max-side",
    type=click.IntRange(1, LONGEST_SIDE),
    default=4096,
    help="Largest width and height in pixels.",
)
@option(
    "--prompt-weighting",
    type=click.Choice(["none", "a1111", "compel"]),
    help="Syntax of weights in prompts of requests that do not say, if the model reads any.",
    show_default="none",
)
@option(
    "--clip-skip",
    type=click.IntRange(0, 100),
    metavar="N",
    help="How many of CLIP's last layers to leave out for requests that do not say.",
    show_default="the checkpoint's own",
)
@option(
    "--model-alias",
    "model_aliases",
    metavar="NAME",
    multiple=True,
    help="Another name by which clients can look up the model, such as gpt-image-1; repeatable.",
)
@option(
    "--lora-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of LoRA files, which are served as they come and go, without a restart.",
)
@option(
    "--lora-admin",
    "lora_admins",
    metavar="NAME",
    multiple=True,
    help="Name of a key in --api-key-file that may add and remove LoRAs by POST and DELETE /v1/loras; repeatable.",
)
@option("--prompt-loras", is_flag=True, help="Let prompts select LoRAs as in web UIs: <lora:NAME:SCALE>.")
@option(
    "--max-queue-size",
    type=click.IntRange(0, MAX_QUEUE_SIZE),
    default=100,
    help="Requests that may wait.",
)
@option("--request-timeout", type=Number(1, A_WEEK), default=600.0, help="Time limit of a request in seconds.")
@option(
    "--body-timeout",
    type=Number(1, A_WEEK),
    default=30.0,
    help="Seconds to receive a body, plus one per 32 KiB.",
)
@option("--keep-alive", type=Number(1, A_WEEK), default=75.0, help="Seconds that idle connections stay open.")
@option("--retry-grace", type=Number(0, A_WEEK), default=5.0, help="Seconds to go on after a disconnect.")
@option(
    "--cors-origin",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    help="Website whose scripts may use the API, such as https://app.example.com; repeatable. '*' allows all.",
)
@option("--public-url", metavar="URL", help="Base URL of links to images.", show_default="the request's Host")
@option("--link-lifetime", type=Number(1, A_YEAR), default=3600.0, help="Seconds until links to images expire.")
@option(
    "--link-secret",
    cls=SecretOption,
    metavar="SECRET",
    help="Secret that signs links; keep it for links to survive a restart.",
    show_default="random",
)
@option("--link-bucket", metavar="s3://BUCKET/PREFIX", help="Bucket for linked images.", show_default="the cache")
@option("--metrics-need-key", is_flag=True, help="Require the API key for /metrics, too.")
@option("--reload", is_flag=True, help="Restart when the project's code changes.")
@_triton_options
def serve_command(*, triton: TritonOptions, model: str | None, reload: bool, **given: Any) -> None:
    """Serve MODEL through the OpenAI images API: a diffusers checkpoint's hub id or folder, a single file
    (.safetensors, .ckpt), or an exported repository.

    The default MODEL is the small checkpoint that ships with the project. Every option can be set by an environment
    variable; an empty variable counts as unset, except for keys and secrets, where it is an error.
    """
    # An exported repository has an id of its own, and so has the model of an external Triton unless MODEL names it.
    served_id = None if is_repository(triton.model) or (triton.url and model is None) else triton.model
    host, port = given.pop("host"), given.pop("port")
    if given["link_bucket"] is not None and importlib.util.find_spec("boto3") is None:
        raise click.UsageError("--link-bucket needs boto3: pip install 'hypergen-triton[s3]'.")
    link_folder = _find_link_folder(given.pop("cache_dir"))
    lora_dir = None if triton.export is None else triton.export.lora_dir
    if given["lora_admins"] and lora_dir is not None and (reason := find_write_error(lora_dir)):
        raise click.UsageError(f"--lora-admin: files cannot be added to {lora_dir} ({reason}).")
    try:
        gateway = Config(model_id=served_id, link_folder=link_folder, lora_dir=lora_dir, **given)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    options = ServeOptions(host=host, port=port, triton=triton, gateway=gateway)
    if reload:
        _run_reloading(options)
    else:
        run_until_signalled(serve(options))


def _find_link_folder(cache_dir: Path | None) -> Path | None:
    """The folder for linked images; None, meaning a temporary one, if the default cache folder is not writable."""
    folder = cache_dir or default_cache_dir()
    if folder is None:
        return None
    reason = find_write_error(folder / "links")
    if reason is not None and cache_dir is not None:
        raise click.UsageError(f"Linked images cannot be stored in {cache_dir} ({reason}): see --cache-dir.")
    return folder / "links" if reason is None else None


@main.command()
@click.argument("prompt", cls=Argument)
@click.option(
    "-o",
    "--output",
    cls=Option,
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    default=Path("out.png"),
    help="File to write: .png, .jpg, .jpeg or .webp; '-' is standard output, as PNG.",
)
@option("--model", show_default="the shipped checkpoint")
@click.option("--negative-prompt", help="What the image should not show.")
@click.option("--size", cls=Option, metavar="WxH", show_default="the model's own")
@click.option(
    "--num-inference-steps", "--steps", cls=Option, type=click.IntRange(1, 150), show_default="the model's own"
)
@click.option("--guidance-scale", cls=Option, type=Number(0, 20), show_default="the model's own")
@click.option(
    "--scheduler",
    cls=Option,
    help="As in the API: 'euler', 'DPM++ 2M Karras', ….",
    show_default="the checkpoint's own",
)
@click.option("--seed", cls=Option, type=click.IntRange(0, 2**63 - 1), show_default="random")
@_triton_options
def generate(
    *, triton: TritonOptions, output: Path, size: str | None, scheduler: str | None, seed: int | None, **given: Any
) -> None:
    """Generate one image of PROMPT and write it to a file."""
    del given["model"], given["cache_dir"]
    given["width"], given["height"] = _read_size(size)
    given["scheduler"], given["sigmas"] = scheduler_of(scheduler)
    given["seed"] = secrets.randbits(32) if seed is None else seed
    file_format = _file_format(output)
    with _reserve_file(output):
        image = run_until_signalled(generate_image(triton, given))
        _write(output, encode(image.pixels, file_format))
    summary = f"{click.format_filename(output)}: {image.pixels.shape[1]}x{image.pixels.shape[0]}, seed {image.seed}"
    click.echo(summary, err=output == STANDARD_OUTPUT)


@main.command(short_help="Show or measure how far a model's images are from those in float32.")
@click.argument("model", cls=Argument, required=False, envvar="HYPERGEN_MODEL")
@click.option("--measure", is_flag=True, help="Measure it, by images of this export and of a reference in float32.")
@click.option(
    "--prompts",
    cls=Option,
    type=click.Path(path_type=Path),
    help="Text file with a prompt per line.",
    show_default="the model's own suggestions",
)
@click.option(
    "--count",
    cls=Option,
    type=click.IntRange(1, MAX_COUNT),
    help="Prompts to take, spread over all.",
    show_default="8, of a file all",
)
@click.option(
    "--with",
    "settings",
    cls=Option,
    metavar="FIELD=VALUE,…",
    multiple=True,
    help=f"Measure requests with these fields, too ({', '.join(FIELDS)}); repeatable.",
)
@click.option(
    "--reference",
    cls=Option,
    metavar="MODEL",
    help="Checkpoint, or repository in float32, to compare with.",
    show_default="what the export was made of",
)
@click.option(
    "--reference-url", cls=Option, metavar="HOST:PORT", help="gRPC address of a Triton that serves it in float32."
)
@click.option(
    "--min-psnr",
    cls=Option,
    type=Number(0, 100),
    metavar="DB",
    help="Exit with code 1 if the mean PSNR of images as served is below.",
)
@click.option(
    "--beside",
    cls=Option,
    type=click.Choice([name for name in DTYPES if name not in ("auto", "float16", "fp16")]),
    multiple=True,
    help="Measure an export in this precision, too, and show all together; repeatable.",
)
@click.option(
    "--sheet",
    "sheet_file",
    cls=Option,
    type=click.Path(dir_okay=False, path_type=Path),
    help="PNG file for all images side by side.",
)
@_triton_options
def passport(
    *,
    triton: TritonOptions,
    measure: bool,
    min_psnr: float | None,
    beside: tuple[str, ...],
    sheet_file: Path | None,
    **given: Any,
) -> None:
    """Show the passport of MODEL: how far its images are from those of its checkpoint in float32, at equal seeds.

    MODEL is an exported repository, or a checkpoint with the options that it is served with. --measure generates the
    images through Triton, first those of the export and then those in float32; it can be interrupted and started again.
    With --triton-url the images are those of a running Triton, and MODEL is the folder of its repository.
    """
    options = _read_passport_options(triton, given)
    if measure:
        if sheet_file is not None:
            _check_sheet(sheet_file)
        measured = run_until_signalled(measure_passport(_in_precisions(options, beside)))
        made = [each.passport for each in measured]
        if sheet_file is not None:
            _write_sheet(sheet_file, measured)
    elif options.is_specific or beside or sheet_file is not None:
        raise click.UsageError("Prompts, settings, a reference, other precisions and a sheet are for --measure.")
    else:
        made = [] if triton.url else [find_passport(triton)]
    rows = made[0].summaries if made else run_until_signalled(describe(triton)).passport
    if not rows:
        raise PassportError(f"The model at {triton.url} has no passport.")
    by_precision = {each.dtype: by_setting(each.summaries) for each in made} or {"": by_setting(rows)}
    click.echo("\n".join([*map(description, made), *([""] if made else []), table(together(by_precision))]))
    if min_psnr is not None:
        check_psnr(rows, made[0] if made else None, min_psnr)


def _read_passport_options(triton: TritonOptions, given: dict[str, Any]) -> PassportOptions:
    cache_dir = triton.export.cache_dir if triton.export else given["cache_dir"] or default_cache_dir()
    if cache_dir is None:
        raise click.UsageError("This user has no home folder: pass --cache-dir.")
    if given["reference"] is not None and given["reference_url"] is not None:
        raise click.UsageError("--reference and --reference-url exclude each other.")
    if given["reference_url"] is not None and not is_grpc_address(given["reference_url"]):
        raise click.UsageError(f"--reference-url must be HOST:PORT of Triton's gRPC, not {given['reference_url']!r}.")
    rows = triton.export.max_batch_size if triton.export else 8
    return PassportOptions(
        triton=triton,
        export=ExportOptions(dtype="float32", max_batch_size=rows, cache_dir=cache_dir),
        prompts=read_prompts(given["prompts"]) if given["prompts"] else (),
        count=given["count"],
        settings=tuple(_read_setting(text) for text in given["settings"]),
        reference=given["reference"],
        reference_url=given["reference_url"],
    )


def _in_precisions(options: PassportOptions, beside: Sequence[str]) -> list[PassportOptions]:
    """The options for each precision, the model's own first."""
    triton = options.triton
    if not beside:
        return [options]
    if triton.export is None or is_repository(triton.model):
        raise click.UsageError("--beside: MODEL must be a checkpoint, which is exported in each precision.")
    dtypes = dict.fromkeys([triton.export.dtype, *(DTYPES[name] for name in beside)])
    exports = [replace(triton.export, dtype=dtype) for dtype in dtypes]
    return [replace(options, triton=replace(triton, export=export)) for export in exports]


def _read_setting(text: str) -> dict[str, int | float | str]:
    """Parse `guidance_start=0.2,guidance_end=0.8`."""
    setting: dict[str, int | float | str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in FIELDS or not equals:
            raise click.UsageError(f"--with must be FIELD=VALUE with {', '.join(FIELDS)}, not {part[:40]!r}.")
        try:
            setting[name] = read = FIELDS[name](value)
        except ValueError:
            raise click.UsageError(f"--with {name} must be a number, not {value[:40]!r}.") from None
        if isinstance(read, int) and abs(read) > MAX_INT32:
            raise click.UsageError(f"--with {name} is too large: {value[:40]}.")
    return setting


def _check_sheet(file: Path) -> None:
    """Refuse now what could not be written once the images have been generated, perhaps hours later."""
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise click.ClickException(f"--sheet: {click.format_filename(file.parent)} is no folder that can be written to")


def _write_sheet(file: Path, measured: Sequence[Measured]) -> None:
    images = together({each.passport.dtype: each.images for each in measured})
    reference = f"reference, {measured[0].passport.reference}"
    try:
        sheet({reference: measured[0].reference, **images}).save(file, format="PNG")
    except OSError as error:
        raise click.ClickException(f"--sheet: {click.format_filename(file)}: {error.strerror or error}") from error


def _file_format(output: Path) -> FileFormat:
    suffix = output.suffix.lower()
    if suffix not in FORMATS:
        raise click.UsageError(f"--output must end in .png, .jpg, .jpeg or .webp, not in {suffix}.")
    return FileFormat(FORMATS[suffix])


@contextmanager
def _reserve_file(output: Path) -> Iterator[None]:
    """Create the output file before the image is generated, so that errors come early; remove a new one on failure."""
    is_new = output != STANDARD_OUTPUT and not output.exists()
    if is_new or output.is_file():
        with _errors_name_output(output):
            output.open("ab").close()
    try:
        yield
    except BaseException:
        if is_new:
            output.unlink(missing_ok=True)
        raise


def _write(output: Path, content: bytes) -> None:
    with _errors_name_output(output):
        if output == STANDARD_OUTPUT:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            output.write_bytes(content)


@contextmanager
def _errors_name_output(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"--output: {click.format_filename(output)}: {error.strerror}") from error


def _read_size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        raise click.UsageError(f"--size must be WIDTHxHEIGHT, such as 512x512, not {text!r}.")
    return int(match[1]), int(match[2])


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Report errors that a user can fix in one line, with a non-zero exit code and without a traceback."""
    try:
        yield
    except ExportFailedError as error:
        raise SystemExit(error.exit_code) from error
    except (HyperGenError, EmbeddedError, PassportError, PortUnavailableError, ClipSkipError) as error:
        raise click.ClickException(str(error)) from error
    except asyncio.CancelledError:
        raise SystemExit(130) from None


def _run_reloading(options: ServeOptions) -> None:
    from uvicorn import Config as UvicornConfig
    from uvicorn.supervisors import ChangeReload

    given = click.get_current_context().params
    logging_options = (given["log_level"], given["log_format"])
    logging.getLogger("uvicorn.error").setLevel(given["log_level"].upper())
    watched = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "model_repository")]
    folders = [folder for folder in watched if Path(folder).is_dir()]
    config = UvicornConfig("", reload=True, reload_dirs=folders, log_config=None)
    target = functools.partial(_serve_reloaded, options, logging_options, Path.cwd())
    # multiprocessing starts its processes with `python -c`, which looks for modules in the current folder first: it may
    # hold somebody else's checkpoint. PYTHONSAFEPATH would prevent that from Python 3.11 on only.
    os.chdir(sysconfig.get_path("stdlib"))
    ChangeReload(config, target=target, sockets=[]).run()


def _serve_reloaded(
    options: ServeOptions, logging_options: tuple[str, LogFormat], current_folder: Path, sockets: Any
) -> None:
    """Entry point of a reloaded server's process. uvicorn passes `sockets`, which is empty here."""
    assert not sockets
    os.chdir(current_folder)
    set_up_logging(*logging_options)
    with _one_line_errors():
        run_until_signalled(serve(options))
