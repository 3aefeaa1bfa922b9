"""`python -m hypergen_export MODEL --output DIR`: `hypergen export` without the gateway."""

import os
import sys

if __name__ == "__main__":
    # `python -m` looks for modules in the current folder first. It may be a checkpoint, whose files are not to be run.
    if sys.path[0] == os.getcwd():  # noqa: PTH109 - pathlib could come from there
        del sys.path[0]
    from hypergen_export.cli import export

    export(prog_name="python -m hypergen_export")
