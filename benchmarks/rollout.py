"""`python -m benchmarks.rollout`: tokens a second of the whole path beside offline `vllm.LLM.generate` in the same run.

The path is Redis, a rollout server with real vLLM, the reward service over gRPC, Redis. Offline has the same prompts,
seeds, parameters, engine settings and machine, and gets all prompts in one call. They take turns, in processes of their
own; the rate of each is the median of its rounds, and a first round, which warms both, is not counted. At the end the
server is killed in the middle of a round, and another takes its place.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from retort.config import RunConfig, load_config
from retort.identity import identity_of
from retort.questions import questions_of
from retort.queues import TrainerQueue, connect
from retort.rollouts import RolloutGroup, WorkItem
from retort.weight_sync import Snapshot, TensorSpec, WeightManifest, authorization
from services.trainer.admission import GroupReader, WorkList
from services.trainer.prompts import encode_prompt
from services.trainer.weight_sender import Probe, WeightSender
from simulation.command import own_valkey
from tests.reward_service import reward_service

CONFIG = Path("configs/tiny-cpu.toml")
STALL_S = 300.0


def offline(config: RunConfig, pipe: Connection) -> None:
    """Answers each list of work items with the seconds of sampling them and the number of tokens."""
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    from services.rollout.vllm_engine import engine_settings, sampling_parameters

    os.environ["RETORT_ENGINE_PARENT"] = str(os.getpid())  # the engine's process ends with this one
    llm = LLM(**engine_settings(config))
    pipe.send(())
    while items := pipe.recv():
        start = time.perf_counter()
        prompts = [TokensPrompt(prompt_token_ids=item.prompt_ids) for item in items for _ in item.seeds]
        parameters = [sampling_parameters(item.sampling, seed) for item in items for seed in item.seeds]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        pipe.send((time.perf_counter() - start, tokens))


class Trainer:
    """The trainer's side of the queue and of the weight sync; it learns nothing."""

    def __init__(self, url: str, config: RunConfig) -> None:
        self._queue = TrainerQueue(connect(url), config.key_prefix, epoch=1)
        self._queue.open()
        self._sender = WeightSender(
            self._queue,
            config.weight_sync,
            epoch=1,
            backend="gloo",
            authorization=authorization(),
            identity=identity_of(config, AutoTokenizer.from_pretrained(config.model.path)),
        )
        self._sender.publish(*_weights(config))
        self._reader = GroupReader(self._queue, "train", lambda _: self._sync(), STALL_S)

    def first(self, items: list[WorkItem]) -> float:
        """When (monotonic) one of the items' groups was here, the first of them."""
        self._queue.issue(items)
        next(self._reader.arrivals(items, 1))
        return time.monotonic()

    def leased(self) -> int:
        """Groups in the hands of a replica, be it there or not."""
        return self._queue.in_flight("train").leased

    def collect(self, items: list[WorkItem]) -> list[RolloutGroup]:
        self._queue.issue(items)
        return self._reader.collect(items)

    def _sync(self) -> None:
        self._sender.sync()


def make_model(directory: Path, hidden: int, layers: int) -> str:
    """A random one of the demo's kind and vocabulary: the engine has more to do, and what is around it the same."""
    tiny = load_config(CONFIG).model.path
    config = AutoConfig.from_pretrained(tiny)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = hidden, 3 * hidden, layers
    config.num_attention_heads = config.num_key_value_heads = hidden // config.head_dim
    config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    return str(directory)


def _weights(config: RunConfig) -> tuple[Snapshot, Probe]:
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    specs = [TensorSpec(name=name, shape=list(tensor.shape), dtype="float32") for name, tensor in tensors]
    ids = list(range(20, 44))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    snapshot = Snapshot.take(0, WeightManifest.of(specs, bucket_bytes=2**20), tensors)
    return snapshot, Probe(ids, logprobs[range(len(ids) - 1), ids[1:]].tolist())


@contextmanager
def process(*command: str, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Ends with the context, whatever ends that. What it prints goes to stderr: stdout has the figures."""
    process = subprocess.Popen([sys.executable, "-m", *command], env=env, stdout=sys.stderr)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def offline_engine(config: RunConfig) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=offline, args=(config, theirs))
    child.start()
    theirs.close()
    try:
        ours.recv()
        yield ours
        ours.send([])
        child.join(30)
    finally:
        child.terminate()


def measure(url: str, groups: int, rounds: int) -> dict[str, Any]:
    # Version 0 may sample every round.
    config = load_config(CONFIG, [f"trainer.groups_per_step={groups}", "trainer.max_staleness=1000"])
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    train, _ = questions_of(config)
    work = WorkList(config, train, [], lambda question: encode_prompt(tokenizer, question.messages))
    trainer = Trainer(url, config)
    server = ("services.rollout", "--config", str(CONFIG), "--name")
    started = time.monotonic()
    with process(*server, "rollout-0") as replica:
        join_s = trainer.first(work.of_step(1)) - started
        with offline_engine(config) as pipe:
            found = [compare(pipe, trainer, work.of_step(step)) for step in range(1, rounds + 2)]
        items = work.of_step(rounds + 2)
        trainer.first(items)
        replica.kill()
        replica.wait()
    redone = trainer.leased()
    started = time.monotonic()
    with process(*server, "rollout-1"):
        trainer.collect(items)
        recovery_s = time.monotonic() - started
    ratios = [path / alone for path, alone in found[1:]]
    return {
        "tokens_per_s": statistics.median(path for path, _ in found[1:]),
        "tokens_per_s_offline": statistics.median(alone for _, alone in found[1:]),
        "path_beside_offline": statistics.median(ratios),
        "lowest_and_highest": [min(ratios), max(ratios)],
        "join_s": join_s,
        "killed": {"groups": groups, "redone": redone, "all_there_after_s": recovery_s},
    }


def compare(offline: Connection, trainer: Trainer, items: list[WorkItem]) -> tuple[float, float]:
    """Tokens a second of the whole path, and of the engine alone."""
    offline.send(items)
    seconds, tokens = offline.recv()
    start = time.perf_counter()
    groups = trainer.collect(items)
    path_s = time.perf_counter() - start
    return sum(len(one.completion_ids) for group in groups for one in group.rollouts) / path_s, tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--groups", type=int, default=64, help="of 8 completions, in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=0, help="width of a random model; default: the demo's, of 128")
    parser.add_argument("--layers", type=int, default=8, help="of that model")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contexts end, and with them what they started
    load = os.getloadavg()[0]
    with own_valkey() as url, reward_service() as reward, tempfile.TemporaryDirectory() as directory:
        if args.hidden:
            os.environ["RETORT_MODEL__PATH"] = make_model(Path(directory), args.hidden, args.layers)
        os.environ |= {
            "RETORT_REDIS__URL": url,
            "RETORT_REWARD__ADDRESS": reward.address,
            "RETORT_ROLLOUT__CONCURRENT_GROUPS": str(args.groups),
            "CONTROL_TOKEN": uuid.uuid4().hex,
        }
        measured = measure(url, args.groups, args.rounds)
    found = {"load_before": load, "cores": os.cpu_count(), **measured}
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
