"""The passport of an export, measured by `hypergen passport` in a process of its own before the export is in place."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hypergen_export.errors import PassportRefusedError

# `python -m hypergen_gateway` without the current folder, which Python would search for modules first.
_COMMAND = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "import runpy; runpy.run_module('hypergen_gateway', run_name='__main__', alter_sys=True)"
)
# Time to stop Triton and to remove its files.
_STOP_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class PassportMeasurement:
    """How to measure: with which prompts, and which mean PSNR in dB an export must reach."""

    cache_dir: Path
    prompts: Path | None = None
    min_psnr: float | None = None

    def __call__(self, repository: Path) -> None:
        """Measure a repository, unless it was measured with its own prompts and is to be measured with these again.

        Raises PassportRefusedError, after the command has said on stderr why.
        """
        command = [sys.executable, "-c", _COMMAND, "passport", str(repository), "--cache-dir", str(self.cache_dir)]
        if self.prompts is not None:
            command += ["--measure", "--prompts", str(self.prompts)]
        elif not (repository / "passport.json").exists():
            command += ["--measure"]
        command += [] if self.min_psnr is None else ["--min-psnr", str(self.min_psnr)]
        # Options of the export, which are not options of what it has written.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HYPERGEN_")}
        with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr) as process:
            try:
                exit_code = process.wait()
            except BaseException:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
                process.kill()
                raise
        if exit_code:
            raise PassportRefusedError("the passport was refused or not measured: see the error above")
