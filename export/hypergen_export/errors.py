"""Everything that can go wrong in an export, as one tree. A message is one line that a user can act on."""

from __future__ import annotations


class ExportError(Exception):
    """Base of all errors that an export reports; `exit_code` is what the command ends with."""

    exit_code = 1


class BadOptionError(ExportError):
    """Options that do not go together, or not with this model."""


class NoGpuError(ExportError):
    """TensorRT builds on the GPU that will serve, and there is none."""


class UnknownModelError(ExportError):
    """Neither a folder nor a model that the hub could deliver."""


class NotADiffusersPipelineError(ExportError):
    """The folder or hub repository is there, but not in the layout of diffusers."""


class UnsupportedModelError(ExportError):
    """A pipeline of another family, or with a part this exporter has no row for."""


class BrokenCheckpointError(ExportError):
    """Files that the layout promises are missing or cannot be read."""


class BadLoraError(ExportError):
    """A LoRA that is missing, cannot be read, or is made for another model."""


class OutputRefusedError(ExportError):
    """The output folder may not or cannot be written."""


class NoSpaceError(OutputRefusedError):
    """The disk is too full for the repository."""


class ConversionError(ExportError):
    """torch or the engine could not convert a component."""


class ParityMissedError(ExportError):
    """An exported component does not compute what torch computes."""


class MissingDependencyError(ExportError):
    """A package that the export needs is not installed."""


class InterruptedExportError(ExportError):
    """Ctrl-C or SIGTERM arrived; the exit code is a shell's for that signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("export interrupted; nothing was written")
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of a foreign error that says something, for use inside one of ours."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]
