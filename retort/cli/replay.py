"""`retort replay RUN_DIR --step N`: train on a recorded step once more and compare the numbers, bit by bit."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from retort.cli.process_table import QUIET
from retort.cli.status import newest_run
from retort.config import ConfigError, RunConfig, load_config

LONGEST_S = 24 * 3600.0
SHOWN = ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/updates_skipped")
EPILOG = """\
Starts from the newest checkpoint before the step (or the initial model), needs neither Redis nor replicas, and
changes nothing in the run. A step that a guard stopped (exit code 5) is repeated from what it kept. Exit code 0: all
numbers have the same bits; 1: some have not, which only `trainer.deterministic = true` promises.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("run_dir", nargs="?", type=Path, help="directory of the run; default: the newest under runs/")
    parser.add_argument("--step", type=int, required=True, help="the training step to repeat")


def main(args: argparse.Namespace) -> int:
    directory = (args.run_dir or newest_run(Path("runs"))).resolve()
    config = load_config(directory / "config.toml", [f"run_dir={directory}"])
    if args.step < 1:
        raise ConfigError(f"--step {args.step}: the first training step is 1.")
    result = _replay(config, directory, args.step)
    recorded, replayed = result["recorded"], result["replayed"]
    origin = f"version {result['start']}" if result["start"] else "the initial model"
    ranks, bits = config.trainer.ranks, "deterministic" if config.trainer.deterministic else "not deterministic"
    print(f"step {args.step} of {directory}, from {origin}, {ranks} rank(s), {bits}")
    # repr: json reads back the very number that was written, so equal texts are equal bits.
    same = [name for name in replayed if repr(recorded.get(name)) == repr(replayed[name])]
    other = [name for name in replayed if name not in same]
    for name in [*(name for name in SHOWN if name in replayed), *(name for name in replayed if name.startswith("up"))]:
        verdict = "same bits" if name in same else "OTHER"
        print(f"  {name:<24}recorded {recorded.get(name)!s:<24}replayed {replayed[name]!s:<24}{verdict}")
    if "why" in replayed:
        print(f"  the guard said: {replayed['why']}")
    print(f"{len(same)} of {len(replayed)} numbers have the same bits" + (f"; not {', '.join(other)}" if other else ""))
    return 0 if replayed and not other else 1


def _replay(config: RunConfig, directory: Path, step: int) -> dict[str, Any]:
    torchrun = ["-m", "retort.cli.torchrun", "--standalone", "--nproc-per-node", str(config.trainer.ranks)]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "result.json")
        replay = ["-m", "services.trainer.replay", f"--config={directory / 'config.toml'}", f"--step={step}"]
        environment = {**QUIET, "OMP_NUM_THREADS": "1", **os.environ, "RETORT_RUN_DIR": str(directory)}
        command = [sys.executable, *torchrun, *replay, f"--out={out}"]
        code = subprocess.run(command, env=environment, timeout=LONGEST_S, check=False).returncode
        if code or not out.exists():
            raise ConfigError(f"the replay ended with exit code {code}; its last line above says why.")
        result: dict[str, Any] = json.loads(out.read_text())
        return result
