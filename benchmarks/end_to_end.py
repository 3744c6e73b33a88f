"""Seconds of training until the demo's model has avg@16 of 0.9, beside TRL: `python -m benchmarks.end_to_end [--json]`.

All train the model of the run file with GRPO on its questions, 128 samples a step, with the same settings of the
optimizer, on two cores, one after the other: the services as `retort run` starts them, and TRL's GRPOTrainer with its
own generation, once with its own defaults for a CPU (bfloat16 autocast, activation checkpointing) and once, as Retort,
without both. Start and validation are not counted: one run of Retort is validated, which says how many steps it needs,
and another, of as many steps, has the seconds. With `--staleness 1` Retort samples for a step while it trains on the
one before, which is another algorithm than TRL's, and says how much two services side by side are worth. TRL is
installed into an environment of its own, see `benchmarks.trainer`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

from benchmarks.learning import AVG16
from benchmarks.trainer import python_with_trl

CONFIG = "configs/tiny-cpu.toml"
GOAL = 0.9
STEPS = 15
"""At most, where the goal is not reached."""
Curve = list[dict[str, float]]


def with_retort(every: int, seed: int, staleness: int) -> Curve:
    """Validated steps, and the seconds until then of a run that is not validated on its way."""
    settings = [
        "method.name=grpo", "method.aggregation=sequence_mean", f"seed={seed}", f"trainer.max_staleness={staleness}",
        "checkpoint.every=1000",
    ]  # fmt: skip
    if staleness:  # engine and trainer then differ by what was learned in between, too
        settings.append("trainer.max_logprob_gap=1")
    validated = run_retort([*settings, f"validation.every={every}", f"trainer.steps={STEPS}"])
    curve = [{"step": line["step"], "avg@16": line[AVG16]} for line in validated if line["step"] and AVG16 in line]
    end = (at_goal(curve) or curve[-1])["step"]
    timed = run_retort([*settings, "validation.every=1000", f"trainer.steps={end}"])
    seconds = list(accumulate(line["timing_s/step"] - line.get("timing_s/validation", 0.0) for line in timed[1:]))
    return [{**point, "seconds": seconds[int(point["step"]) - 1]} for point in curve if point["step"] <= end]


def run_retort(settings: list[str]) -> list[dict[str, float]]:
    """The run's metrics, step by step, the validation before the first included."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        overrides = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "retort.cli", "run", CONFIG, "--run-dir", str(run), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def with_trl(every: int, seed: int, *settings: str) -> Curve:
    command = [
        python_with_trl(), "-W", "ignore", "-m", "benchmarks.trl_learning", CONFIG,
        "--goal", str(GOAL), "--every", str(every), "--seed", str(seed), *settings,
    ]  # fmt: skip
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    curve: Curve = json.loads(ran.stdout.splitlines()[-1])
    return curve


def at_goal(curve: Curve) -> dict[str, float] | None:
    """The first validation that reached it."""
    return next((point for point in curve if point["avg@16"] >= GOAL), None)


def ratio(ours: dict[str, float] | None, theirs: dict[str, float] | None) -> float | None:
    return ours["seconds"] / theirs["seconds"] if ours and theirs else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--every", type=int, default=5, help="steps between validations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--staleness", type=int, default=0, help="trainer.max_staleness of Retort; TRL's is 0")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    curves = {
        "retort": with_retort(args.every, args.seed, args.staleness),
        "trl": with_trl(args.every, args.seed),
        "trl_float32": with_trl(args.every, args.seed, "--like-retort"),
    }
    reached = {name: at_goal(curve) for name, curve in curves.items()}
    ratios = {f"seconds_vs_{peer}": ratio(reached["retort"], reached[peer]) for peer in ("trl", "trl_float32")}
    found = {**ratios, "reached": reached, "curves": curves}
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
