"""Prometheus and Grafana: what they are given is valid, and speaks of one another. Whether Triton has the metrics that
the dashboard asks for is seen on a running one, in tests/end_to_end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, in_memory

from .conftest import DOCKER, run_tool

pytestmark = pytest.mark.claim("rules")

FOLDER = DOCKER / "observability"
HISTORIES = {"rules.yaml": "alerts.yaml", "gateway-rules.yaml": "gateway_alerts.yaml"}
DASHBOARDS = ["triton.json", "gateway.json"]
SERVICES: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def load(path: str) -> Any:
    return yaml.safe_load((FOLDER / path).read_text())


def test_promtool_accepts_the_configuration() -> None:
    judged = run_tool("promtool", "check", "config", FOLDER / "prometheus.yaml")
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_prometheus_finds_its_rules_beside_its_configuration() -> None:
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    folder = Path(mounts["./observability/prometheus.yaml"]).parent
    assert set(load("prometheus.yaml")["rule_files"]) == set(HISTORIES)
    assert all(Path(mounts[f"./observability/{rules}"]) == folder / rules for rules in HISTORIES)


@pytest.mark.parametrize("rules", HISTORIES)
def test_each_alert_fires_when_it_should_and_then_alone(rules: str) -> None:
    histories = Path(__file__).with_name(HISTORIES[rules])
    judged = run_tool("promtool", "test", "rules", histories)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    alerts = {rule["alert"] for group in load(rules)["groups"] for rule in group["rules"]}
    expected = [case for test in yaml.safe_load(histories.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in expected if "exp_alerts" in case} == alerts
    assert {case["alertname"] for case in expected if "exp_alerts" not in case} == alerts


def test_prometheus_scrapes_the_services_that_have_metrics() -> None:
    targets = {job["job_name"]: job["static_configs"] for job in load("prometheus.yaml")["scrape_configs"]}
    assert targets == {"triton": [{"targets": ["triton:8002"]}], "gateway": [{"targets": ["gateway:8000"]}]}
    assert SERVICES["prometheus"]["networks"] == SERVICES["triton"]["networks"]
    assert set(SERVICES["prometheus"]["networks"]) <= set(SERVICES["gateway"]["networks"])
    assert "8002" in (DOCKER / "triton.Dockerfile").read_text().partition("EXPOSE")[2].splitlines()[0]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafana_is_given_its_source_and_its_dashboards(name: str) -> None:
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load("grafana/provisioning/dashboards/files.yaml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./observability/grafana/dashboards"] == provider["options"]["path"]
    dashboard = json.loads((FOLDER / "grafana/dashboards" / name).read_text())
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].endswith("/triton.json")
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}


@pytest.mark.parametrize(("name", "panels"), [("triton.json", 10), ("gateway.json", 12)])
def test_the_panels_lie_beside_one_another(name: str, panels: int) -> None:
    dashboard = json.loads((FOLDER / "grafana/dashboards" / name).read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == panels
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])


async def test_the_gateway_has_every_metric_and_label_that_its_dashboard_and_rules_ask_for() -> None:
    dashboard = json.loads((FOLDER / "grafana/dashboards/gateway.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [rule["expr"] for group in load("gateway-rules.yaml")["groups"] for rule in group["rules"]]
    backend = FakeBackend()
    async with in_memory(create_app(Config(max_queue_size=0), backend)) as client:
        for body in ({"stream": True, "partial_images": 1}, {}):
            await client.post("/v1/images/generations", json={"prompt": "a fox"} | body)
        exposed = (await client.get("/metrics")).text
    names = set(re.findall(r"hypergen_gateway_\w+|process_\w+", " ".join(asked)))
    assert len(names) >= 12
    assert all(re.search(rf"^{name}[{{ ]", exposed, re.MULTILINE) for name in names)
    labels = {label for words in re.findall(r"by \(([\w, ]+)\)", " ".join(asked)) for label in words.split(", ")}
    assert labels - {"instance"} <= set(re.findall(r"[{,](\w+)=\"", exposed))
