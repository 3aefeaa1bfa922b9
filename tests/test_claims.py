"""The table of claims with failed, skipped and missing tests."""

from __future__ import annotations

from typing import Literal

import pytest

from support.claims import CLAIMS, FAMILIES, ClaimsTable, families_of
from support.miniature import FAMILIES as MINIATURES_WITH_A_UNET
from support.transformer_miniatures import MINIATURES


def report(
    claim: str, outcome: Literal["passed", "failed", "skipped"], when: Literal["setup", "call", "teardown"] = "call"
) -> pytest.TestReport:
    reason = ("tests/x.py", 7, "Skipped: no helm") if outcome == "skipped" else None
    return pytest.TestReport(
        "tests/x.py::test_x", ("tests/x.py", 6, "test_x"), {}, outcome, reason, when, user_properties=[("claim", claim)]
    )


@pytest.fixture
def table() -> ClaimsTable:
    """Every claim has a test that has passed."""
    made = ClaimsTable(with_images=True)
    for claim in CLAIMS:
        made.pytest_runtest_logreport(report(claim, "passed"))
    return made


def test_claims_hold_whose_tests_have_passed(table: ClaimsTable) -> None:
    table.pytest_runtest_logreport(report("chart", "passed", "teardown"))
    assert table.all_hold
    assert table.evidence["chart"].outcomes == {"passed": 1}


@pytest.mark.parametrize("when", ["setup", "call", "teardown"])
def test_a_claim_falls_with_one_of_its_tests(table: ClaimsTable, when: Literal["setup", "call", "teardown"]) -> None:
    table.pytest_runtest_logreport(report("chart", "failed", when))
    assert table.evidence["chart"].verdict == "FAIL"
    assert not table.all_hold


def test_a_claim_whose_test_was_skipped_is_not_proved_and_says_why(table: ClaimsTable) -> None:
    table.pytest_runtest_logreport(report("chart", "skipped", "setup"))
    assert table.evidence["chart"].verdict == "not proved"
    assert table.evidence["chart"].reasons == {"no helm"}
    assert not table.all_hold


def test_a_claim_without_a_test_is_not_proved() -> None:
    table = ClaimsTable()
    assert {evidence.verdict for evidence in table.evidence.values()} == {"not proved"}
    assert not table.all_hold


def test_every_family_has_a_claim_of_its_own() -> None:
    assert set(FAMILIES) == {*MINIATURES_WITH_A_UNET, *MINIATURES}


@pytest.mark.parametrize(("family", "claims"), [("sdxl", ["sdxl"]), ("none", [])])
def test_a_test_of_families_is_evidence_for_the_family_that_it_draws(
    family: str, claims: list[str], request: pytest.FixtureRequest
) -> None:
    assert families_of(request.node) == claims == ([family] if family in FAMILIES else [])


def test_only_who_builds_the_images_claims_that_they_are_built() -> None:
    assert "built" not in ClaimsTable().evidence
    assert ClaimsTable(with_images=True).evidence["built"].verdict == "not proved"
