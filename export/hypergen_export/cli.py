"""The command `hypergen export`: options, error messages and exit codes.

The gateway's command line loads this module, so it must not import torch or diffusers.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from hypergen_export.checkpoints.components import QUANTIZED
from hypergen_export.checkpoints.embeddings import read_embeddings
from hypergen_export.checkpoints.lora import read_loras
from hypergen_export.engines.engine import ENGINES, OPENVINO, read_sizes
from hypergen_export.errors import BadOptionError, ExportError, InterruptedExportError
from hypergen_export.repository.estimate import Question, answer, read_memory
from hypergen_export.repository.export import ExportResult
from hypergen_export.repository.export import export as build
from hypergen_export.repository.opening import open_request
from hypergen_export.repository.passport import PassportMeasurement
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.single_file import SingleFileOptions, default_cache_dir
from hypergen_export.single_files.kinds import PREDICTION_TYPES

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    **{dtype: dtype for dtype in QUANTIZED},
}


def _not_empty(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Reject an empty value, such as --output "$FOLDER" with an unset variable."""
    if any(each in ("", Path()) for each in (value if isinstance(value, tuple) else (value,))):
        raise click.BadParameter("must not be empty.", param=parameter)
    return value


def _of_parts(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which files a checkpoint is made of."""
    options = (
        click.option(
            "--vae",
            callback=_not_empty,
            envvar="HYPERGEN_VAE",
            show_envvar=True,
            help="VAE in place of the model's own: a folder, hub id or .safetensors file; also an AutoencoderTiny.",
        ),
        click.option(
            "--preview-vae",
            callback=_not_empty,
            envvar="HYPERGEN_PREVIEW_VAE",
            show_envvar=True,
            help="AutoencoderTiny that decodes previews: a folder, hub id or .safetensors file.",
        ),
        click.option(
            "--text-encoder",
            "text_encoders",
            metavar="PATH|ID",
            multiple=True,
            callback=_not_empty,
            envvar="HYPERGEN_TEXT_ENCODER",
            show_envvar=True,
            help="Text encoder in place of the model's own: a pipeline's folder or hub id, whose tokenizers are used, "
            "too, or the .safetensors or .gguf file of a single one; repeatable.",
        ),
        click.option(
            "--prediction-type",
            type=click.Choice(PREDICTION_TYPES),
            envvar="HYPERGEN_PREDICTION_TYPE",
            show_envvar=True,
            help="What the model of a single file predicts.  [default: as the file says]",
        ),
        click.option(
            "--cache-dir",
            type=click.Path(file_okay=False, path_type=Path),
            callback=_not_empty,
            envvar="HYPERGEN_CACHE_DIR",
            show_envvar=True,
            help="Folder for converted single files and passports.  [default: ~/.cache/hypergen]",
        ),
    )
    return functools.reduce(lambda wrapped, add: add(wrapped), reversed(options), command)


@click.command(short_help="Export a checkpoint to a Triton model repository.")
@click.argument("model", callback=_not_empty)
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="openvino",
    show_default=True,
    help="openvino for a CPU; tensorrt for this machine's GPU, built by the TensorRT release installed here.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    default="float32",
    show_default=True,
    help="Precision of the engine; float16 and fp8 with TensorRT only, those of weights alone with OpenVINO only.",
)
@click.option(
    "--sizes",
    metavar="WxH,…",
    help="Image sizes to build TensorRT engines for; OpenVINO takes any.  [default: the model's own size]",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(1, 128),
    default=8,
    show_default=True,
    help="Images per denoiser call; an image with guidance takes two of its rows.",
)
@click.option(
    "--lora",
    "loras",
    metavar="[NAME=]PATH[:SCALE]",
    multiple=True,
    callback=_not_empty,
    envvar="HYPERGEN_LORA",
    show_envvar=True,
    help="LoRA (.safetensors file, or a folder with one) to serve beside MODEL, by default at SCALE; repeatable.",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(0, 1024),
    default=0,
    show_default=True,
    envvar="HYPERGEN_LORA_RANK",
    show_envvar=True,
    help="Least columns for LoRAs, of which each takes as many as its rank.",
)
@click.option(
    "--embedding",
    "embeddings",
    metavar="[NAME=]PATH",
    multiple=True,
    callback=_not_empty,
    envvar="HYPERGEN_EMBEDDING",
    show_envvar=True,
    help="Textual inversion (.safetensors, .pt, .bin) that prompts name; repeatable.",
)
@click.option(
    "--embedding-dir",
    type=click.Path(path_type=Path),
    callback=_not_empty,
    envvar="HYPERGEN_EMBEDDING_DIR",
    show_envvar=True,
    help="Folder of textual inversions, each named as its file.",
)
@click.option(
    "--deep-cache",
    is_flag=True,
    envvar="HYPERGEN_DEEP_CACHE",
    show_envvar=True,
    help="Also export a shallow UNet, for requests with cache_interval (DeepCache).",
)
@_of_parts
@click.option(
    "--passport",
    type=click.Choice(["off", "on"]),
    help="Measure how far images are from those in float32: see 'hypergen passport'.  [default: off, or on with "
    "--min-psnr]",
)
@click.option(
    "--passport-prompts",
    type=click.Path(path_type=Path),
    callback=_not_empty,
    help="Text file with a prompt per line for the passport.  [default: the model's own suggestions]",
)
@click.option(
    "--min-psnr",
    type=click.FloatRange(0, 100),
    metavar="DB",
    help="Export nothing if the mean PSNR of the passport's images is below.",
)
@click.option("--model-id", callback=_not_empty, help="Model id in the API.  [default: MODEL]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    callback=_not_empty,
    required=True,
    help="Folder for the Triton repository; a previous export there is replaced.",
)
def export(*, model: str, output: Path, dtype: str, sizes: str | None, loras: tuple[str, ...], **options: Any) -> None:
    """Export MODEL to a Triton model repository: a diffusers checkpoint (hub id or folder), or a single file.

    `hypergen/emoji` and `hypergen/emoji-flow` are bundled with HyperGen.
    """
    began = time.monotonic()
    options["model_id"] = options["model_id"] or model
    try:
        examine = _read_passport_options(options)
        given = read_loras(loras)
        request = ExportRequest(
            model=model,
            output=output,
            dtype=_DTYPES[dtype],
            sizes=() if sizes is None else read_sizes(sizes),
            loras=given,
            single_files=_single_files(options),
            embeddings=read_embeddings(options.pop("embeddings"), options.pop("embedding_dir"), given),
            **options,
        )
        with _interruptible():
            result = build(request, notify=functools.partial(_notify, model), examine=examine)
    except ExportError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:  # an unreadable checkpoint, an incomplete installation
        _fail(f"{error.filename or model}: {error.strerror or error}", 1)
    click.echo(f"{output}: {_summary(result)} ({time.monotonic() - began:.1f} s)", err=True)


def _read_passport_options(options: dict[str, Any]) -> Callable[[Path], None]:
    """Take the options of the passport out of `options`; what examines the repository. Raises BadOptionError."""
    wanted, prompts, least = (options.pop(name) for name in ("passport", "passport_prompts", "min_psnr"))
    if wanted == "off" and least is not None:
        raise BadOptionError("--min-psnr: needs the passport that --passport off leaves out")
    if prompts is not None and wanted != "on" and least is None:
        raise BadOptionError("--passport-prompts: needs --passport on or --min-psnr")
    if wanted != "on" and least is None:
        return lambda _: None
    if options["engine"] != OPENVINO.name:
        raise BadOptionError(
            f"--passport: {options['engine']} engines are measured where they run: start Triton with them, then "
            "'hypergen passport DIR --measure --triton-url HOST:PORT'"
        )
    return PassportMeasurement(cache_dir=options["cache_dir"] or default_cache_dir(), prompts=prompts, min_psnr=least)


def _notify(model: str, text: str) -> None:
    click.echo(f"{model}: {text}", err=True)


@click.command(short_help="Estimate the GPU memory that a checkpoint needs, without building anything.")
@click.argument("model", callback=_not_empty)
@click.option(
    "--gpu", metavar="24GB", callback=_not_empty, help="Memory of the GPU; exit code 1 if MODEL does not fit."
)
@click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    default="bfloat16",
    show_default=True,
    help="Precision of the engines.",
)
@click.option("--sizes", metavar="WxH,…", help="Image sizes to build engines for.  [default: the model's own size]")
@click.option(
    "--max-batch-size",
    type=click.IntRange(1, 128),
    default=4,
    show_default=True,
    help="Images per denoiser call.",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(0, 1024),
    default=0,
    show_default=True,
    help="Columns for LoRAs.",
)
@_of_parts
def estimate(*, model: str, gpu: str | None, dtype: str, sizes: str | None, **options: Any) -> None:
    """Estimate the GPU memory of MODEL's TensorRT engines from its configs and the headers of its weight files.

    MODEL is a hub id, which is downloaded if it is not yet there, a folder, or a single file, which is converted into
    the cache. Needs no GPU.
    """
    try:
        limits = {name: options.pop(name) for name in ("max_batch_size", "lora_rank")}
        request = ExportRequest(model=model, output=Path(), single_files=_single_files(options), **options)
        question = Question(
            checkpoint=open_request(request, functools.partial(_notify, model)),
            dtype=_DTYPES[dtype],
            sizes=() if sizes is None else read_sizes(sizes),
            gpu=None if gpu is None else read_memory(gpu),
            **limits,
        )
        given = answer(question)
    except ExportError as error:
        _fail(str(error), error.exit_code if error.exit_code != 1 else 2)
    except OSError as error:
        _fail(f"{error.filename or model}: {error.strerror or error}", 2)
    for line in given.lines:
        click.echo(line)
    raise SystemExit(0 if given.fits else 1)


def _single_files(options: dict[str, Any]) -> SingleFileOptions:
    """Takes those of single files out of the options."""
    cache_dir = options.pop("cache_dir") or default_cache_dir()
    return SingleFileOptions(cache_dir=cache_dir, prediction_type=options.pop("prediction_type"))


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"hypergen: {message}", err=True)
    raise SystemExit(exit_code)


def _summary(result: ExportResult) -> str:
    parts = {"exported": result.converted, "reused": result.reused}
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts.items() if names) or "up to date"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into InterruptedExportError, so that the block cleans up."""
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # a second signal must not interrupt the clean-up
            # Not an Exception: handlers on the way would report it as a failed conversion.
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedExportError(received[0] if received else signal.SIGINT) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
