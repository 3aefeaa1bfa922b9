"""The arithmetic of the benchmarks' figures, and the files of their results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.figures import Figures, Pairs, Results, latency_figures, percentile, rate_figures
from benchmarks.report import BARS, bars_table, write_report


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 0.95, 3.0), ([4, 1, 3, 2], 0.5, 2), (range(1, 101), 0.95, 95), (range(1, 21), 0.95, 19)],
)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


def test_a_comparison_is_the_median_of_its_pairs_and_not_the_ratio_of_medians() -> None:
    # The machine was busy for the second pair; both sides met that.
    pairs = Pairs(ours=[1.0, 10.0, 1.0], theirs=[4.0, 40.0, 5.0])
    figures = latency_figures("peer_over_ours", "peer", pairs)
    assert figures["peer_over_ours"] == 4.0
    assert (figures["peer_over_ours_lowest"], figures["peer_over_ours_highest"]) == (4.0, 5.0)
    assert (figures["peer_over_ours_ours_median_ms"], figures["peer_over_ours_peer_p95_ms"]) == (1000.0, 40000.0)


def test_rates_compare_the_other_way_round() -> None:
    figures = rate_figures("ours_over_peer", "peer", Pairs(ours=[6.0, 8.0], theirs=[2.0, 2.0]))
    assert figures["ours_over_peer"] == 3.5
    assert figures["ours_over_peer_ours_per_second"] == 7.0


def test_the_book_is_one_flat_object_that_later_runs_complete(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    Results(file).enter({"one_over_ours": 2.0})
    Results(file).fail("two_over_ours", "it does not start")
    assert json.loads(file.read_text()) == {"one_over_ours": 2.0, "two_over_ours_failed": "it does not start"}


def test_a_failure_takes_the_place_of_an_earlier_figure_and_a_figure_that_of_a_failure(tmp_path: Path) -> None:
    results = Results(tmp_path / "bench.json")
    results.enter({"one_over_ours": 2.0, "one_over_ours_pairs": 3, "one": 1})
    results.fail("one_over_ours", "it ended")
    assert results.figures == {"one": 1, "one_over_ours_failed": "it ended"}
    results.enter({"one_over_ours": 2.5})
    assert results.figures == {"one": 1, "one_over_ours": 2.5}


def test_every_bar_is_met_missed_or_says_why_it_was_not_measured() -> None:
    met, missed, failed, less_is_better = BARS[0], BARS[2], BARS[3], BARS[-1]
    figures: Figures = {
        met.name: 0.9,
        missed.name: 1.0,
        f"{failed.name}_failed": "it took\ntoo long",
        less_is_better.name: 2.5,
    }
    rows = dict(zip((bar.name for bar in BARS), bars_table(figures).splitlines()[2:], strict=True))
    assert rows[met.name].endswith("| met |")
    assert rows[missed.name].endswith("| **missed** |")
    assert rows[failed.name].endswith("| it took too long |")
    assert rows[less_is_better.name].endswith("| met |")
    assert rows[BARS[1].name].endswith("| not measured |")


def test_a_report_can_be_made_of_a_book_with_hardly_anything_in_it(tmp_path: Path) -> None:
    report = write_report(tmp_path, {BARS[0].name: 0.9})
    assert "| 0.9 |" in report.read_text()
    assert list(tmp_path.iterdir()) == [report]
