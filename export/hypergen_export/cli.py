"""The command `export`: options in, one clear line and an exit code out.

The gateway's command line loads this module; it imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from hypergen_export.checkpoints.lora import read_loras
from hypergen_export.engines.engine import ENGINES, read_sizes
from hypergen_export.errors import ExportError, InterruptedExportError
from hypergen_export.repository.export import ExportRequest, Outcome
from hypergen_export.repository.export import export as build

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


def _not_empty(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuses what a shell makes of a variable that is not set, as in --output "$FOLDER"."""
    if any(each in ("", Path()) for each in (value if isinstance(value, tuple) else (value,))):
        raise click.BadParameter("it is empty.", param=parameter)
    return value


@click.command(short_help="Export a checkpoint to a Triton model repository.")
@click.argument("model", callback=_not_empty)
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="openvino",
    show_default=True,
    help="openvino for a CPU; tensorrt for the GPU of this machine, in the TensorRT release that is installed here.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    default="float32",
    show_default=True,
    help="What the engine computes in: float16 is TensorRT's alone.",
)
@click.option(
    "--sizes",
    metavar="WxH,…",
    help="Pictures that TensorRT engines are built for; OpenVINO draws any.  [default: the model's own size]",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(1, 128),
    default=8,
    show_default=True,
    help="Images per UNet call; with guidance an image takes two rows of it.",
)
@click.option(
    "--lora",
    "loras",
    metavar="[NAME=]PATH[:SCALE]",
    multiple=True,
    callback=_not_empty,
    envvar="HYPERGEN_LORA",
    show_envvar=True,
    help="A LoRA (.safetensors, or a folder that holds it) to serve beside MODEL, merged at this scale; repeatable.",
)
@click.option(
    "--deep-cache",
    is_flag=True,
    envvar="HYPERGEN_DEEP_CACHE",
    show_envvar=True,
    help="Export a second, shallow UNet, for requests with cache_interval.",
)
@click.option("--model-id", callback=_not_empty, help="The id that clients see.  [default: MODEL]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    callback=_not_empty,
    required=True,
    help="Folder of the Triton repository; an earlier export there is replaced.",
)
def export(*, model: str, output: Path, dtype: str, sizes: str | None, loras: tuple[str, ...], **options: Any) -> None:
    """Export MODEL, a diffusers checkpoint's hub id or folder, to a Triton model repository.

    `hypergen/emoji` is the checkpoint that ships with the project.
    """
    began = time.monotonic()
    options["model_id"] = options["model_id"] or model
    try:
        asked = () if sizes is None else read_sizes(sizes)
        request = ExportRequest(
            model=model, output=output, dtype=_DTYPES[dtype], sizes=asked, loras=read_loras(loras), **options
        )
        with _interruptible():
            outcome = build(request, remark=lambda text: click.echo(f"{model}: {text}", err=True))
    except ExportError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:  # a checkpoint that may not be read, an installation with a file missing
        _fail(f"{error.filename or model}: {error.strerror or error}", 1)
    click.echo(f"{output}: {_summary(outcome)} ({time.monotonic() - began:.1f} s)", err=True)


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"hypergen: {message}", err=True)
    raise SystemExit(exit_code)


def _summary(outcome: Outcome) -> str:
    parts = {"exported": outcome.converted, "reused": outcome.reused}
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts.items() if names) or "up to date"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block in order, as InterruptedExportError."""
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # a second one must not interrupt the cleaning up
            # Not an Exception: no gate on the way may take it for a failed conversion.
            raise KeyboardInterrupt

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedExportError(received[0] if received else signal.SIGINT) from None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
