"""A table of the container images: size, what ran in each and for how long.

Tests record rows with the fixture `ran`; `pytest --images` runs those tests and prints the table, in Markdown.
"""

from __future__ import annotations

import pytest

HEAD = ("| image | what ran | result | seconds |", "|---|---|---|---|")


class ImagesTable:
    """The plugin behind `--images`."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take down what a test recorded."""
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "image"]  # type: ignore[misc]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table."""
        terminalreporter.section("images")
        for line in (*HEAD, *(f"| {' | '.join(row)} |" for row in self.rows)):
            terminalreporter.write_line(line)
