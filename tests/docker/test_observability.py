"""Prometheus and Grafana: what they are given is valid, and speaks of one another. Whether Triton has the metrics that
the dashboard asks for is seen on a running one, in tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import DOCKER, run_tool

pytestmark = pytest.mark.claim("rules")

FOLDER = DOCKER / "observability"
ALERTS = Path(__file__).with_name("alerts.yaml")
SERVICES: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def load(path: str) -> Any:
    return yaml.safe_load((FOLDER / path).read_text())


def test_promtool_accepts_the_configuration() -> None:
    judged = run_tool("promtool", "check", "config", FOLDER / "prometheus.yaml")
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_prometheus_finds_its_rules_beside_its_configuration() -> None:
    (rules,) = load("prometheus.yaml")["rule_files"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    assert Path(mounts[f"./observability/{rules}"]) == Path(mounts["./observability/prometheus.yaml"]).with_name(rules)


def test_each_alert_rings_when_it_should_and_then_alone() -> None:
    judged = run_tool("promtool", "test", "rules", ALERTS)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    alerts = {rule["alert"] for group in load("rules.yaml")["groups"] for rule in group["rules"]}
    expected = [case for test in yaml.safe_load(ALERTS.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in expected if "exp_alerts" in case} == alerts
    assert {case["alertname"] for case in expected if "exp_alerts" not in case} == alerts


def test_prometheus_scrapes_the_service_that_has_metrics() -> None:
    targets = [target for job in load("prometheus.yaml")["scrape_configs"] for target in job["static_configs"]]
    assert targets == [{"targets": ["triton:8002"]}]
    assert SERVICES["prometheus"]["networks"] == SERVICES["triton"]["networks"]
    assert "8002" in (DOCKER / "triton.Dockerfile").read_text().partition("EXPOSE")[2].splitlines()[0]


def test_grafana_is_given_its_source_and_its_dashboards() -> None:
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load("grafana/provisioning/dashboards/files.yaml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./observability/grafana/dashboards"] == provider["options"]["path"]
    dashboard = json.loads((FOLDER / "grafana/dashboards/triton.json").read_text())
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].endswith("/triton.json")
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}


def test_the_panels_lie_beside_one_another() -> None:
    dashboard = json.loads((FOLDER / "grafana/dashboards/triton.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == 10
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])
