"""A table of faults, their effects and the time until recovery, as observed by the fault tests.

Tests record observations with the fixture `seen`; `pytest --faults` prints the table at the end, in Markdown.
"""

from __future__ import annotations

import pytest

HEAD = ("| what breaks | what happens | back after |", "|---|---|---|")


class FaultsTable:
    """The plugin behind `--faults`."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take down what a test saw that passed."""
        if report.when == "call" and report.passed:
            self.rows += [value for name, value in report.user_properties if name == "fault"]  # type: ignore[misc]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table."""
        terminalreporter.section("faults")
        for line in (*HEAD, *(f"| {' | '.join(row)} |" for row in self.rows)):
            terminalreporter.write_line(line)
