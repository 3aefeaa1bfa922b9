"""What a user sees of an export: a bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    """Counts stages. On a terminal one bar; in a log one line per stage with the seconds that it took."""

    def __init__(self, total: int) -> None:
        self._live = sys.stderr.isatty()
        self._bar = tqdm(total=total, disable=not self._live, unit="stage", file=sys.stderr, leave=False)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One of the stages, for as long as the block lasts."""
        self._bar.set_description_str(name)
        began = time.monotonic()
        yield
        self._bar.update()
        if not self._live:
            tqdm.write(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()
