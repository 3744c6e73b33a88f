"""`retort preflight CONFIG`: is this machine fit for the run? Half a minute, and every red line says what to do."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict
from functools import partial
from pathlib import Path

from retort.cli.machine import gpus, model_files, redis_server, resources
from retort.cli.machine.finding import Check, Finding, State
from retort.config import ConfigError, RunConfig, load_config

DEADLINE_S = 28.0
"""What has not answered by then is red. The checks run side by side, and none waits longer by itself."""
MARKS = {State.OK: ("✓", "32"), State.WARNING: ("!", "33"), State.FAILED: ("✗", "31"), State.SKIPPED: ("-", "2")}
"""A sign, so that it is readable without colour, and the colour of a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file, for example configs/tiny-cpu.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    parser.add_argument("--json", action="store_true", help="print JSON, to compare one machine with another")


def main(args: argparse.Namespace) -> int:
    """0 when nothing is red, otherwise 2."""
    config = load_config(args.config, args.set)
    started = time.monotonic()
    findings = examine(checks_of(config), DEADLINE_S)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print("\n".join(lines(findings, colour=sys.stdout.isatty())))
        print(f"{time.monotonic() - started:.1f} s")
    return 2 if any(finding.state is State.FAILED for finding in findings) else 0


def checks_of(config: RunConfig) -> dict[str, Check]:
    """Name -> check, in the order in which they are printed."""
    modules = (resources, gpus, redis_server, model_files)
    return {name: partial(check, config) for module in modules for name, check in module.CHECKS.items()}


def examine(checks: dict[str, Check], deadline_s: float) -> list[Finding]:
    """Run all checks at once. A ConfigError is a red line; its text says what to do."""
    pool = ThreadPoolExecutor(max_workers=len(checks))
    running = {name: pool.submit(_finding, name, check) for name, check in checks.items()}
    wait_for(running.values(), timeout=deadline_s)
    late = f"no answer within {deadline_s:g} s"
    findings = [
        future.result() if future.done() else Finding(name, State.FAILED, late, "Look at what it waits for by hand.")
        for name, future in running.items()
    ]
    pool.shutdown(wait=False, cancel_futures=True)
    return findings


def lines(findings: Sequence[Finding], *, colour: bool) -> list[str]:
    shown = []
    for finding in findings:
        mark, code = MARKS[finding.state]
        sign = f"\x1b[{code}m{mark}\x1b[0m" if colour else mark
        shown.append(f"{sign} {finding.name:<14} {finding.text}")
        if finding.fix:
            shown.append(f"  {'':<14} fix: {finding.fix}")
    counts = [sum(finding.state is state for finding in findings) for state in (State.FAILED, State.WARNING)]
    shown.append(f"{counts[0]} red, {counts[1]} to know about, {len(findings)} checks")
    return shown


def _finding(name: str, check: Check) -> Finding:
    try:
        state, text, fix = check()
    except ConfigError as error:
        what, _, fix = str(error).partition(". ")
        return Finding(name, State.FAILED, what.rstrip("."), fix or "Correct the run file.")
    return Finding(name, state, text, fix)
