"""diffusers, imported without what sampling does not need. Other modules import it from here."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def _import_diffusers() -> Any:
    """Import diffusers without torch's compiler, which it imports only to exclude functions from compilation.

    Nothing is compiled here. This makes each start a second faster on one core.
    """
    compiler = "torch._dynamo"
    if compiler in sys.modules:
        return importlib.import_module("diffusers")
    sys.modules[compiler] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        return importlib.import_module("diffusers")
    finally:
        del sys.modules[compiler]


diffusers = _import_diffusers()
