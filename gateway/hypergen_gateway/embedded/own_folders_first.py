"""Run by the interpreters of Triton's Python backend as they start: they search the folders of their own model first.

Triton imports a model's file as `1.model`, and that of a backend as `model`, from folders that it appends to
`sys.path`. A module of such a name in any folder of packages, as in one of PYTHONPATH, would take its place.
"""

import sys
from pathlib import Path

# The first argument is the model's file, the last one the folder of its backend, or DEFAULT if the file is Python.
_arguments = Path("/proc/self/cmdline").read_text().rstrip("\0").split("\0")[1:]
_file, _backend = Path(_arguments[0]), Path(_arguments[-1])
sys.path[:0] = map(str, [_backend] if _backend.is_absolute() else [_file.parent, _file.parents[1]])
