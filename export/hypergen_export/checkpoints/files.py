"""Files that several folders share, by hard links."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def on_one_file_system(file: Path, folder: Path) -> bool:
    """Whether `file` can be linked into `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return file.stat().st_dev == existing.stat().st_dev


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` to `target`, or copy it if the file system has no hard links or is another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
