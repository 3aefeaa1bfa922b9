"""What uploads into the folder of LoRA files leave behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hypergen_gateway.storage.lora_files import LoraFiles

# Begins to save a file whose content never ends, and waits there.
_UPLOAD = """
import sys, time
from pathlib import Path
from hypergen_gateway.storage.lora_files import LoraFiles
class Endless:
    begun = False
    def seek(self, _): pass
    def read(self, size):
        if self.begun:
            print("begun", flush=True)
            time.sleep(60)
        self.begun = True
        return bytes(1 << 20)
LoraFiles(Path(sys.argv[1])).save("ink", Endless())
"""

_CLEAN = """
import sys
from pathlib import Path
from hypergen_gateway.storage.lora_files import LoraFiles
LoraFiles(Path(sys.argv[1])).remove_abandoned()
"""


def test_what_a_killed_process_left_is_removed_and_a_running_upload_is_not(tmp_path: Path) -> None:
    LoraFiles(tmp_path).save("clay", io.BytesIO(b"clay"))
    with subprocess.Popen([sys.executable, "-c", _UPLOAD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        (upload,) = tmp_path.glob(".upload-*")
        make_old(upload)
        LoraFiles(tmp_path).remove_abandoned()
        assert upload.exists()
        process.send_signal(signal.SIGKILL)
    assert upload.stat().st_size > 0
    LoraFiles(tmp_path).remove_abandoned()
    assert [file.name for file in tmp_path.iterdir()] == ["clay.safetensors"]


def test_one_that_has_just_begun_stays(tmp_path: Path) -> None:
    (tmp_path / ".upload-abc").touch()
    LoraFiles(tmp_path).remove_abandoned()
    assert (tmp_path / ".upload-abc").exists()


def test_a_pipe_does_not_stop_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".upload-abc")
    make_old(tmp_path / ".upload-abc")
    subprocess.run([sys.executable, "-c", _CLEAN, str(tmp_path)], check=True, timeout=30)
    assert (tmp_path / ".upload-abc").exists()


def test_an_upload_is_in_place_before_its_lock_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever cleans up while a file is put in place must find it locked."""
    replace = Path.replace

    def clean_up_first(path: Path, target: Path) -> Path:
        make_old(path)
        LoraFiles(tmp_path).remove_abandoned()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", clean_up_first)
    LoraFiles(tmp_path).save("ink", io.BytesIO(b"ink"))
    assert (tmp_path / "ink.safetensors").read_bytes() == b"ink"


def make_old(file: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(file, (an_hour_ago, an_hour_ago))
