"""Output of findings as text, JSON or Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import click

from hypergen_gateway.conformance.rules import RESULTS, Finding, Result

_COLOURS: dict[Result, str] = {"pass": "green", "fail": "red", "not offered": "yellow", "not tested": "blue"}
_WIDTH = max(len(result) for result in RESULTS)


def line(finding: Finding) -> str:
    """A finding as text for a terminal, with the observation below the rule."""
    result = click.style(finding.result.ljust(_WIDTH), fg=_COLOURS[finding.result])
    return f"  {result}  {_text(finding)}\n{' ' * (_WIDTH + 4)}{click.style(finding.seen, dim=True)}"


def summary(findings: Sequence[Finding]) -> str:
    """Number of rules by result."""
    counts = Counter(finding.result for finding in findings)
    own = sum(finding.result == "fail" and finding.rule.extension for finding in findings)
    words = ", ".join(f"{counts[result]} {result}" for result in RESULTS if counts[result])
    return f"{len(findings)} rules: {words}" + (f" ({own} of the failures are extensions)" if own else "")


def to_json(by_server: Mapping[str, Sequence[Finding]]) -> str:
    """All findings as JSON."""
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
    """Two tables with a column per server: passed rules by area, and all rules."""
    areas = list(dict.fromkeys(finding.rule.area for findings in by_server.values() for finding in findings))
    columns = by_server.values()
    counts = [[area, *(_count(findings, area) for findings in columns)] for area in areas]
    total = ["**all**", *(_count(findings) for findings in columns)]
    rules = [
        [same[0].rule.area, _text(same[0]), *(finding.result for finding in same)]
        for same in zip(*columns, strict=True)
    ]
    return "\n\n".join(
        [
            _table(["passed rules", *by_server], [*counts, total]),
            _table(["", "rule", *by_server], rules),
        ]
    )


def _count(findings: Sequence[Finding], area: str | None = None) -> str:
    """Number of an area's rules that passed, are not offered, or could not be tested."""
    results = [finding.result for finding in findings if area in (None, finding.rule.area)]
    left = [f"{results.count(result)} {result}" for result in RESULTS[2:] if result in results]
    return f"{results.count('pass')} of {len(results)}" + (f" ({', '.join(left)})" if left else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(finding: Finding) -> str:
    return f"{finding.rule.text} (extension)" if finding.rule.extension else finding.rule.text
