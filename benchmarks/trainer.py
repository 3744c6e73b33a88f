"""An update of the trainer beside others' on the same completions: `python -m benchmarks.trainer [--json]`.

The others are a plain padded loop of transformers and TRL's GRPOTrainer without its generation, once with its own
defaults (bfloat16 autocast, activation checkpointing) and once, as Retort here, without both. Same model, loss (GRPO,
token mean) and optimizer, in a process each, taking turns. Completions are 0.1 to 1 times as long as the longest. Rates
are in CPU seconds on one thread, which other work on the machine disturbs less than wall time. Gradients are compared.

TRL is installed beside the project's packages, into an environment under `build`. A whole step, on a GPU too, and its
growth with lengths, ranks and budgets: `benchmarks.training_step`.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from retort.config import MethodConfig
from services.trainer.attention import PACKED_ATTENTION
from services.trainer.batch import StepBatch
from services.trainer.blocks import start_compiler
from services.trainer.operations import ModelCost
from services.trainer.packing import Span
from services.trainer.parts import freeze_heap
from services.trainer.policy import Policy
from services.trainer.update import update_policy
from tests.training import a_batch, a_config, a_group, a_rollout

GROUP_SIZE = 8
MODELS = ("tiny", "small")
PEERS = ("padded", "trl", "trl_float32")
TRL_VERSION = "1.16.0"
TRL_ENVIRONMENT = Path("build/benchmarks-trl")
Gradients = dict[str, torch.Tensor]


def language_model(name: str, attention: str) -> Any:
    """`tiny` is the demo's (vocabulary 614); `small` a random one of 50.7 M parameters with Qwen3's vocabulary."""
    if name == "tiny":
        return AutoModelForCausalLM.from_pretrained(
            "models/tiny", dtype=torch.float32, attn_implementation=attention
        ).train()
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).train()


def a_step(groups: int, prompt: int, longest: int) -> StepBatch:
    """Groups in which every other completion is right, so that none is idle. Old log-probs are those of sampling."""
    dice = random.Random(0)

    def ids(count: int) -> list[int]:
        return [dice.randrange(20, 600) for _ in range(count)]

    def group() -> Any:
        rollouts = [a_rollout(ids(dice.randint(longest // 10, longest))) for _ in range(GROUP_SIZE)]
        return a_group(*rollouts, prompt_ids=ids(prompt))

    batch = a_batch([group() for _ in range(groups)], [1.0, -1.0] * (groups * GROUP_SIZE // 2))
    batch.teacher_logprobs = torch.zeros(int(batch.lengths.sum()))
    return batch


def packed(model: Any, batch: StepBatch, token_budget: int, compiler: str) -> Callable[[], Gradients]:
    """Retort's own update. `step` is where a gradient is whole, so it is read there."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    settings = {
        "activation_checkpointing": False,
        "micro_batch_tokens": token_budget,
        "max_grad_norm": 1e9,
        "weight_decay": 0.0,
        "compile": compiler,
    }
    config = a_config(trainer=settings)
    start_compiler(config, torch.device("cpu"))
    policy = Policy(model, config.trainer, init_device_mesh("cpu", (1,)), dtype=torch.float32, temperature=1.0)
    rows = list(range(len(batch.rollouts)))
    batch.old_logprobs, _ = policy.score(batch, rows, batch.prompts)
    batch.rollout_logprobs = batch.old_logprobs
    method, gradients, step = MethodConfig(name="grpo", aggregation="token_mean"), Gradients(), policy.step

    def keeping_the_first(learning_rate: float) -> float:
        if not gradients:
            pairs = zip(policy.names, policy.parameters(), strict=True)
            gradients.update({name: _whole(p.grad) for name, p in pairs})
        return step(learning_rate)

    policy.step = keeping_the_first  # type: ignore[method-assign]  # the gradient is gone after the real one

    def update() -> Gradients:
        update_policy(policy, batch, rows, method, learning_rate=1e-6)
        return gradients

    return update


def padded(model: Any, batch: StepBatch, rows_at_once: int) -> Callable[[], Gradients]:
    """Rows as they stand, padded on the right to the longest of a micro-batch; logits of all but the prompts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    rows, tokens, prompt = len(batch.rollouts), int(batch.lengths.sum()), len(batch.prompts[0])
    gradients = Gradients()

    def update() -> Gradients:
        for start in range(0, rows, rows_at_once):
            part = range(start, min(rows, start + rows_at_once))
            longest = prompt + int(batch.lengths[part].max())
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for index, row in enumerate(part):
                sequence = torch.tensor([*batch.prompts[row], *batch.completions[row]])
                ids[index, : len(sequence)], mask[index, : len(sequence)] = sequence, 1
            logits = model(ids, attention_mask=mask, logits_to_keep=longest - prompt + 1, use_cache=False).logits
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]
            ratio = (logprobs - logprobs.detach()).exp()
            advantages = batch.advantages[part].float()[:, None]
            losses = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
            ((losses * mask[:, prompt:]).sum() / tokens).backward()
        if not gradients:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()
        return gradients

    return update


class Turns:
    """A contender's side of the talk with `side_by_side`: the cost of an update for every line that comes in."""

    def __init__(self, gradients: str) -> None:
        self._gradients = gradients
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def keep(self, gradients: Gradients) -> None:
        save_file(gradients, self._gradients)

    def begin(self) -> None:
        sys.stdin.readline()
        self._start = time.process_time()

    def end(self) -> None:
        seconds = time.process_time() - self._start
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before) * 1024
        print(json.dumps({"cpu_s": seconds, "peak_bytes": peak}), flush=True)


def contend(args: argparse.Namespace) -> None:
    """In a process of its own: an update, whose gradient is kept, and then those that are timed."""
    torch.set_num_threads(1)
    batch = a_step(args.groups, args.prompt, args.longest)
    if args.contender.startswith("trl"):
        from benchmarks import trl_step  # only its own environment has TRL

        with tempfile.TemporaryDirectory() as folder:
            turns = Turns(args.gradients)
            trl_step.train(language_model(args.model, "sdpa"), batch, turns, args=args, folder=Path(folder))
        return
    turns = Turns(args.gradients)
    ours = args.contender == "packed"
    model = language_model(args.model, PACKED_ATTENTION if ours else "sdpa")
    update = packed(model, batch, args.budget, args.compile) if ours else padded(model, batch, args.rows)
    turns.keep(update())
    freeze_heap()
    for _ in range(args.repeats):
        turns.begin()
        update()
        turns.end()


def python_with_trl() -> str:
    """The interpreter of an environment that has TRL, and the project's packages through a .pth file."""
    python = TRL_ENVIRONMENT / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", TRL_ENVIRONMENT], check=True)
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    if not (own / f"trl-{TRL_VERSION}.dist-info").exists():
        (own / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"trl=={TRL_VERSION}"], check=True)
    return str(python)


def matmul_rate() -> float:
    """Floating-point operations a CPU second of a product of two matrices of 1024 x 1024 on one thread."""
    torch.set_num_threads(1)
    left, right = torch.randn(2, 1024, 1024)
    seconds = []
    for _ in range(8):
        start = time.process_time()
        left @ right
        seconds.append(time.process_time() - start)
    return 2 * 1024**3 / min(seconds)


def operations(model: Any, batch: StepBatch) -> float:
    """Of forward and backward of an update that shares all prompts, without what is computed twice."""
    prompts = [Span(len(group.prompt_ids), 0) for group in batch.groups]
    completions = [Span(len(c), len(p)) for p, c in zip(batch.prompts, batch.completions, strict=True)]
    return 3 * ModelCost.of(model).forward([*prompts, *completions], int(batch.lengths.sum()))


def side_by_side(args: argparse.Namespace) -> dict[str, Any]:
    """The least CPU seconds of `args.repeats` updates of each, their peaks of memory and their gradients."""
    names, trl = ("packed", *PEERS), python_with_trl()
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory) / name for name in names}
        children = {
            name: subprocess.Popen(
                [
                    *(trl if name.startswith("trl") else sys.executable, "-m", "benchmarks.trainer", *sys.argv[1:]),
                    *("--contender", name, "--gradients", files[name]),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in names
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for name, child in children.items():
                assert child.stdin and child.stdout
                child.stdin.write("\n")
                child.stdin.flush()
                found[name].append(json.loads(child.stdout.readline()))
        for child in children.values():
            child.communicate()
        gradients = {name: load_file(file) for name, file in files.items()}
    return {
        "cpu_s": {name: min(one["cpu_s"] for one in ones) for name, ones in found.items()},
        "peak_bytes": {name: ones[-1]["peak_bytes"] for name, ones in found.items()},
        "gradient_difference": {name: difference(gradients["packed"], gradients[name]) for name in PEERS},
    }


def _whole(gradient: torch.Tensor | None) -> torch.Tensor:
    assert isinstance(gradient, DTensor)
    whole: torch.Tensor = gradient.full_tensor()
    return whole.clone()


def difference(ours: Gradients, theirs: Gradients) -> float:
    """The norm of the difference of two gradients, over that of theirs."""
    squares = math.fsum(float((ours[name] - gradient).square().sum()) for name, gradient in theirs.items())
    return math.sqrt(squares / math.fsum(float(gradient.square().sum()) for gradient in theirs.values()))


def report(args: argparse.Namespace) -> dict[str, Any]:
    found = side_by_side(args)
    seconds, peaks = found["cpu_s"], found["peak_bytes"]
    model, batch = language_model(args.model, "sdpa"), a_step(args.groups, args.prompt, args.longest)
    tokens, rate = sum(map(len, batch.prompts)) + int(batch.lengths.sum()), matmul_rate()
    return {
        "tokens_per_s": tokens / seconds["packed"],
        **{f"tokens_per_s_vs_{peer}": seconds[peer] / seconds["packed"] for peer in PEERS},
        **{f"peak_memory_vs_{peer}": peaks["packed"] / peaks[peer] for peer in PEERS},
        "flops_vs_matmul_rate": operations(model, batch) / seconds["packed"] / rate,
        **found,
        "conditions": {
            "model": args.model,
            "vocabulary": model.config.vocab_size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "rows": len(batch.rollouts),
            "tokens": tokens,
            "prompt": args.prompt,
            "longest_completion": args.longest,
            "micro_batch_tokens": args.budget,
            "padded_rows_at_once": args.rows,
            "compile": args.compile,
            "matmul_gflops": rate / 1e9,
            "threads": 1,
            "repeats": args.repeats,
            "torch": torch.__version__,
            "trl": TRL_VERSION,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--groups", type=int, default=8, help="of 8 completions")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest completion")
    parser.add_argument("--budget", type=int, default=1024, help="tokens of a packed micro-batch")
    parser.add_argument("--rows", type=int, default=8, help="rows of a padded micro-batch, TRL's too")
    parser.add_argument(
        "--compile", choices=["none", "inductor"], default="none", help="trainer.compile of Retort's side"
    )
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many counts")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.groups * GROUP_SIZE % args.rows:
        parser.error(f"--rows {args.rows} does not divide the {args.groups * GROUP_SIZE} rows; TRL needs it to")
    if args.contender:
        contend(args)
        return
    found = report(args)
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
