"""`python -m hypergen_export MODEL --output DIR`: `hypergen export` without the gateway."""

from hypergen_export.cli import export

if __name__ == "__main__":
    export(prog_name="python -m hypergen_export")
