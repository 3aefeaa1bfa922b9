"""Errors of the embedded Triton; each message is one line that says what to do."""


class EmbeddedError(Exception):
    """The embedded Triton is not available; `str()` is the message for the user."""


class ModelsNotLoadedError(EmbeddedError):
    """Triton exited at start because a model could not be loaded."""


class TritonCrashedError(ModelsNotLoadedError):
    """Triton was ended by a signal at start."""
