"""Run directories and published runs for tests that read both and need no training."""

import json
from collections.abc import Sequence
from pathlib import Path

from retort.config import RunConfig, dump_config

AVG = "val-core/letters/acc/mean@4"


def a_config(directory: Path, **trainer: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "letters",
            "run_dir": str(directory),
            "model": {"path": "no-such-model"},
            "data": {"train": "no-such-file.jsonl", "validation": "no-such-file.jsonl"},
            "trainer": {"steps": 4} | trainer,
        }
    )


def write_run(directory: Path, config: RunConfig, accuracies: Sequence[float], *, exit_code: int | None = 0) -> Path:
    """A run directory whose step i was validated with `accuracies[i]`, from before training on."""
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(dump_config(config))
    (directory / "status.json").write_text(json.dumps({"exit_code": exit_code}))
    lines = [{"step": step, AVG: value, "critic/score/mean": value / 2} for step, value in enumerate(accuracies)]
    lines[0].pop("critic/score/mean")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def write_published(path: Path, *, low: float = 0.74, high: float = 0.84) -> Path:
    """Four steps, 0.80 after the third and 0.79 after the last."""
    path.write_text(
        f"""
title = "Letters (card)"
source = "nowhere"
steps = 4

[[measured]]
step = 3
"{AVG}" = 0.80

[[measured]]
step = 4
"{AVG}" = 0.79
"critic/score/mean" = 0.90

[[band]]
metric = "{AVG}"
low = {low}
high = {high}
"""
    )
    return path
