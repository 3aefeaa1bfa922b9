"""`python -m hypergen_gateway`: the `hypergen` command, for when it is not on PATH."""

from hypergen_gateway.cli import main

if __name__ == "__main__":
    main(prog_name="python -m hypergen_gateway")
