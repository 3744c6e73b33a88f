"""What a published run reports: a few metrics at a few steps, in a file under reference/."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, ValidationError

from retort.config import Config, ConfigError


class Band(Config):
    """Where the final value of a metric has to lie."""

    metric: str
    low: float
    high: float


class Published(Config):
    """The numbers of a model card, under the metric names that a run logs."""

    title: str
    source: str
    """Where they stand."""
    steps: PositiveInt
    """Length of the run."""
    sciknoweval_domain: str = ""
    """Trained on these questions, as `retort prepare sciknoweval` makes them. Empty: on others."""
    metrics: list[dict[str, float]] = Field(alias="measured", min_length=1)
    """One mapping for each step that something is known of, ascending, with the key `step`."""
    bands: list[Band] = Field(alias="band", default=[])


def read_published(path: Path) -> Published:
    """Raises ConfigError, naming file and key, when this is not the description of a published run."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        published = Published.model_validate(values)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the published run: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(f"{path}: not the description of a published run. {'; '.join(problems)}.") from None
    steps = [line.get("step", 0.0) for line in published.metrics]
    if steps != sorted(set(steps)) or steps[0] <= 0:
        raise ConfigError(f"{path}: every [[measured]] needs a `step`, and steps ascend; found {steps}.")
    return published
