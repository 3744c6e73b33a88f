"""Seconds of training until the demo's model has avg@16 of 0.9, beside TRL: `python -m benchmarks.end_to_end [--json]`.

All train the model of the run file with GRPO on its questions, 128 samples a step, with the same settings of the
optimizer, on two cores, one after the other: the services as `retort run` starts them, and TRL's GRPOTrainer with its
own generation, once with its own defaults for a CPU (bfloat16 autocast, activation checkpointing) and once, as Retort,
without both. Each runs twice: the first time it is validated, which says how many steps it needs; the second time it
makes as many, is validated before the first and after the last, and has the seconds. Start and validation are not
counted. With `--staleness 1` Retort samples for a step while it trains on the one before, which is another algorithm
than TRL's, and says how much two services side by side are worth. TRL is installed into an environment of its own, see
`benchmarks.trainer`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.learning import AVG16
from benchmarks.trainer import python_with_trl

CONFIG = "configs/tiny-cpu.toml"
GOAL = 0.9
STEPS = 8
"""At most, where the goal is not reached; TRL ends at the goal."""
Curve = list[dict[str, float]]


def with_retort(seed: int, staleness: int, steps: int, every: int) -> Curve:
    """So many steps, validated every so many: the seconds until then, as the run's metrics have them."""
    settings = [
        "method.name=grpo", "method.aggregation=sequence_mean", f"seed={seed}", f"trainer.max_staleness={staleness}",
        f"trainer.steps={steps}", f"validation.every={every}", "checkpoint.every=1000",
    ]  # fmt: skip
    if staleness:  # engine and trainer then differ by what was learned in between, too
        settings.append("trainer.max_logprob_gap=1")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        overrides = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "retort.cli", "run", CONFIG, "--run-dir", str(run), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _untrained, *lines = lines
    seconds = accumulate(line["timing_s/step"] - line.get("timing_s/validation", 0.0) for line in lines)
    return [
        {"step": line["step"], "seconds": spent, "avg@16": line[AVG16]}
        for line, spent in zip(lines, seconds, strict=True)
        if AVG16 in line
    ]


def with_trl(seed: int, settings: Sequence[str], steps: int, every: int) -> Curve:
    command = [
        python_with_trl(), "-W", "ignore", "-m", "benchmarks.trl_learning", CONFIG,
        "--goal", str(GOAL), "--steps", str(steps), "--every", str(every), "--seed", str(seed), *settings,
    ]  # fmt: skip
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    curve: Curve = json.loads(ran.stdout.splitlines()[-1])
    return curve


def race(contender: Callable[[int, int], Curve], every: int) -> dict[str, Any]:
    """A validated run of (steps, every), and the seconds of one that goes as far as that had to."""
    curve = contender(STEPS, every)
    end = int((at_goal(curve) or curve[-1])["step"])
    timed = contender(end, end)
    return {"validated": curve, "timed": timed[-1], "reached": at_goal(timed)}


def at_goal(curve: Curve) -> dict[str, float] | None:
    """The first validation that reached it."""
    return next((point for point in curve if point["avg@16"] >= GOAL), None)


def ratio(ours: dict[str, float] | None, theirs: dict[str, float] | None) -> float | None:
    return ours["seconds"] / theirs["seconds"] if ours and theirs else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="steps between validations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--staleness", type=int, default=0, help="trainer.max_staleness of Retort; TRL's is 0")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    found: dict[str, Any] = {
        "retort": race(partial(with_retort, args.seed, args.staleness), args.every),
        "trl": race(partial(with_trl, args.seed, ()), args.every),
        "trl_float32": race(partial(with_trl, args.seed, ("--like-retort",)), args.every),
    }
    ours = found["retort"]["reached"]
    found |= {f"seconds_vs_{peer}": ratio(ours, found[peer]["reached"]) for peer in ("trl", "trl_float32")}
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
