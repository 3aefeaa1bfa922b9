"""`python -m hypergen_gateway`: the `hypergen` command, for when it is not on PATH."""

import os
import sys

if __name__ == "__main__":
    # `python -m` looks for modules in the current folder first. It may be a checkpoint, whose files are not to be run.
    if sys.path[0] == os.getcwd():  # noqa: PTH109 - pathlib could come from there
        del sys.path[0]
    from hypergen_gateway.cli import main

    main(prog_name="python -m hypergen_gateway")
