"""`python docs/metrics_table.py`: write docs/metrics.md from the metrics that the services declare."""

import importlib
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from services.trainer.gauges import STEP_GAUGES

PAGE = Path(__file__).parent / "metrics.md"
MODULES = {
    "trainer": "services.trainer.gauges",
    "rollout": "services.rollout.metrics",
    "reward": "services.reward.metrics",
}
UNITS = ("tokens_per_second", "seconds", "tokens", "nats", "ratio", "versions", "version")
HEAD = """# Metrics

What the services tell Prometheus, made from their declarations by `python docs/metrics_table.py`; a test keeps it
current. The reference name is the one in `metrics.jsonl` ([algorithm.md](algorithm.md)), which is the reference run's
where that has one.

| service | where |
|---|---|
| trainer | `trainer.metrics_port` at `weight_sync.host`, on the first rank; off by default |
| rollout | `/metrics` of every rollout server |
| reward | `/metrics` of its HTTP port (`--http-port`) |
"""


def metrics_of(service: str) -> list[MetricWrapperBase]:
    """Every metric that the service declares, those of a step last."""
    module = importlib.import_module(MODULES[service])
    named = [value for value in vars(module).values() if isinstance(value, MetricWrapperBase)]
    return named + (list(STEP_GAUGES.values()) if service == "trainer" else [])


def sample_names(metric: MetricWrapperBase) -> list[str]:
    """The names under which Prometheus stores it."""
    (family,) = metric.describe()
    endings = [""]
    if isinstance(metric, Counter):
        endings = ["_total"]
    elif isinstance(metric, Histogram):
        endings = ["_bucket", "_sum", "_count"]
    return [family.name + ending for ending in endings]


def page() -> str:
    return "\n".join([HEAD, *(line for service in MODULES for line in _section(service))])


def _section(service: str) -> Iterator[str]:
    reference = {id(gauge): name for name, gauge in STEP_GAUGES.items()}
    yield f"## {service}\n"
    yield "| metric | kind | unit | meaning | reference name |"
    yield "|---|---|---|---|---|"
    for metric in metrics_of(service):
        (family,) = metric.describe()
        name = family.name if isinstance(metric, Histogram) else sample_names(metric)[0]
        labels = ", ".join(metric._labelnames)  # prometheus_client has no public way to ask
        shown = f"`{name}{{{labels}}}`" if labels else f"`{name}`"
        alias = f"`{reference[id(metric)]}`" if id(metric) in reference else ""
        yield f"| {shown} | {family.type} | {_unit(family.name)} | {family.documentation} | {alias} |"
    yield ""


def _unit(name: str) -> str:
    return next((unit.replace("_", " ") for unit in UNITS if name.endswith(unit)), "number")


if __name__ == "__main__":
    PAGE.write_text(page())
