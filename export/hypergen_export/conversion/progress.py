"""Progress of an export: a bar on a terminal, otherwise a line per stage."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

# Seconds between log lines of a stage, so that a stage of several minutes shows progress.
_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts stages. On a terminal one bar; in a log one line per stage with its duration."""

    def __init__(self, total: int) -> None:
        self._live = sys.stderr.isatty()
        self._bar = tqdm(total=total, disable=not self._live, unit="stage", file=sys.stderr, leave=False)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        """Run the block as one stage; yields a callback for the fraction of it that is done, 0 to 1."""
        self._bar.set_description_str(name)
        began = time.monotonic()
        yield self._reporter(name)
        self._bar.update()
        if not self._live:
            tqdm.write(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)

    def close(self) -> None:
        """Remove the bar from the screen."""
        self._bar.close()

    def _reporter(self, name: str) -> Callable[[float], None]:
        """A callback that shows every per cent on a terminal, and a line every 30 s in a log."""
        shown, when = name, time.monotonic()

        def report(share: float) -> None:
            nonlocal shown, when
            text = f"{name} {share:.0%}"
            if self._live and text != shown:
                self._bar.set_description_str(text)
                shown = text
            if not self._live and time.monotonic() > when + _SECONDS_BETWEEN_LINES:
                tqdm.write(text, file=sys.stderr)
                when = time.monotonic()

        return report
