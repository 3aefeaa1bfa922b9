from __future__ import annotations

import contextlib
import re

import pytest

from hypergen_export.conversion.progress import Progress


def test_a_log_has_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(Progress(2)) as progress:
        with progress.stage("unet: load"):
            pass
        with progress.stage("unet: build") as report:
            for share in range(100):
                report(share / 100)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+\.\d", "N", line) for line in lines] == ["unet: load: N s", "unet: build: N s"]
