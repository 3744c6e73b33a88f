"""What trainer ranks are asked to do by the tests. Every function is a collective and returns plain values."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer

from retort.config import MethodConfig, RunConfig, TrainerConfig
from retort.rollouts import RolloutGroup
from services.trainer.batch import StepBatch, assemble
from services.trainer.checkpoint import Checkpoints
from services.trainer.export import Exports
from services.trainer.host_memory import MOMENTS
from services.trainer.journal import Journal
from services.trainer.policy import Policy
from services.trainer.publish import WeightPublisher
from services.trainer.steps import Steps
from services.trainer.teacher import Teacher
from services.trainer.train import train
from services.trainer.update import make_update, take_gradient, update_policy
from tests.training import VOCABULARY, a_batch, a_group, a_language_model, a_question, a_rollout

TINY = Path(__file__).parents[2] / "models" / "tiny"
Arrays = dict[str, np.ndarray]


class Shape(NamedTuple):
    """A row of a random step."""

    prompt: int
    completion: int
    advantage: float
    is_taught: bool


class RecordingPolicy(Policy):
    """Keeps the whole gradient of the last update."""

    gradients: Arrays

    def step(self, learning_rate: float) -> float:
        zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        self.gradients = {name: whole(grad) for name, grad in zip(self.names, zero, strict=True)}
        return super().step(learning_rate)


def whole(tensor: Tensor) -> np.ndarray:
    value = tensor.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).numpy().copy()


def a_policy(seed: int = 0, *, tied: bool = True, vocabulary: int = VOCABULARY, **changes: object) -> RecordingPolicy:
    settings = {"steps": 1, "activation_checkpointing": False, "max_grad_norm": 0.5, "weight_decay": 0.1, **changes}
    return RecordingPolicy(
        a_language_model(seed, tied=tied, vocabulary=vocabulary),
        TrainerConfig.model_validate(settings),
        init_device_mesh("cpu", (dist.get_world_size(),)),
        dtype=torch.float64,
        temperature=1.0,
    )


def a_random_step(shapes: Sequence[Shape], seed: int) -> StepBatch:
    """A batch as it is when the updates begin: with old and teacher log-probs.

    Prompts of the same length are the same.
    """
    rng = random.Random(seed)

    def ids(count: int, rng: random.Random = rng) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    def prompt(count: int) -> list[int]:
        return ids(count, random.Random(f"{seed}/{count}"))

    def logprobs(count: int) -> list[float]:
        return [-rng.randrange(64, 384) / 64 for _ in range(count)]

    groups = [
        a_group(a_rollout(ids(shape.completion), logprobs=logprobs(shape.completion)), prompt_ids=prompt(shape.prompt))
        for shape in shapes
    ]
    taught = [ids(3) if shape.is_taught else None for shape in shapes]
    batch = a_batch(groups, [shape.advantage for shape in shapes], taught)
    tokens = int(batch.lengths.sum())
    batch.old_logprobs = torch.tensor(logprobs(tokens), dtype=torch.float64)
    batch.teacher_logprobs = torch.tensor(logprobs(tokens), dtype=torch.float64)
    return batch


def one_update(
    shapes: Sequence[Shape],
    seed: int,
    token_budget: int,
    tied: bool,
    checkpointing: bool,
    compile: str = "none",
) -> tuple[float, Arrays]:
    """Loss and gradient of an update on all rows but the last, which belongs to another one."""
    policy = a_policy(
        tied=tied, micro_batch_tokens=token_budget, activation_checkpointing=checkpointing, compile=compile
    )
    batch = a_random_step(shapes, seed)
    update = update_policy(policy, batch, list(range(len(shapes) - 1)), MethodConfig(), learning_rate=0.0)
    return update.loss, policy.gradients


def scored_beside_first_pass(shapes: Sequence[Shape], seed: int, token_budget: int) -> list[tuple[Arrays, Arrays]]:
    """Scores and gradients of rows whose old log-probs have a pass of their own, and of the same in one pass."""
    found = []
    for is_first in (False, True):
        policy, batch = a_policy(micro_batch_tokens=token_budget), a_random_step(shapes, seed)
        scored = [] if is_first else batch.active_rows
        batch.old_logprobs, batch.entropies = policy.score(batch, scored, batch.prompts)
        gradient = take_gradient(policy, batch, list(range(len(shapes))), MethodConfig(), is_first=is_first)
        make_update(policy, gradient, 0.0)
        scores = {"old_logprobs": batch.old_logprobs.numpy(), "entropies": batch.entropies.numpy()}
        found.append((scores, policy.gradients))
    return found


def compiled_beside_eager(backend: str, checkpointing: bool) -> tuple[float, int, int]:
    """Steps of many lengths. How far the gradients of compiled blocks are from those of eager ones at most, and how
    many graphs and breaks in them there were."""
    eager, compiled = (
        a_policy(micro_batch_tokens=12, activation_checkpointing=checkpointing, compile=how)
        for how in ("none", backend)
    )
    counters.clear()
    far = 0.0
    for seed, lengths in enumerate(([3, 2], [1, 7, 4, 2], [9], [30, 1])):
        batch = a_random_step([Shape(2, length, 0.5 - seed % 2, True) for length in lengths], seed)
        rows = range(len(lengths))
        for policy in (eager, compiled):
            batch.old_logprobs, _ = policy.score(batch, rows, batch.prompts)
            update_policy(policy, batch, list(rows), MethodConfig(), learning_rate=1e-3)
        far = max(far, *(np.abs(eager.gradients[name] - compiled.gradients[name]).max() for name in eager.names))
    return float(far), counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def a_recorded_step(step: int, rewards: Sequence[Sequence[float]]) -> list[RolloutGroup]:
    """Groups of a step as replicas hand them in: random completions of 0 to 8 tokens, rewarded as given."""
    rng = random.Random(step)

    def completion(reward: float) -> object:
        length = rng.randint(1, 8)
        logprobs = [-rng.randrange(256, 512) / 64 for _ in range(length)]
        return a_rollout([rng.randrange(20, 120) for _ in range(length)], reward=reward, logprobs=logprobs)

    return [
        a_group(*map(completion, group), group_id=f"0-{index:06d}", step=step, prompt_ids=[11, 12, 13, 14 + index])
        for index, group in enumerate(rewards)
    ]


class RecordedSteps(Steps):
    """Steps whose groups are known. In a streamed run they come an update at a time."""

    def __init__(self, config: RunConfig, rewards: dict[int, list[list[float]]]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(TINY)

        def assemble_step(step: int, groups: list[RolloutGroup]) -> StepBatch:
            questions = [a_question(int(group.group_id.rpartition("-")[2])) for group in groups]
            return assemble(step, groups, questions, tokenizer, config.method)

        super().__init__(assemble_step)
        self._rewards = rewards
        self._at_once = config.trainer.groups_per_update if config.trainer.is_streamed else 99

    def should_save(self) -> bool:
        return False

    def take(self, step: int) -> Iterator[StepBatch]:
        groups = a_recorded_step(step, self._rewards[step])
        for start in range(0, len(groups), self._at_once):
            yield self._assemble(step, groups[start : start + self._at_once])


def a_run(config: RunConfig, rewards: dict[int, list[list[float]]], vocabulary: int) -> dict[str, Arrays]:
    """The training loop over recorded steps; the whole training state at its end."""
    torch.manual_seed(0)
    settings = config.trainer
    policy = Policy(
        a_language_model(vocabulary=vocabulary),
        settings,
        init_device_mesh("cpu", (dist.get_world_size(),)),
        dtype=torch.float64,
        temperature=1.0,
    )
    teacher = Teacher(policy)
    train(
        config,
        policy,
        teacher,
        RecordedSteps(config, rewards),
        WeightPublisher(None, config, policy, probe_ids=[1, 2]),
        Checkpoints(config.directory / "checkpoints", config.checkpoint.keep_last),
        Exports(config, AutoTokenizer.from_pretrained(TINY), write_card=None),
        Journal(),
    )
    return training_state(policy, teacher)


def train_and_save(directory: Path) -> dict[str, Arrays]:
    """Two updates, then a checkpoint of version 7. Returns the training state."""
    policy = a_policy()
    teacher = Teacher(policy)
    shapes = [Shape(2, 5, 0.75, True), Shape(3, 4, -0.25, False), Shape(1, 1, 0.5, False)]
    for seed in (0, 1):
        update_policy(policy, a_random_step(shapes, seed), [0, 1, 2], MethodConfig(), learning_rate=1e-2)
    teacher.follow(policy, rate=0.05, finite_updates=2)
    policy.version = 7
    Checkpoints(directory, keep_last=2).save(policy, teacher)
    return training_state(policy, teacher)


def train_with_restarts(directory: Path, offload: Sequence[str]) -> None:
    """Three steps, teacher included, each by a trainer that begins with the checkpoint of the one before."""
    shapes = [Shape(2, 5, 0.75, True), Shape(3, 4, -0.25, True), Shape(1, 1, 0.5, False)]
    for version in (1, 2, 3):
        policy = a_policy(offload=offload)
        teacher = Teacher(policy, on_host="teacher" in offload)
        checkpoints = Checkpoints(directory, keep_last=1)
        checkpoints.load(policy, teacher)
        for seed in (0, 1):
            batch = a_random_step(shapes, seed)
            batch.teacher_logprobs, _ = policy.score(batch, batch.taught_rows, batch.teacher_prompts, teacher)
            update_policy(policy, batch, [0, 1, 2], MethodConfig(), learning_rate=1e-2)
        teacher.follow(policy, rate=0.05, finite_updates=2)
        policy.version = version
        checkpoints.save(policy, teacher)


def load(directory: Path) -> tuple[bool, int, dict[str, Arrays]]:
    """Load into a policy with other weights. Returns whether there was something, its version and the state."""
    policy = a_policy(seed=1)
    teacher = Teacher(policy)
    found = Checkpoints(directory, keep_last=2).load(policy, teacher)
    return found, policy.version, training_state(policy, teacher)


def load_then_train(directory: Path) -> dict[str, Arrays]:
    """Load, make one more update, and return the training state."""
    policy = a_policy(seed=1)
    teacher = Teacher(policy)
    Checkpoints(directory, keep_last=2).load(policy, teacher)
    shapes = [Shape(2, 6, -0.75, True), Shape(1, 3, 0.25, False)]
    update_policy(policy, a_random_step(shapes, 2), [0, 1], MethodConfig(), learning_rate=1e-2)
    return training_state(policy, teacher)


def updates_with_a_nan(first_rows: int) -> list[tuple[bool, dict[str, Arrays]]]:
    """An update on good rows, one on a NaN, one on good rows: whether each was finite, and the state after it."""
    policy = a_policy()
    teacher = Teacher(policy)
    shapes = [Shape(2, 5, 0.75, True), Shape(3, 4, -0.25, False)][:first_rows]
    history = []
    for seed in (0, 1, 2):
        batch = a_random_step(shapes, seed)
        if seed == 1:
            batch.teacher_logprobs[0] = torch.nan
        update = update_policy(policy, batch, list(range(first_rows)), MethodConfig(), learning_rate=1e-2)
        teacher.follow(policy, rate=0.05, finite_updates=int(update.is_finite))
        history.append((update.is_finite, training_state(policy, teacher)))
    return history


def training_state(policy: Policy, teacher: Teacher) -> dict[str, Arrays]:
    """Policy, teacher and moments, whole, and the optimizer's step."""
    state = {"policy": {name: tensor.numpy().copy() for name, tensor in policy.full_tensors()}}
    with teacher.in_place_of(policy.local_shards()):
        state["teacher"] = {name: tensor.numpy().copy() for name, tensor in policy.full_tensors()}
    optimizer = [policy.optimizer.state[parameter] for parameter in policy.parameters()]
    for moment in MOMENTS:
        state[moment] = {name: whole(one[moment]) for name, one in zip(policy.names, optimizer, strict=True) if one}
    state["step"] = {name: whole(one["step"]) for name, one in zip(policy.names, optimizer, strict=True) if one}
    return state
