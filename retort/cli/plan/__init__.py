"""`retort plan CONFIG`: what a run file amounts to, before anything is started."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from retort.cli.plan.figures import Assumptions, Figure, figures
from retort.cli.plan.model_shape import read_shape
from retort.cli.plan.summary import ROLLOUT, TIME, summary
from retort.cli.process_table import visible_gpus
from retort.config import ConfigError, RunConfig, load_config

ASSUMED: list[tuple[str, type, float, str]] = [
    ("--prompt-tokens", int, 256, "mean length of a prompt, at most the longest allowed"),
    ("--completion-tokens", int, 1000, "mean length of a completion, at most the longest allowed"),
    ("--gpu-gib", float, 140.0, "memory of a GPU in GiB"),
    ("--tflops", float, 350.0, "what a training GPU achieves, in 10^12 operations a second"),
    ("--bandwidth", float, 2.9, "what a sampling GPU reads, in 10^12 bytes a second"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    parser.add_argument("--json", action="store_true", help="print JSON; sizes in bytes")
    add_assumptions(parser)


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """What the run file does not say, as options. `assumptions` reads them."""
    assumed = parser.add_argument_group(
        "assumptions", "by default an H200, at 35 % of its speed and 60 % of its bandwidth"
    )
    for name, kind, default, meaning in ASSUMED:
        assumed.add_argument(name, type=kind, default=default, metavar="N", help=f"{meaning}; default {default}")


def main(args: argparse.Namespace) -> int:
    """Raises ConfigError when run file, model or assumptions are of no use."""
    config = load_config(args.config, args.set)
    given = assumptions(args, config)
    plan = list(figures(config, read_shape(config.model.path), given))
    if args.json:
        print(json.dumps({"assumptions": dataclasses.asdict(given), "figures": [dataclasses.asdict(f) for f in plan]}))
    else:
        lengths = f"a prompt of {given.prompt_tokens} and a completion of {given.completion_tokens} tokens"
        print(f"{config.name}: {config.model.path}, {config.trainer.steps} steps, assuming {lengths} in the mean")
        # Memory and speed of a GPU say nothing about a run that finds none.
        on_cpu = config.model.dtype == "float32" and not visible_gpus()
        shown = [_without_gpu(figure) for figure in plan if figure.section not in (ROLLOUT, TIME)] if on_cpu else plan
        print("\n".join([*_lines(shown), "", *summary(config, plan, given, on_cpu=on_cpu)]))
    return 0


def assumptions(args: argparse.Namespace, config: RunConfig) -> Assumptions:
    """Raises ConfigError for a number that is not above 0."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Assumptions)}
    for name, value in given.items():
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0.")
    given["prompt_tokens"] = min(given["prompt_tokens"], config.data.max_prompt_tokens)
    given["completion_tokens"] = min(given["completion_tokens"], config.sampling.max_completion_tokens)
    return Assumptions(**given)


def _without_gpu(figure: Figure) -> Figure:
    return dataclasses.replace(figure, formula=figure.formula.partition("; a GPU has")[0])


def _lines(plan: Sequence[Figure]) -> list[str]:
    lines = []
    for section, members in groupby(plan, key=lambda figure: figure.section):
        lines += ["", section]
        lines += [f"  {f.name:<34} {_amount(f):>18}   {f.formula}" for f in members]
    return lines


def _amount(figure: Figure) -> str:
    if figure.unit != "bytes":
        return f"{figure.value:,.{1 if figure.unit == 's' else 0}f} {figure.unit}".strip()
    power = max(0, min(3, int(math.log(max(figure.value, 1), 1024))))
    return f"{figure.value / 1024**power:,.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
