"""`retort run` in a process that is forked from one that has torch loaded, and so are the services it starts.

An import of torch takes seconds, a fork milliseconds: that is the difference between a handful of faults a minute and
a hundred. Everything else is what `retort run` does. Waits that only cost time are shortened, in `shorten_waits`.
"""

import contextlib
import json
import mmap
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio._utils

import retort.cli.__main__
import retort.cli.launch
import services.reward.__main__
import services.rollout.__main__
import services.rollout.simulated_model
import services.trainer.__main__
from retort.cli import processes
from retort.cli.ports import free_ports
from retort.cli.process_table import SECRETS, plan_programs
from retort.cli.processes import Program
from retort.config import RunConfig
from retort.telemetry import LAUNCHER_PID, die_with_parent
from services.trainer import admission, weight_sender

MAINS: dict[str, Callable[[], int]] = {
    "services.reward": services.reward.__main__.main,
    "services.rollout": services.rollout.__main__.main,
    "services.trainer": services.trainer.__main__.main,
}
MODEL = "RETORT_CHAOS_MODEL"
"""Environment variable with the model that the runs will load."""
LINKS = "RETORT_CHAOS_LINKS"
"""Environment variable with what services are told in place of addresses: JSON, service -> variable -> value."""
CLOCK = "RETORT_CHAOS_CLOCK"
"""Environment variable with a file of eight bytes: by how many seconds the clock of the run is wrong."""


def hold(directory: Path, name: str) -> Path:
    """While this file exists, the launcher does not start the service."""
    return directory / f"hold-{name}"


spawn_executed = processes._spawn


class Forked(subprocess.Popen):
    """The handle of a process that was forked and runs no other program."""

    def __init__(self, pid: int) -> None:
        self.pid, self.args, self.returncode = pid, (), None
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._communication_started = True, False
        self._waitpid_lock = threading.Lock()


def launch(
    arguments: Sequence[str], output: Path, environment: dict[str, str], before: Callable[[], None] | None = None
) -> None:
    """`retort ARGUMENTS` in a process that was forked for it. `before` is called there, as the last thing."""
    os.setsid()
    be_like_a_started_program()
    os.environ.pop("REDIS_URL", None)
    os.environ.update(environment)
    redirect(output)
    shorten_waits()
    set_the_clock(Path(environment[CLOCK]))
    processes._spawn = spawn
    plan = partial(plan_with_faults, json.loads(environment[LINKS]))
    retort.cli.launch.launch = partial(retort.cli.launch.launch, plan=plan)
    if before:
        before()
    sys.exit(retort.cli.__main__.main(list(arguments)))


def be_like_a_started_program() -> None:
    """A child of the fork server would leave the names of its semaphores to a tracker that these processes have not."""
    multiprocessing.set_start_method("fork", force=True)


def shorten_waits() -> None:
    """What only decides how soon a fault is noticed or tried again: here everything takes milliseconds."""
    retort.cli.launch.REFRESH_S = 0.1
    admission.ISSUE_AGAIN_S = 1.0
    weight_sender.HEARD_OF_WITHIN_S = 5.0
    impatient = processes.RestartPolicy
    retort.cli.launch.RestartPolicy = lambda limit: impatient(limit, first_delay_s=0.05, longest_delay_s=0.05)


def set_the_clock(file: Path) -> None:
    """From now on `time.time` here, and in all that is forked from here, is wrong by what the file says at the time."""
    with file.open("r+b") as stream:
        offset = mmap.mmap(stream.fileno(), 8)
    right = time.time
    # gRPC's core asks the system itself: a deadline that was counted from another clock would be over at once.
    grpc.aio._utils.time = SimpleNamespace(time=right)
    time.time = lambda: right() + float(struct.unpack("d", offset[:8])[0])


def plan_with_faults(
    links: Mapping[str, Mapping[str, str]], config: RunConfig, config_file: Path
) -> tuple[str, list[Program]]:
    """As `plan_programs`, but what is held is not started, and services go through the links."""
    url, programs = plan_programs(config, config_file)
    let_testers_in(config)

    def held(program: Program) -> Program:
        gate = hold(config.directory, program.name)
        return replace(
            program,
            environment=through_links(program.environment, links.get(program.name, {})),
            may_start=lambda: not gate.exists() and program.may_start(),
        )

    return url, [held(program) for program in programs]


def let_testers_in(config: RunConfig) -> None:
    """A user who may do everything: no role may empty Redis, and a test has to."""
    with (config.directory / SECRETS / "redis" / "users.acl").open("a") as users:
        users.write("user tester on nopass allkeys allchannels allcommands\n")


def through_links(environment: Mapping[str, str], link: Mapping[str, str]) -> dict[str, str]:
    """The variables of a service that goes through its links; in Redis it is the same user there."""
    linked = {**environment, **link}
    if "RETORT_REDIS__URL" in link:
        user, _, _ = Path(linked.pop("RETORT_REDIS__URL_FILE")).read_text().rpartition("@")
        linked["RETORT_REDIS__URL"] = f"{user}@{link['RETORT_REDIS__URL'].removeprefix('redis://')}"
    return linked


def spawn(program: Program) -> subprocess.Popen[bytes]:
    """As `processes._spawn`, but forked. Redis is not ours and has nothing to import."""
    if program.name == "redis":
        return spawn_executed(program)
    return fork(program.name, command_of(program), program.environment, program.log)


def command_of(program: Program) -> list[str]:
    """As it is planned; replicas with the simulated engine."""
    return [*program.command, *(["--engine", "simulated"] if program.name.startswith("rollout") else [])]


def fork(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    before: Callable[[], None] | None = None,
) -> Forked:
    """A service in a process of its own. `before` is called there."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 1
    try:
        os.setsid()
        reset_signals()
        die_with_parent(parent)
        os.environ.update({**environment, LAUNCHER_PID: str(parent)})
        redirect(log)
        os.chdir(log.parent)
        if before:
            before()
        code = trainer_ranks(command) if name == "trainer" else run_main(command[2], command[3:])
    except BaseException:  # noqa: BLE001  # nothing may unwind into what the parent was doing
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_launcher(
    arguments: Sequence[str], output: Path, environment: dict[str, str], before: Callable[[], None]
) -> Forked:
    """A launcher in a process of its own, which ends with this one. `before` is called there."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return Forked(pid)
    code: Any = 1
    try:
        die_with_parent(parent)
        launch(arguments, output, environment, before)
    except SystemExit as ending:
        code = ending.code
    except BaseException:  # noqa: BLE001  # nothing may unwind into what the parent was doing
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))


def run_main(module: str, arguments: Sequence[str]) -> int:
    sys.argv = [module, *arguments]
    try:
        return MAINS[module]()
    except SystemExit as ending:
        return int(ending.code or 0)


def trainer_ranks(command: Sequence[str]) -> int:
    """What torchrun does for the trainer: so many ranks; when one fails, all end, with its exit code."""
    ranks = int(command[command.index("--nproc-per-node") + 1])
    arguments = command[command.index("services.trainer") + 1 :]
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    if ranks == 1:
        os.environ.update({**master, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        return run_main("services.trainer", arguments)
    children = [_fork_rank(rank, ranks, master, arguments) for rank in range(ranks)]
    signal.signal(signal.SIGTERM, lambda number, _: [os.kill(child, number) for child in children])
    code = 0
    while children and not code:
        ended, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        children.remove(ended)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return code if code >= 0 else 1


def _fork_rank(rank: int, ranks: int, master: dict[str, str], arguments: Sequence[str]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    die_with_parent(parent)
    os.environ.update({**master, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
    code = 1
    try:
        code = run_main("services.trainer", arguments)
    except BaseException:  # noqa: BLE001  # nothing may unwind into what the parent was doing
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def redirect(output: Path) -> None:
    """Standard output and error into a file, standard input and all else that was inherited from nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for inherited in [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]:
        with contextlib.suppress(OSError):  # the one that listed the directory
            # Not closed: objects of the parent think that they own the number, and would close what comes to have it.
            os.dup2(nowhere, inherited)


def reset_signals() -> None:
    """What the launcher does with signals is no business of what it starts."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start_in_fork_server(context: Any, target: Callable[..., None], *arguments: object) -> Any:
    """A daemon of multiprocessing's fork server: it ends with the tests."""
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process
