"""What a user sees of an export: a bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """Counts stages. On a terminal one bar, in a log one line per stage with its seconds."""

    def __init__(self, total: int) -> None:
        self._live = sys.stderr.isatty()
        self._bar = tqdm(total=total, disable=not self._live, unit="stage", file=sys.stderr, leave=False)
        self._began = time.monotonic()

    def stage(self, name: str) -> None:
        """`name` begins."""
        self._bar.set_description_str(name)
        if not self._live:
            tqdm.write(f"{time.monotonic() - self._began:6.1f} s  {name}", file=sys.stderr)

    def done(self) -> None:
        """The stage begun last is over."""
        self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
