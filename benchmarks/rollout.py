"""`python -m benchmarks.rollout`: tokens a second of the whole path beside offline `vllm.LLM.generate` in the same run.

The path is Redis, a rollout server with real vLLM, the reward service over gRPC, Redis. Offline has the same prompts,
seeds, parameters, engine settings and machine, and gets all prompts in one call. They take turns, in processes of their
own; the rate of each is the median of its rounds, and a first round, which warms both, is not counted.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.control_plane import valkey
from retort.config import RunConfig, load_config
from retort.questions import questions_of
from retort.queues import TrainerQueue, connect
from retort.rollouts import RolloutGroup, WorkItem
from retort.weight_sync import Snapshot, TensorSpec, WeightManifest, authorization
from services.trainer.admission import GroupReader, WorkList
from services.trainer.prompts import encode_prompt
from services.trainer.weight_sender import Probe, WeightSender
from tests.reward_service import reward_service

CONFIG = Path("configs/tiny-cpu.toml")
STALL_S = 300.0


def offline(config: RunConfig, pipe: Connection) -> None:
    """Answers each list of work items with the seconds of sampling them and the number of tokens."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.rollout.kv_cache_gib)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    # As services/rollout/vllm_engine.py on a CPU.
    llm = LLM(
        model=config.model.path,
        dtype=config.model.dtype,
        max_model_len=config.model.max_length,
        seed=config.seed,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        max_num_seqs=min(config.rollout.concurrent_groups * config.trainer.group_size, 512),
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(config.model.max_length, 8192),
        enforce_eager=True,
    )
    pipe.send(())
    while items := pipe.recv():
        start = time.perf_counter()
        prompts = [TokensPrompt(prompt_token_ids=item.prompt_ids) for item in items for _ in item.seeds]
        parameters = [
            SamplingParams(
                temperature=item.sampling.temperature,
                top_p=item.sampling.top_p,
                top_k=0,
                max_tokens=item.sampling.max_completion_tokens,
                seed=seed,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for item in items
            for seed in item.seeds
        ]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        pipe.send((time.perf_counter() - start, tokens))


class Trainer:
    """The trainer's side of the queue and of the weight sync; it learns nothing."""

    def __init__(self, url: str, config: RunConfig) -> None:
        self._queue = TrainerQueue(connect(url), config.key_prefix, epoch=1)
        self._queue.open()
        self._sender = WeightSender(
            self._queue, config.weight_sync, epoch=1, backend="gloo", authorization=authorization()
        )
        self._sender.publish(*_weights(config))
        self._reader = GroupReader(self._queue, "train", lambda _: self._sync(), STALL_S)

    def join(self, items: list[WorkItem]) -> float:
        """The time (monotonic) at which the first of these groups, of which one is enough, was here."""
        self._queue.issue(items)
        next(self._reader.arrivals(items, 1))
        return time.monotonic()

    def collect(self, items: list[WorkItem]) -> list[RolloutGroup]:
        self._queue.issue(items)
        return self._reader.collect(items)

    def _sync(self) -> None:
        self._sender.sync()


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
def rollout_server() -> Iterator[float]:
    """A replica as `retort run` starts it; when its process was started (monotonic)."""
    command = [sys.executable, "-m", "services.rollout", "--config", str(CONFIG), "--name", "rollout-0"]
    started = time.monotonic()
    process = subprocess.Popen(command)
    try:
        yield started
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def measure(url: str, groups: int, rounds: int) -> dict[str, Any]:
    # Version 0 may sample every round.
    settings = [f"trainer.groups_per_step={groups}", "trainer.max_staleness=1000"]
    config = load_config(CONFIG, settings)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    train, _ = questions_of(config)
    work = WorkList(config, train, [], lambda question: encode_prompt(tokenizer, question.messages))
    trainer = Trainer(url, config)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with rollout_server() as started:
        join_s = trainer.join(work.of_step(1)) - started
        child = multiprocessing.get_context("spawn").Process(target=offline, args=(config, theirs), daemon=False)
        child.start()
        theirs.close()
        ours.recv()
        found: dict[str, list[float]] = {"path": [], "offline": []}
        tokens = {"path": 0, "offline": 0}
        for step in range(1, rounds + 2):
            items = work.of_step(step)
            ours.send(items)
            seconds, sampled = ours.recv()
            found["offline"].append(sampled / seconds)
            tokens["offline"] += sampled
            start = time.perf_counter()
            done = trainer.collect(items)
            sampled = sum(len(one.completion_ids) for group in done for one in group.rollouts)
            found["path"].append(sampled / (time.perf_counter() - start))
            tokens["path"] += sampled
        ours.send([])
        child.join()
    ratios = [path / alone for path, alone in zip(found["path"][1:], found["offline"][1:], strict=True)]
    return {
        "tokens_per_s": {name: statistics.median(rates[1:]) for name, rates in found.items()},
        "path_beside_offline": statistics.median(ratios),
        "lowest_and_highest": [min(ratios), max(ratios)],
        "join_s": join_s,
        "tokens": tokens,
        "groups_of_a_round": groups,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--groups", type=int, default=64, help="of 8 completions, in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with valkey() as url, reward_service() as reward:
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
