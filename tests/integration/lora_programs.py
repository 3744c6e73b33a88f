"""What ranks of a trainer of adapters are asked to do by the tests; see `rank_programs`."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from retort.config import LoraConfig, MethodConfig, TrainerConfig
from services.trainer.checkpoint import Checkpoints
from services.trainer.lora import add_adapters
from services.trainer.policy import Policy
from services.trainer.teacher import Teacher
from services.trainer.update import update_policy
from tests.integration.rank_programs import Arrays, Shape, a_random_step, training_state
from tests.training import a_language_model

SHAPES = [Shape(2, 5, 0.75, True), Shape(3, 4, -0.25, False), Shape(1, 1, 0.5, False)]


def a_policy(seed: int = 0, compile: str = "none") -> Policy:
    """Adapters of rank 3, which two or four ranks cannot share evenly."""
    language_model = a_language_model()
    adapters = add_adapters(language_model, LoraConfig(rank=3), dtype=torch.float64, seed=seed)
    keys = {"steps": 1, "activation_checkpointing": True, "max_grad_norm": 0.5, "weight_decay": 0.1, "compile": compile}
    settings = TrainerConfig.model_validate(keys)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return Policy(language_model, settings, mesh, dtype=torch.float64, temperature=1.0, adapters=adapters)


def train_and_save(directory: Path) -> dict[str, Arrays]:
    """Two updates, of which one has fewer rows than there are ranks, then a checkpoint of version 7."""
    policy = a_policy()
    teacher = Teacher(policy)
    for seed, rows in ((0, [0, 1, 2]), (1, [1])):
        update_policy(policy, a_random_step(SHAPES, seed), rows, MethodConfig(), learning_rate=1e-2)
    teacher.follow(policy, rate=0.05, finite_updates=2)
    policy.version = 7
    Checkpoints(directory, keep_last=2).save(policy, teacher)
    return training_state(policy, teacher)


def load_then_train(directory: Path) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
    """The state as it was loaded over other adapters, and after one update more."""
    policy = a_policy(seed=1)
    teacher = Teacher(policy)
    assert Checkpoints(directory, keep_last=2).load(policy, teacher)
    loaded = training_state(policy, teacher)
    update_policy(policy, a_random_step(SHAPES, 2), [0, 1, 2], MethodConfig(), learning_rate=1e-2)
    return loaded, training_state(policy, teacher)


def adapters_learnt(compile: str) -> Arrays:
    """What two updates on steps of different lengths make of the adapters."""
    policy = a_policy(compile=compile)
    for seed, rows in ((0, [0, 1, 2]), (1, [1])):
        update_policy(policy, a_random_step(SHAPES, seed), rows, MethodConfig(), learning_rate=1e-2)
    return {name: tensor.numpy().copy() for name, tensor in policy.full_tensors()}
