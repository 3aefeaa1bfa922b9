"""Findings for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import click

from hypergen_gateway.conformance.rules import RESULTS, Finding, Result

_COLOURS: dict[Result, str] = {"pass": "green", "fail": "red", "not offered": "yellow", "not tried": "blue"}
_WIDTH = max(len(result) for result in RESULTS)


def line(finding: Finding) -> str:
    """One finding as a terminal shows it, what was seen below the rule."""
    result = click.style(finding.result.ljust(_WIDTH), fg=_COLOURS[finding.result])
    return f"  {result}  {_text(finding)}\n{' ' * (_WIDTH + 4)}{click.style(finding.seen, dim=True)}"


def summary(findings: Sequence[Finding]) -> str:
    """How many rules passed, failed and were left."""
    counts = Counter(finding.result for finding in findings)
    own = sum(finding.result == "fail" and finding.rule.extension for finding in findings)
    words = ", ".join(f"{counts[result]} {result}" for result in RESULTS if counts[result])
    return f"{len(findings)} rules: {words}" + (f" ({own} of the failures are about extensions)" if own else "")


def to_json(by_server: Mapping[str, Sequence[Finding]]) -> str:
    """Everything that was found."""
    report = [
        {
            "url": url,
            "counts": Counter(finding.result for finding in findings),
            "rules": [
                {
                    "area": finding.rule.area,
                    "rule": finding.rule.text,
                    "extension": finding.rule.extension,
                    "result": finding.result,
                    "seen": finding.seen,
                }
                for finding in findings
            ],
        }
        for url, findings in by_server.items()
    ]
    return json.dumps(report, ensure_ascii=False, indent=2)


def to_markdown(by_server: Mapping[str, Sequence[Finding]]) -> str:
    """A table with a column for each server."""
    rows = [f"| | rule | {' | '.join(by_server)} |", f"|---|---|{'---|' * len(by_server)}"]
    for same in zip(*by_server.values(), strict=True):
        results = " | ".join(finding.result for finding in same)
        rows.append(f"| {same[0].rule.area} | {_text(same[0])} | {results} |")
    totals = [Counter(finding.result for finding in findings) for findings in by_server.values()]
    for result in RESULTS:
        rows.append(f"| | **{result}** | {' | '.join(str(total[result]) for total in totals)} |")
    return "\n".join(rows)


def _text(finding: Finding) -> str:
    return f"{finding.rule.text} (extension)" if finding.rule.extension else finding.rule.text
