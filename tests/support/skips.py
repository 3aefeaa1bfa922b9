"""Why tests were skipped: one line for each reason, with how many, as dozens may miss one program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest


class SkipsTable:
    """A plugin that ends the run's output with the reasons."""

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print them, the most frequent first."""
        for line in lines_of(terminalreporter.stats.get("skipped", [])):
            terminalreporter.write_line(line)


def lines_of(reports: Iterable[pytest.TestReport | pytest.CollectReport]) -> list[str]:
    """A line for each reason."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in reports
    )
    return [f"{count} skipped: {reason}" for reason, count in reasons.most_common()]
