"""Seconds of training until the demo's model has avg@16 of 0.9, beside TRL: `python -m benchmarks.end_to_end [--json]`.

Both train the model of the run file with GRPO on its questions, 128 samples a step, with the same settings of the
optimizer, on two cores, one after the other: the services as `retort run` starts them, and TRL's GRPOTrainer with its
own generation. Start and validation are not counted. With `--staleness 1` Retort samples for a step while it trains on
the one before, which is another algorithm than TRL's, and says how much two services side by side are worth. TRL is
installed into an environment of its own, see `benchmarks.trainer`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.learning import AVG16
from benchmarks.trainer import python_with_trl

CONFIG = "configs/tiny-cpu.toml"
GOAL = 0.9
STEPS = 15
"""At most; TRL ends at the goal."""
Curve = list[dict[str, float]]


def with_retort(every: int, seed: int, staleness: int) -> Curve:
    """Validated steps and the seconds until then, as the run's metrics have them."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = [
            "method.name=grpo", "method.aggregation=sequence_mean", f"validation.every={every}", f"seed={seed}",
            f"trainer.max_staleness={staleness}", f"trainer.steps={STEPS}", "checkpoint.every=1000",
        ]  # fmt: skip
        if staleness:  # engine and trainer then differ by what was learned in between, too
            settings.append("trainer.max_logprob_gap=1")
        overrides = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "retort.cli", "run", CONFIG, "--run-dir", str(run), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds, curve = 0.0, Curve()
    for line in lines:
        if line["step"]:
            seconds += line["timing_s/step"] - line.get("timing_s/validation", 0.0)
        if line["step"] and AVG16 in line:
            curve.append({"step": line["step"], "seconds": seconds, "avg@16": line[AVG16]})
    return curve


def with_trl(every: int, seed: int) -> Curve:
    command = [
        python_with_trl(), "-W", "ignore", "-m", "benchmarks.trl_learning", CONFIG,
        "--goal", str(GOAL), "--every", str(every), "--seed", str(seed),
    ]  # fmt: skip
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    curve: Curve = json.loads(ran.stdout.splitlines()[-1])
    return curve


def at_goal(curve: Curve) -> dict[str, float] | None:
    """The first validation that reached it."""
    return next((point for point in curve if point["avg@16"] >= GOAL), None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--every", type=int, default=5, help="steps between validations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--staleness", type=int, default=0, help="trainer.max_staleness of Retort; TRL's is 0")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    curves = {"retort": with_retort(args.every, args.seed, args.staleness), "trl": with_trl(args.every, args.seed)}
    reached = {name: at_goal(curve) for name, curve in curves.items()}
    ours, theirs = reached["retort"], reached["trl"]
    ratio = ours["seconds"] / theirs["seconds"] if ours and theirs else None
    found = {"seconds_vs_trl": ratio, "reached": reached, "curves": curves}
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
