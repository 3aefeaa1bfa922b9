"""A summary of skipped tests by reason. In CI, which has every program but no GPU, a skip is a failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable

import pytest


class SkipsFail:
    """A plugin for CI: a skip fails the test, unless the test is marked `gpu`."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Turn a skip of a test into a failure."""
        report = yield
        if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
            report.outcome, report.longrepr = "failed", f"Skipped in CI: {reason_of(report)}"
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Turn a skip of a whole module into a failure."""
        report = yield
        if report.skipped:
            report.outcome, report.longrepr = "failed", f"Skipped in CI: {reason_of(report)}"
        return report


class SkipsTable:
    """A plugin that ends the run's output with the reasons."""

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print them, the most frequent first."""
        for line in lines_of(terminalreporter.stats.get("skipped", [])):
            terminalreporter.write_line(line)


def lines_of(reports: Iterable[pytest.TestReport | pytest.CollectReport]) -> list[str]:
    """A line for each reason."""
    reasons = Counter(map(reason_of, reports))
    return [f"{count} skipped: {reason}" for reason, count in reasons.most_common()]


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test or a module was skipped."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
