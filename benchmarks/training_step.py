"""A whole RLSD step of the trainer, beside a plain loop of transformers: `python -m benchmarks.training_step [--json]`.

Old log-probs, the teacher's over its longer prompts, updates and the teacher's own step, through the code of a run, on
a model with random weights. The plain loop does the same one row at a time, in the same types, with the library's own
attention and head. `--device cuda` takes Qwen3-4B at the lengths that `retort plan` takes for the reference run, and
says beside the snapshot what a copy on the device costs; `--profile FILE` keeps a trace of the last step. `--compile`
and `--offload teacher optimizer` put a second Retort beside the first, with `trainer.compile` and `trainer.offload`
set. `--growth` repeats the first over lengths, micro-batch budgets and ranks. Each measurement is a process of its own;
wall time, so that the machine has to be idle, and on one thread CPU time too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.trainer import GROUP_SIZE, a_step, language_model
from retort.cli.plan.model_shape import KNOWN_MODELS
from retort.weight_sync import Snapshot, TensorSpec, WeightManifest
from services.trainer.attention import PACKED_ATTENTION
from services.trainer.batch import StepBatch
from services.trainer.blocks import start_compiler
from services.trainer.guards import Guards
from services.trainer.journal import Journal
from services.trainer.operations import finish, matmul_rate
from services.trainer.parts import freeze_heap
from services.trainer.policy import Policy
from services.trainer.teacher import Teacher
from services.trainer.train import learn
from services.trainer.work import peak_bytes, work_metrics
from tests.training import a_config

MODELS = ("tiny", "small", "4b")
SIDES = ("retort", "plain", "varied")
"""`varied` is Retort with what `--compile` and `--offload` say."""
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BUDGETS = (1024, 2048, 4096, 8192, 16384)
RANKS = (1, 2)
NOT_OF_QWEN3 = ("model_type", "mlp_bias")
"""Keys of a shape that its configuration class does not take."""
TEACHER_RATE, LEARNING_RATE = 0.05, 1e-6
Step = Callable[[], Mapping[str, float]]


def qwen3_4b(attention: str, device: torch.device) -> Qwen3ForCausalLM:
    """Qwen3-4B's shape (its config.json) with random weights, made on the device in float32."""
    shape = msgspec.structs.asdict(KNOWN_MODELS["Qwen/Qwen3-4B"])
    config = Qwen3Config(**{name: value for name, value in shape.items() if name not in NOT_OF_QWEN3})
    config._attn_implementation = attention
    torch.manual_seed(0)
    with device:
        model: Qwen3ForCausalLM = Qwen3ForCausalLM(config)
    model.train()
    return model


def make_model(args: argparse.Namespace, attention: str) -> Any:
    if args.model == "4b":
        return qwen3_4b(attention, torch.device(args.device))
    model = language_model(args.model, attention)
    return model.to(args.device)


def make_batch(args: argparse.Namespace) -> StepBatch:
    """Groups in which every other completion is right, each with a teacher that is shown a sibling's solution."""
    batch = a_step(args.groups, args.prompt, args.longest)
    batch.teacher_prompts = [[*prompt, *prompt, *prompt] for prompt in batch.prompts]
    batch.has_demonstration = torch.ones(len(batch.rollouts), dtype=torch.bool)
    return batch


def retort_step(args: argparse.Namespace, batch: StepBatch) -> tuple[Step, Callable[[], dict[str, float]]]:
    """The step of a run, and what a snapshot of its policy costs."""
    precision = {"dtype": "bfloat16" if args.device == "cuda" else "float32", "path": args.model}
    settings = {
        "groups_per_step": args.groups,
        "group_size": GROUP_SIZE,
        "groups_per_update": max(1, args.groups // args.updates),
        "micro_batch_tokens": args.budget,
        "activation_checkpointing": args.device == "cuda",
        "update_order": "group",
        "compile": args.compile if args.side == "varied" else "none",
        "offload": args.offload if args.side == "varied" else [],
        "max_logprob_gap": 1e9,  # the random model did not sample these completions
    }
    config = a_config(model=precision, trainer=settings, method={"name": "rlsd"})
    start_compiler(config, torch.device(args.device))
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    dtype = getattr(torch, config.model.dtype)
    policy = Policy(make_model(args, PACKED_ATTENTION), config.trainer, mesh, dtype=dtype, temperature=1.0)
    teacher = Teacher(policy, on_host="teacher" in config.trainer.offload)
    specs = [TensorSpec(name=name, shape=shape, dtype=config.model.dtype) for name, shape in policy.specs]
    manifest = WeightManifest.of(specs, 256 * 2**20)

    def step() -> Mapping[str, float]:
        journal = Journal()
        updates = learn(config, policy, teacher, None, batch, Guards(config.trainer, journal.keep_step), journal)
        teacher.follow(policy, rate=TEACHER_RATE, finite_updates=len(updates))
        finish(policy.device)
        seconds = journal.seconds
        return {
            **{f"timing_s/{name}": spent for name, spent in seconds.items()},
            **work_metrics(policy.take_work(), seconds),
        }

    def snapshot() -> dict[str, float]:
        taking, copying = [], []
        whole = torch.empty(sum(spec.num_bytes for spec in specs), dtype=torch.uint8, device=policy.device)
        for _ in range(3):
            taking.append(timed(policy.device, lambda: Snapshot.take(0, manifest, policy.full_tensors())))
            copying.append(timed(policy.device, whole.clone))
        gigabytes = whole.numel() / 1e9
        return {
            "snapshot_gb_per_s": gigabytes / min(taking),
            "copy_gb_per_s": gigabytes / min(copying),
            "snapshot_vs_copy": min(copying) / min(taking),
        }

    return step, snapshot


def plain_step(args: argparse.Namespace, batch: StepBatch) -> Step:
    """The same step one row at a time: three scorings, the reweighted surrogate, Adam, the teacher's average."""
    device = torch.device(args.device)
    model, teacher = make_model(args, "sdpa"), make_model(args, "sdpa")
    if args.device == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def logprobs(network: Any, prompt: list[int], completion: list[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *completion]], device=device)
        with torch.autocast("cuda", torch.bfloat16) if args.device == "cuda" else nullcontext():
            logits = network(ids, logits_to_keep=len(completion) + 1, use_cache=False).logits[0, :-1]
        targets = ids[0, len(prompt) :, None]
        scored: Tensor = logits.float().log_softmax(-1).gather(-1, targets)[:, 0]
        return scored

    rows = list(zip(batch.prompts, batch.teacher_prompts, batch.completions, batch.advantages.tolist(), strict=True))
    rows_per_update = max(1, args.groups // args.updates) * GROUP_SIZE

    def step() -> Mapping[str, float]:
        with torch.no_grad():
            later = rows[rows_per_update:]  # what the first update starts from is what its own pass says
            old = [logprobs(model, prompt, completion) for prompt, _, completion, _ in later]
            taught = [logprobs(teacher, shown or [], completion) for _, shown, completion, _ in rows]
        for start in range(0, len(rows), rows_per_update):
            for row in range(start, min(len(rows), start + rows_per_update)):
                prompt, _, completion, advantage = rows[row]
                new = logprobs(model, prompt, completion)
                factor = 0.5 + 0.5 * ((taught[row] - new.detach()) * (1 if advantage > 0 else -1)).exp().clamp(0.8, 1.2)
                ratio = (new - (new.detach() if row < rows_per_update else old[row - rows_per_update])).exp()
                weighted = advantage * factor
                loss = -torch.minimum(weighted * ratio, weighted * ratio.clamp(0.8, 1.28))
                (loss.mean() / rows_per_update).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, TEACHER_RATE)
        finish(device)
        return {}

    return step


def timed(device: torch.device, work: Callable[[], object]) -> float:
    finish(device)
    started = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - started


@contextmanager
def one_rank_of_all(device: str) -> Iterator[None]:
    """The process group that torchrun's variables describe."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(args: argparse.Namespace) -> None:
    """In a process of its own, or in one a rank: a step to warm up, then those that are timed. Prints one object."""
    with one_rank_of_all(args.device):
        batch = make_batch(args)
        device = torch.device(args.device)
        before = peak_bytes(device) if args.device == "cpu" else 0
        step, snapshot = (plain_step(args, batch), None) if args.side == "plain" else retort_step(args, batch)
        first = timed(device, step)
        freeze_heap()
        seconds: list[float] = []
        cpu_seconds: list[float] = []
        said: Mapping[str, float] = {}
        for _ in range(args.repeats):
            started, cpu_started = time.perf_counter(), time.process_time()
            said = step()
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
        if args.profile and args.side != "plain":
            with torch.profiler.profile() as profile:
                step()
            profile.export_chrome_trace(args.profile)
        peak = said.get("perf/max_memory_allocated_gb", peak_bytes(device) / 1e9) - before / 1e9
        found = {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds), "first_seconds": first, "peak_gb": peak}
        found |= {**said, **(snapshot() if snapshot else {})}
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)


def of_side(args: argparse.Namespace, side: str, **changed: Any) -> dict[str, float]:
    """What `measure` found in a process of its own, or in one a rank."""
    given = {"device": args.device, "model": args.model, "groups": args.groups, "prompt": args.prompt}
    given |= {"longest": args.longest, "budget": args.budget, "updates": args.updates, "repeats": args.repeats}
    ranks = changed.pop("ranks", 1)
    words = [*chain.from_iterable((f"--{name}", str(value)) for name, value in (given | changed).items())]
    words += ["--compile", args.compile] if args.compile != "none" else []
    words += ["--offload", *args.offload] if args.offload else []
    # Of the last of its sides.
    keep = ["--profile", args.profile] if args.profile and side == retort_sides(args)[-1] and not changed else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.training_step", "--side", side, *words, *keep]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def retort_sides(args: argparse.Namespace) -> list[str]:
    return ["retort", "varied"] if args.compile != "none" or args.offload else ["retort"]


def side_by_side(args: argparse.Namespace) -> dict[str, Any]:
    sides = {side: of_side(args, side) for side in [*retort_sides(args), "plain"]}
    batch, dtype = make_batch(args), torch.bfloat16 if args.device == "cuda" else torch.float32
    tokens = sum(map(len, batch.prompts)) + int(batch.lengths.sum())
    retort, plain = sides["retort"], sides["plain"]
    return {
        "trained_tokens_per_s": tokens / retort["seconds"],
        "tokens_per_s_vs_plain": plain["seconds"] / retort["seconds"],
        "peak_memory_vs_plain": retort["peak_gb"] / plain["peak_gb"],
        **compared(sides),
        **sides,
        "conditions": {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "one thread",
            "matmul_tflops": matmul_rate(torch.device(args.device), dtype) / 1e12,
            "tokens": tokens,
            "teacher_tokens": tokens + 2 * sum(map(len, batch.prompts)),
            "torch": torch.__version__,
            **{name: getattr(args, name) for name in ("model", "groups", "prompt", "longest", "budget", "updates")},
        },
    }


def compared(sides: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What compiling and offloading make of the step, once it has been compiled."""
    if "varied" not in sides:
        return {}
    retort, varied = sides["retort"], sides["varied"]
    return {
        "varied_tokens_per_s_vs_retort": retort["seconds"] / varied["seconds"],
        "varied_tokens_per_cpu_s_vs_retort": retort["cpu_seconds"] / varied["cpu_seconds"],
        "varied_peak_memory_vs_retort": varied["peak_gb"] / retort["peak_gb"],
    }


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s and peak memory of Retort's side; one thing grows, the rest stays as asked for."""

    def at(**changed: Any) -> dict[str, float]:
        found = of_side(args, "retort", **changed)
        batch = make_batch(argparse.Namespace(**{**vars(args), **changed}))
        tokens = sum(map(len, batch.prompts)) + int(batch.lengths.sum())
        names = ("peak_gb", "perf/packing_efficiency", "perf/mfu")
        return {"tokens_per_s": tokens / found["seconds"], **{name: found[name] for name in names}}

    lengths = [length for length in LENGTHS if length <= args.grow_to]
    return {
        "longest": {length: at(longest=length, groups=1, budget=args.grow_to + 3 * args.prompt) for length in lengths},
        "budget": {budget: at(budget=budget) for budget in BUDGETS},
        "ranks": {ranks: at(ranks=ranks) for ranks in RANKS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=MODELS, help="default: tiny, on a GPU 4b")
    parser.add_argument("--groups", type=int, help="of 8 completions; default 4, on a GPU 8")
    parser.add_argument("--prompt", type=int, help="tokens; the teacher's prompt is three times as long")
    parser.add_argument("--longest", type=int, help="tokens of the longest completion; the shortest has a tenth")
    parser.add_argument("--budget", type=int, help="tokens of a micro-batch; default 2048, on a GPU 32768")
    parser.add_argument("--updates", type=int, default=2, help="optimizer updates of the step")
    parser.add_argument("--repeats", type=int, default=2, help="the least of so many counts")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", default="none", help="trainer.compile of a second side"
    )
    parser.add_argument("--offload", nargs="+", default=[], metavar="WHAT", help="trainer.offload of a second side")
    parser.add_argument("--growth", action="store_true", help="over lengths, budgets and ranks instead")
    parser.add_argument("--grow-to", type=int, default=LENGTHS[-1], help="longest completion of --growth")
    parser.add_argument("--profile", metavar="FILE", help="keep a trace of a step, for ui.perfetto.dev")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine")
    on_gpu = args.device == "cuda"
    defaults = {"model": "4b", "groups": 8, "prompt": 256, "longest": 1800, "budget": 32768}
    small = {"model": "tiny", "groups": 4, "prompt": 128, "longest": 512, "budget": 2048}
    for name, value in (defaults if on_gpu else small).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.side:
        measure(args)
        return
    found = growth(args) if args.growth else side_by_side(args)
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
