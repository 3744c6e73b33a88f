"""What a service does slowly when it does it for the first time, done once by the fork server that imports this.

A trainer that starts spends two seconds of processor time on imports that happen late, on transformers' patterns and on
torch's plans for sharded operations, and then does two steps in as long. Forked from here, it starts with all that.
"""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import retort.cli.report  # noqa: F401  # a launcher imports it at its end
from retort.config import RunConfig
from services.trainer.attention import PACKED_ATTENTION
from services.trainer.export import Exported, write_model
from services.trainer.guards import Guards
from services.trainer.journal import Journal
from services.trainer.policy import Policy, load_language_model
from services.trainer.teacher import Teacher
from services.trainer.train import learn
from tests.chaos.forked import MODEL
from tests.training import a_batch, a_config, a_group, a_rollout


def warm_up() -> None:
    """Train the model for one step, then remember it as it was."""
    config = a_config(model={"path": os.environ[MODEL]}, trainer={"max_logprob_gap": 1e3})
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        _train_one_step(config)
        dist.destroy_process_group()
        _export(config, Path(directory))
    for owner in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        _remember(owner)
    AutoTokenizer.from_pretrained(config.model.path)
    # As trainer and simulated engine ask for it. Each process loads it once, so nobody changes another's.
    AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32, attn_implementation=PACKED_ATTENTION)
    AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)


def _train_one_step(config: RunConfig) -> None:
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (1,))
    policy = Policy(load_language_model(config.model), config.trainer, mesh, dtype=torch.float32, temperature=1.0)
    teacher = Teacher(policy)
    groups = [a_group(a_rollout(), a_rollout(reward=0.0), group_id=f"0-00000{number}") for number in range(4)]
    batch = a_batch(groups, [1.0, -1.0] * 4, [[1, 2, 3, 4], None] * 4)
    journal = Journal()
    learn(config, policy, teacher, None, batch, Guards(config.trainer, journal.keep_step), journal)
    teacher.follow(policy, rate=0.1, finite_updates=1)
    policy.score_prompt([1, 2, 3])
    for _ in policy.full_tensors():
        pass


def _export(config: RunConfig, directory: Path) -> None:
    weights = {"weight": torch.zeros(2)}
    there = config.model_copy(update={"run_dir": str(directory)})
    write_model(directory / "hf", weights, there, AutoTokenizer.from_pretrained(config.model.path), Exported(0, None))


def _remember(owner: Any) -> None:
    owner.from_pretrained = staticmethod(functools.cache(owner.from_pretrained))


warm_up()
