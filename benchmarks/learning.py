"""Does the demo learn, and from the reward? Five seeds, and a control whose rewards mean nothing.

    python -m benchmarks.learning --out runs/learning     # six runs, three to six minutes each on two quiet cores

Prints a table and writes learning.json. The control trains on the same questions with a random letter as the answer of
each; validation keeps the true ones. It is plain GRPO, whose only signal is the reward, and longer, because noise needs
its time to wear a skill down.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = "configs/tiny-cpu.toml"
AVG16 = "val-core/periodic_table/acc/mean@16"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="directory for the runs")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--no-control", action="store_true", help="leave the control out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = [run(args.out / f"seed-{seed}", f"seed={seed}") for seed in args.seeds]
    if not args.no_control:
        answers = args.out / "random-answers.jsonl"
        randomize_answers(Path("data/periodic_table/train.jsonl"), answers)
        settings = ("method.name=grpo", "trainer.steps=160", "validation.every=20", f"data.train={answers}")
        results.append(run(args.out / "control", "seed=0", *settings))
    (args.out / "learning.json").write_text(json.dumps(results, indent=1))
    print_table(results)
    return 0


def run(directory: Path, *settings: str) -> dict[str, Any]:
    """Train once, or read what an earlier call left, and say what came of it."""
    start = time.monotonic()
    if not (directory / "report.html").exists():
        overrides = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "retort.cli", "run", CONFIG, "--run-dir", str(directory), *overrides]
        subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "timing_s/step" in line and line["step"] > 0]
    return {
        "run": directory.name,
        "avg@16": {line["step"]: line[AVG16] for line in lines if AVG16 in line},
        "training_seconds": lines[-1]["time"] - lines[0]["time"],
        "wall_seconds": time.monotonic() - start,
        "median_step_seconds": sorted(line["timing_s/step"] for line in trained)[len(trained) // 2],
        "engine_gap_max": max(line.get("training/rollout_probs_diff_max", 0.0) for line in trained),
    }


def randomize_answers(source: Path, target: Path) -> None:
    """The same questions, with a letter drawn anew as the answer of each."""
    draw = random.Random(0)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    target.write_text("".join(json.dumps({**row, "answer": draw.choice("ABCD")}) + "\n" for row in rows))


def print_table(results: list[dict[str, Any]]) -> None:
    print("| run | avg@16 at step | gain | training s |")
    print("|---|---|---|---|")
    for result in results:
        values = list(result["avg@16"].values())
        cells = ", ".join(f"{step}: {value:.3f}" for step, value in result["avg@16"].items())
        print(f"| {result['run']} | {cells} | {values[-1] - values[0]:+.3f} | {result['training_seconds']:.0f} |")


if __name__ == "__main__":
    sys.exit(main())
