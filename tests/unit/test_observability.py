"""Dashboards, alert rules and the metrics page ask for metrics that exist; the rules fire when they should."""

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
OF_PROMETHEUS = {"up"}
WORDS = {"and", "or", "unless", "bool"}

spec = importlib.util.spec_from_file_location("metrics_table", ROOT / "docs" / "metrics_table.py")
assert spec and spec.loader
metrics_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(metrics_table)


def existing() -> set[str]:
    metrics = [metric for service in metrics_table.MODULES for metric in metrics_table.metrics_of(service)]
    return {name for metric in metrics for name in metrics_table.sample_names(metric)} | OF_PROMETHEUS


def alert_rules() -> list[dict]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL)"""
    for rule in alert_rules():
        yield rule["alert"], rule["expr"]
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{file.name}: {panel['title']}", target["expr"]


def metrics_in(query: str) -> set[str]:
    """Names that are neither a function, a label, a duration nor a word of the language."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", query)
    names = set(re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w|\s*\()", bare))
    return names - WORDS


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ('sum by (le) (rate(a_bucket{x="y_total"}[5m])) / b', {"a_bucket", "b"}),
        ("max(a) < 0 or absent(b) and c > 1e3", {"a", "b", "c"}),
    ],
)
def test_the_names_of_metrics_are_found_in_a_query(query: str, names: set[str]) -> None:
    assert metrics_in(query) == names


def test_every_query_asks_for_metrics_that_exist() -> None:
    known = existing()
    asked = {where: metrics_in(query) for where, query in queries()}
    assert {where: names - known for where, names in asked.items() if names - known} == {}
    assert all(asked.values())


def test_the_page_of_metrics_is_current() -> None:
    assert metrics_table.PAGE.read_text() == metrics_table.page(), "run `python docs/metrics_table.py`"


def test_every_alert_says_what_to_do_and_is_tested_firing() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts.test.yaml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    fired = {check["alertname"] for check in checks if check["exp_alerts"]}
    rules = alert_rules()
    assert fired == {rule["alert"] for rule in rules}
    assert [rule["alert"] for rule in rules if not rule["annotations"].get("action")] == []


def test_what_prometheus_asks_for_is_what_the_services_offer() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    reward = services["reward"]["command"]
    offered = {
        "trainer": services["trainer"]["environment"]["RETORT_TRAINER__METRICS_PORT"],
        "rollout": services["rollout"]["environment"]["RETORT_ROLLOUT__PORT"],
        "reward": reward[reward.index("--http-port") + 1],
    }
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())["scrape_configs"]
    targets = [(job["job_name"], *job["dns_sd_configs"]) for job in jobs]
    assert {name: str(target["port"]) for name, target in targets} == offered
    assert all(target["names"] == [name] for name, target in targets)


def promtool(*arguments: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    command = ["promtool", *arguments]
    ran = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_promtool_accepts_the_configuration() -> None:
    assert promtool("check", "config", "--syntax-only", "prometheus.yaml", "host.yaml").count("SUCCESS") == 2
    assert f"{len(alert_rules())} rules found" in promtool("check", "rules", "alerts.yaml")


def test_the_alerts_fire_when_they_should_and_not_before() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts.test.yaml")


def test_promtool_reads_the_queries_of_the_dashboards(tmp_path: Path) -> None:
    rules = [{"record": f"query_{i}", "expr": query} for i, (_, query) in enumerate(queries())]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))
