"""The command `retort`. Every subcommand is a module with `add_arguments(parser)` and `main(args) -> exit code`.

Modules are imported when their subcommand is called, so that `retort --help` answers at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": ("retort.cli.run", "train: start every service on this machine, watch over them, stop them"),
    "status": ("retort.cli.status", "show what a run is doing"),
    "fleet": ("retort.cli.fleet", "list a run's rollout replicas, drain or evict one"),
    "doctor": ("retort.cli.doctor", "say who waits for whom, since when, why, and what helps"),
    "dead": ("retort.cli.dead", "look at work that was set aside; replay or drop it"),
    "replay": ("retort.cli.replay", "train on a recorded step again and compare the numbers, bit by bit"),
    "trace": ("retort.cli.trace", "which samples made an update, and what became of a group"),
    "timeline": ("retort.cli.timeline", "who did what when, as a file for Perfetto"),
    "report": ("retort.cli.report", "write a run's report.html"),
    "ui": ("retort.cli.ui", "serve a run's report while the run goes on"),
    "track": (
        "retort.cli.track",
        "pass a run's metrics on to wandb, tensorboard, mlflow or trackio; its traces to otel",
    ),
    "chat": ("retort.cli.chat", "talk to the model that a run made"),
    "serve": ("retort.cli.serve", "run one service on its own: retort serve reward"),
    "prepare": ("retort.cli.prepare", "make a data set's files, verified: retort prepare sciknoweval"),
    "preflight": ("retort.cli.machine", "is this machine fit for a run? every red line says what to do"),
    "plan": ("retort.cli.plan", "print what a run file amounts to, before anything is started"),
    "simulate": ("simulation.command", "predict a run file's step time, and how its fleet would scale"),
    "compare": ("retort.cli.compare", "two runs side by side, or a run beside a published one"),
    "reproduce": ("retort.cli.reproduce", "repeat a published run and say whether it was reproduced"),
    "score": ("retort.cli.score", "send a file of completions through the reward service"),
    "task": ("retort.cli.task", "write questions and their checker of your own: retort task new NAME"),
    "checker": ("retort.cli.checker", "write a checker of your own: retort checker new NAME"),
    "secrets": ("retort.cli.credentials", "make the passwords and tokens that services share in containers"),
    "env": ("retort.cli.env", "print what a bug report needs: versions, machine, settings; no secrets"),
    "version": ("retort.cli.version", "print the versions of retort and of what it builds on"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), "")
    args = _parser(chosen).parse_args(arguments)
    from retort.config import ConfigError
    from retort.disk import DiskFullError

    try:
        return int(importlib.import_module(COMMANDS[chosen][0]).main(args))
    except (ConfigError, DiskFullError) as error:
        print(f"retort {chosen}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser(chosen: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retort",
        description="Reinforcement-learning post-training of language models as plain services.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, purpose) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=purpose, description=purpose)
        if name == chosen:
            importlib.import_module(module).add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
