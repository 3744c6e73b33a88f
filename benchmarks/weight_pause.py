"""`python -m benchmarks.weight_pause`: for how long a new version keeps trainer and replica waiting.

A trainer's own policy, publisher and sender in this process, a Valkey, and a rollout server with real vLLM that has
work in flight. The model is random: as many of Qwen3-4B's layers as --mib asks for, with the demo's vocabulary. Each
of --versions changes every weight a little and is published; seconds of each phase, as the trainer sees them:

    scoring    the trainer's own log-probs of the probe prompt
    snapshot   its weights are gathered, converted, packed, digested
    stall      the two together: the trainer stands still
    prepare    the engine ends the step that it is in, and generation freezes
    transfer   the broadcast; the receiver digests every bucket and loads it
    probe      loading is finished, the engine scores the probe prompt
    commit     generation goes on
    pause      those four together, so with what is left of the step that the engine is in

Bare is a broadcast of as many bytes in the same buckets over the same backend, when all that is over: what the
transfer cannot be quicker than. Version 0, which opens the process group and clears new memory, is not counted.

On a machine with GPUs the backend is NCCL: the trainer has the first GPU, the replica the second, since NCCL refuses
two ranks on one. `--backend gloo` takes both on one GPU; then all bytes go through the host's memory, and the transfer
says nothing of NVLink. The goal's model is `--mib 7680`: 8.05 GB in bfloat16.

On a CPU: 3 minutes for 1 GB. `--mib 64 --hidden 640 --versions 4` tries it out in one.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.rollout import CONFIG, process
from benchmarks.weight_sync import BACKENDS, ONE_GPU, measure
from retort.cli.ports import free_ports
from retort.config import RunConfig, load_config
from retort.identity import identity_of
from retort.queues import TrainerQueue, connect
from retort.telemetry import start_logging
from retort.weight_sync import authorization
from services.trainer.admission import WorkList
from services.trainer.operations import finish
from services.trainer.parts import make_policy, make_work, start_ranks
from services.trainer.policy import Policy
from services.trainer.publish import WeightPublisher
from services.trainer.weight_sender import WeightSender
from simulation.command import own_valkey
from tests.reward_service import reward_service

PAUSE = ("prepare", "transfer", "probe", "commit")
PHASES = ("scoring", "snapshot", "stall", *PAUSE, "pause")
GOAL = "pause 0.35 s p95, stretch 0.2 s (one H200 for each side, 8.05 GB)"
LATER = 10**6
"""Work of a step so far ahead that every version of the run may sample it."""
STARTUP_S, BUSY_S = 600.0, 120.0
CHANGE = 1.01
"""By which every weight grows or shrinks from version to version: enough for bfloat16 to see nearly all of them."""
BARE_REPEATS = 5
Seconds = dict[str, list[float]]


def make_model(directory: Path, mib: int, hidden: int, dtype: torch.dtype) -> str:
    """A random model of about so many MiB: layers with the proportions of Qwen3-4B's, whose width is 2560."""
    tiny = load_config(CONFIG).model.path
    config = AutoConfig.from_pretrained(tiny)
    heads, kv_heads, inner, config.head_dim = hidden // 80, hidden // 320, hidden * 19 // 5, 128
    layer = hidden * (2 * 128 * (heads + kv_heads) + 3 * inner)
    layers = max(1, round((mib * 2**20 / dtype.itemsize - config.vocab_size * hidden) / layer))
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = hidden, inner, layers
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.layer_types, config.initializer_range = ["full_attention"] * layers, 0.02
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    return str(directory)


@dataclass
class BusyReplica:
    """A rollout server that is never without work, as a process."""

    process: subprocess.Popen[bytes]
    queue: TrainerQueue
    work: WorkList
    groups: int
    """That it samples at the same time."""
    in_flight: list[int] = field(default_factory=list)
    """Groups that it had in hand when a version was about to be published."""
    _step: int = LATER

    def keep_busy(self) -> None:
        """Return when it has taken work and there is more."""
        while self.queue.in_flight("train").waiting < 2 * self.groups:
            self._step += 1
            self.queue.issue(self.work.of_step(self._step))
        self.wait_until("take work", lambda: self.queue.in_flight("train").leased > 0, BUSY_S)
        self.in_flight.append(self.queue.in_flight("train").leased)

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Exits, naming what the replica has not done, after `seconds` or when it has ended."""
        give_up = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                code = self.process.returncode
                raise SystemExit(f"the replica ended (exit {code}) before it could {what}; its last words are above")
            if time.monotonic() > give_up:
                raise SystemExit(f"the replica did not {what} within {seconds:g} s; its last words are above")
            time.sleep(0.1)


@dataclass
class Publishing:
    """The trainer's side, from the policy to the wire."""

    policy: Policy
    sender: WeightSender
    weights: WeightPublisher
    scoring_s: float = 0.0
    """Of the last version's log-probs of the probe prompt, which are in its stall."""

    def __post_init__(self) -> None:
        score = self.policy.score_prompt

        def timed(prompt_ids: Sequence[int]) -> list[float]:
            start = time.perf_counter()
            logprobs = score(prompt_ids)
            self.scoring_s = time.perf_counter() - start
            return logprobs

        self.policy.score_prompt = timed  # type: ignore[method-assign]  # the publisher calls it on the policy

    def first(self, replica: BusyReplica) -> None:
        """Publish version 0 and wait until the replica serves it."""
        self.weights.publish(self.policy)
        replica.wait_until("start and serve version 0", lambda: self.sender.start_sync(0) > 0, STARTUP_S)

    def next(self) -> Mapping[str, float]:
        """Publish another version; the seconds of each phase."""
        self.policy.version = version = self.policy.version + 1
        for shard in self.policy.local_shards():
            shard.mul_(CHANGE if version % 2 else 1 / CHANGE)
        finish(self.policy.device)
        self.weights.publish(self.policy)
        report = self.weights.report
        if report.replicas != 1:
            raise SystemExit(f"the replica does not serve version {version}: the trainer's last words above say why")
        spent = {phase: report.phase_seconds[phase] for phase in PAUSE}
        stall = report.snapshot_seconds
        of_trainer = {"scoring": self.scoring_s, "snapshot": stall - self.scoring_s, "stall": stall}
        return {**of_trainer, **spent, "pause": sum(spent.values())}


@contextmanager
def publishing(config: RunConfig, queue: TrainerQueue, backend: str) -> Iterator[Publishing]:
    """A trainer of one rank, as services/trainer/__main__.py wires it, but for what learns."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    [port] = free_ports(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with start_ranks(config):
        policy = make_policy(config)
        sender = WeightSender(
            queue,
            config.weight_sync,
            epoch=1,
            backend=backend,
            authorization=authorization(),
            identity=identity_of(config, tokenizer),
        )
        probe_ids = make_work(config, tokenizer).of_step(1)[0].prompt_ids
        weights = WeightPublisher(sender, config, policy, probe_ids=probe_ids)
        try:
            yield Publishing(policy, sender, weights)
        finally:
            weights.close()


@contextmanager
def busy_replica(config: RunConfig, queue: TrainerQueue) -> Iterator[BusyReplica]:
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    settings = config.trainer.model_copy(update={"max_staleness": 2 * LATER})
    work = make_work(config.model_copy(update={"trainer": settings}), tokenizer)
    with process("services.rollout", "--config", str(CONFIG), "--name", "rollout-0", env=_of_replica()) as replica:
        try:
            yield BusyReplica(replica, queue, work, config.rollout.concurrent_groups)
        finally:
            replica.kill()  # asked to end, it would first finish what it has in hand


def _of_replica() -> dict[str, str]:
    """Its environment: of two GPUs the second. The trainer's own ranks are none of its business."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    second = {"CUDA_VISIBLE_DEVICES": visible[1]} if torch.cuda.device_count() > 1 else {}
    return {**os.environ, **second}


def pauses(url: str, versions: int, backend: str) -> dict[str, Any]:
    """Publish so many versions beside a replica at work; what that took, and the same bytes by themselves."""
    config = load_config(CONFIG)
    queue = TrainerQueue(connect(url), config.key_prefix, epoch=1)
    queue.open()
    spent: Seconds = {name: [] for name in PHASES}
    with busy_replica(config, queue) as replica, publishing(config, queue, backend) as trainer:
        trainer.first(replica)
        for version in range(1, versions + 1):
            replica.keep_busy()
            for name, seconds in trainer.next().items():
                spent[name].append(seconds)
            print(f"version {version}: pause {spent['pause'][-1]:.3f} s", file=sys.stderr)
        assert trainer.sender.snapshot is not None
        manifest = trainer.sender.snapshot.manifest
        finished = queue.in_flight("train").finished
    spent["bare"] = measure(1, manifest, BARE_REPEATS, backend, ("bare",))["bare"]
    medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
    return {
        "dtype": config.model.dtype,
        "gigabytes": sum(spec.num_bytes for bucket in manifest.buckets for spec in bucket) / 1e9,
        "buckets": len(manifest.buckets),
        "groups_in_flight": statistics.median(replica.in_flight),
        "groups_finished": finished,
        "seconds": {name: {"median": medians[name], "p95": _p95(seconds)} for name, seconds in spent.items()},
        "transfer_over_bare": medians["transfer"] / medians["bare"],
    }


def _p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20, method="inclusive")[-1]


def lines(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{found['gigabytes']:.2f} GB of {found['dtype']} in {found['buckets']} buckets over {found['backend']} "
        f"({found['device']}), {found['versions']} versions, {found['groups_in_flight']:g} groups in flight, "
        f"load {found['load_before']:.1f} before and {found['load_after']:.1f} after"
    )
    yield "phase     median, s  p95, s"
    for name, seconds in found["seconds"].items():
        yield f"{name:<8}  {seconds['median']:<9.3f}  {seconds['p95']:.3f}"
    yield f"transfer over bare: {found['transfer_over_bare']:.2f}, loading into the engine included"
    yield f"goal: {found['goal']}"


def environment(args: argparse.Namespace, model: str, url: str, reward: str) -> dict[str, str]:
    """What makes the demo's run file this run's, for both sides."""
    values = {
        "RETORT_MODEL__PATH": model,
        "RETORT_MODEL__DTYPE": args.dtype,
        "RETORT_MODEL__MAX_LENGTH": str(args.tokens + 192),  # the longest prompt of the demo
        "RETORT_SAMPLING__MAX_COMPLETION_TOKENS": str(args.tokens),
        "RETORT_TRAINER__MAX_STALENESS": "0",  # a sync that goes on beside training would be reported a version later
        "RETORT_WEIGHT_SYNC__BUCKET_MIB": str(args.bucket_mib),
        "RETORT_WEIGHT_SYNC__MAX_PROBE_GAP": "0.3",
        "RETORT_ROLLOUT__CONCURRENT_GROUPS": str(args.groups),
        "RETORT_REDIS__URL": url,
        "RETORT_REWARD__ADDRESS": reward,
        "CONTROL_TOKEN": uuid.uuid4().hex,
    }
    if torch.cuda.device_count() == 1:
        values["RETORT_ROLLOUT__GPU_MEMORY_UTILIZATION"] = "0.4"  # the trainer is on the same one
    return values


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weight_pause",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    parser.add_argument("--mib", type=int, default=1024, help="size of the model, about; default 1024")
    parser.add_argument("--hidden", type=int, default=2560, help="width, a multiple of 320; 640 for --mib 64")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="served and sent")
    parser.add_argument("--versions", type=int, default=20, help="published and counted; default 20")
    parser.add_argument("--groups", type=int, default=2, help="of 8 completions, sampled at the same time; default 2")
    parser.add_argument("--tokens", type=int, default=128, help="of the longest completion; default 128")
    parser.add_argument("--bucket-mib", type=int, default=64, help="weight_sync.bucket_mib; default 64")
    parser.add_argument("--backend", choices=BACKENDS, default=backend, help=f"default here: {backend}")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    seen = torch.cuda.device_count()
    if args.backend == "nccl" and seen < 2:
        parser.error(f"{ONE_GPU.format(needed=2, seen=seen)} `--backend gloo` takes both sides on one, or on the CPU.")
    if args.versions < 2 or args.hidden <= 0 or args.hidden % 320:
        parser.error("--versions is at least 2, and --hidden a multiple of 320")
    return args


def main() -> None:
    args = arguments()
    start_logging("trainer", logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contexts end, and with them what they started
    load = os.getloadavg()[0]
    with own_valkey() as url, reward_service() as reward, tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory), args.mib, args.hidden, getattr(torch, args.dtype))
        os.environ |= environment(args, model, url, reward.address)
        measured = pauses(url, args.versions, args.backend)
    found = {
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "backend": args.backend,
        "versions": args.versions,
        "goal": GOAL,
        **measured,
    }
    print(json.dumps(found) if args.json else "\n".join(lines(found)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
