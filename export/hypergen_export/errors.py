"""Errors of an export. A message is one line that a user can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ExportError(Exception):
    """Base of all errors that an export reports; `exit_code` is the command's."""

    exit_code = 1


class BadOptionError(ExportError):
    """Options that contradict each other or do not fit the model."""


class NoGpuError(ExportError):
    """TensorRT engines are built on a GPU, and this machine has none."""


class UnknownModelError(ExportError):
    """Neither a folder nor a model on the hub."""


class NotADiffusersPipelineError(ExportError):
    """The folder or hub repository exists but is not in diffusers' layout."""


class UnsupportedModelError(ExportError):
    """A pipeline of an unsupported family, or with an unsupported component."""


class BrokenCheckpointError(ExportError):
    """Files of the checkpoint are missing or cannot be read."""


class BadLoraError(ExportError):
    """A LoRA that is missing, unreadable, or made for another model."""


class BadEmbeddingError(ExportError):
    """A textual inversion that is missing, unreadable, or made for another model."""


class OutputRefusedError(ExportError):
    """The output folder cannot be written, or holds something else."""


class NoSpaceError(OutputRefusedError):
    """Not enough disk space for the repository."""


class ConversionError(ExportError):
    """torch or the engine could not convert a component."""


class ParityMissedError(ExportError):
    """An exported component's outputs differ from torch's."""


class PassportRefusedError(ExportError):
    """An export's images are too far from those in float32, or could not be compared with them."""


class MissingDependencyError(ExportError):
    """A package that the export needs is not installed."""


class InterruptedExportError(ExportError):
    """SIGINT or SIGTERM was received; the exit code is the shell's for that signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("export interrupted; nothing was written")
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first non-empty line of a library's error, to be quoted in one of ours."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]


@contextlib.contextmanager
def requires_export_extra() -> Iterator[None]:
    """Within it, a package that is missing is a MissingDependencyError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed; an export needs: pip install 'hypergen-triton[export]'"
        ) from error
