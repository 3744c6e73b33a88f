"""What a trainer consists of beside its connections, for training and for `retort replay` alike."""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedTokenizerBase

from retort.config import RunConfig
from retort.questions import questions_of
from retort.rollouts import RolloutGroup
from services.trainer.admission import WorkList
from services.trainer.batch import StepBatch, assemble
from services.trainer.blocks import start_compiler
from services.trainer.lora import add_adapters
from services.trainer.policy import Policy, load_language_model
from services.trainer.prompts import encode_prompt
from services.trainer.steps import Assemble


def make_work(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> WorkList:
    """The questions of the run, as prompts of this tokenizer."""
    train, validation = questions_of(config)
    return WorkList(config, train, validation, lambda question: encode_prompt(tokenizer, question.messages))


def make_policy(config: RunConfig) -> Policy:
    """Version 0, sharded over the ranks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start_compiler(config, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    dtype = getattr(torch, config.model.dtype)
    language_model = load_language_model(config.model)
    adapters = add_adapters(language_model, config.lora, dtype=dtype, seed=config.seed) if config.lora.rank else None
    return Policy(
        language_model,
        config.trainer,
        mesh,
        dtype=dtype,
        temperature=config.sampling.temperature,
        adapters=adapters,
    )


def assembler(config: RunConfig, work: WorkList, tokenizer: PreTrainedTokenizerBase) -> Assemble:
    """From the groups of a step to its batch."""

    def assemble_step(step: int, groups: list[RolloutGroup]) -> StepBatch:
        asked = [work.question(group) for group in groups]
        idle_too = config.trainer.score_idle_rows
        return assemble(step, groups, asked, tokenizer, config.method, scores_idle_rows=idle_too)

    return assemble_step


@contextmanager
def start_ranks(config: RunConfig) -> Iterator[bool]:
    """The trainer ranks as one process group, gloo for what lies on the CPU and NCCL for what lies on a GPU."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.use_deterministic_algorithms(config.trainer.deterministic)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The other ranks wait in a collective while rank 0 waits for groups or for the four calls of a weight sync, the one
    # before it included, and rank 0 has the shorter deadlines.
    syncing_s = 2 * 4 * config.weight_sync.deadline_s
    patience = timedelta(seconds=config.timeouts.stall_s + config.timeouts.startup_s + syncing_s + 60)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def freeze_heap() -> None:
    """Tell the garbage collector that what exists by now stays. A training step makes enough objects for it to look at
    all of them every few micro-batches: 5 % of the time of a model of the demo's size."""
    gc.collect()
    gc.freeze()
    # Or Triton's bindings tell of everything that is still there, in lines that bury the trainer's last words.
    atexit.register(gc.unfreeze)
