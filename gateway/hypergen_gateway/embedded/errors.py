"""What can go wrong with the embedded Triton, each said in one line that tells what to do."""


class EmbeddedError(Exception):
    """The embedded Triton cannot be had; `str()` is the line for the user."""


class ModelsNotLoadedError(EmbeddedError):
    """Triton gave up its start, as one of the models could not be loaded."""
