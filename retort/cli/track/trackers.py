"""The trackers: each takes the lines of metrics.jsonl in the terms of its own package, which is imported here only."""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from retort.cli.track.otel import OpenTelemetry
from retort.config import MissingDependencyError, RunConfig, TrackerName
from retort.metrics_file import Metrics

PROJECT = "retort"
"""What runs stand under, where the tracker's own environment variables do not say otherwise."""


class Tracker(Protocol):
    """Takes a run's metrics, lines in the order in which they were written."""

    def log(self, step: int, line: Metrics) -> None:
        """Take a line. Weights & Biases and trackio hand it over a moment later."""

    def close(self) -> None:
        """Hand over what is still on its way."""


def check_installed(name: TrackerName) -> None:
    """Raises MissingDependencyError, which says what to install."""
    module = "opentelemetry.exporter.otlp.proto.http" if name == "otel" else name
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # a part of its path is not there
        found = None
    if found is None:
        raise MissingDependencyError(f"tracker {name}: not installed. Run `pip install 'retort[{name}]'`.")


class Wandb:
    """Weights & Biases. WANDB_MODE=offline writes files for `wandb sync`; WANDB_PROJECT and its like hold."""

    def __init__(self, config: RunConfig) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=config.key_prefix,
            name=config.key_prefix,
            dir=_directory(config),
            config=_settings(config),
            resume="allow",
        )
        # An axis of our own: the validation of a step may come after the next step.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, line: Metrics) -> None:
        self._run.log(_measured(line) | {"step": step})

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the run directory; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, config: RunConfig) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(_directory(config) / "tensorboard"))

    def log(self, step: int, line: Metrics) -> None:
        for name, value in _measured(line).items():
            self._writer.add_scalar(name, value, step, wall_time=line.get("time"))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """The server of MLFLOW_TRACKING_URI, else a database in the run directory; MLFLOW_EXPERIMENT_NAME holds."""

    def __init__(self, config: RunConfig) -> None:
        from mlflow import MlflowClient

        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_directory(config).resolve()}/mlflow.db"
        self._client = MlflowClient(tracking_uri=address)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        known = self._client.search_runs([number], f"attributes.run_name = '{config.key_prefix}'", max_results=1)
        self._run = known[0].info.run_id if known else self._new_run(config, number)
        self._client.update_run(self._run, status="RUNNING")

    def _new_run(self, config: RunConfig, experiment: str) -> str:
        from mlflow.entities import Param

        run: str = self._client.create_run(experiment, run_name=config.key_prefix).info.run_id
        params = [
            Param(f"{table}.{key}" if key else table, str(value))
            for table, values in _settings(config).items()
            for key, value in (values if isinstance(values, dict) else {"": values}).items()
        ]
        self._client.log_batch(run, params=params)  # at once: up to 100 may go together, and a run file has fewer keys
        return run

    def log(self, step: int, line: Metrics) -> None:
        from mlflow.entities import Metric

        at = round(1000 * line.get("time", 0.0))
        # MLflow refuses "@" in a name.
        values = [Metric(name.replace("@", "_at_"), value, at, step) for name, value in _measured(line).items()]
        self._client.log_batch(self._run, metrics=values)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """trackio's own database, wherever TRACKIO_DIR and its other variables say."""

    def __init__(self, config: RunConfig) -> None:
        import trackio

        name = config.key_prefix
        self._run = trackio.init(PROJECT, name=name, config=_settings(config), resume="allow", embed=False)

    def log(self, step: int, line: Metrics) -> None:
        self._run.log(_measured(line), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[TrackerName, Callable[[RunConfig], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "trackio": Trackio,
    "otel": OpenTelemetry,
}
"""How each is opened for a run; one that knows the run already goes on with it."""


def _directory(config: RunConfig) -> Path:
    return config.directory / "trackers"


def _settings(config: RunConfig) -> dict[str, Any]:
    """The configuration, without the table that may hold a password."""
    return config.model_dump(mode="json", exclude={"redis"}, exclude_none=True)


def _measured(line: Metrics) -> Metrics:
    return {name: value for name, value in line.items() if name not in ("step", "time")}
