"""What changes from step to step: lambda, learning rate, teacher; and how a step divides into updates.

Steps count from 1.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


def reweight_lambda(step: int, *, initial: float, decay_steps: int | None, last_full_step: int = 1) -> float:
    """Share of the teacher's weight in the advantage at a step: falls linearly from `initial` to 0.

    `decay_steps` counts the steps of the fall; 0, a negative number or None means that there is none.
    `last_full_step` is 1 in the reference run (step 1 has the whole of it) and 0 in the code of the RLSD
    paper (step 1 has already lost a part). Sources: jungseongryong/L2T and iie-ycx/RLSD.
    """
    if decay_steps is None or decay_steps <= 0:
        return initial
    elapsed = min(max(step - last_full_step, 0), decay_steps)
    return initial * (1 - elapsed / decay_steps)


def learning_rate(step: int, *, base: float, warmup_steps: int) -> float:
    """Rate of all updates of a step: `base * (step - 1) / warmup_steps`, then `base`.

    Warm-up counts training steps, not updates, and starts from 0. `warmup_steps` = 0 turns it off. Source: verl,
    whose scheduler moves once a step, as the reference run used it.
    """
    return base * min(1.0, (step - 1) / warmup_steps) if warmup_steps > 0 else base


class UpdateSizes(NamedTuple):
    updates_per_step: int
    sequences_per_update: int
    sequences_per_rank: int
    """Share of one rank in one update where it divides evenly, rounded down otherwise."""


def update_sizes(*, groups_per_step: int, groups_per_update: int, group_size: int, ranks: int) -> UpdateSizes:
    """How a step divides into optimizer updates. Their size does not depend on the number of ranks.

    Source: verl's ppo_mini_batch_size, which counts prompts ("mbs8" of the reference run: 64 completions an update).
    """
    sequences = groups_per_update * group_size
    return UpdateSizes(groups_per_step // groups_per_update, sequences, sequences // ranks)


@torch.no_grad()
def update_teacher(teacher: Iterable[Tensor], policy: Iterable[Tensor], *, rate: float, finite_updates: int) -> None:
    """teacher += rate * (policy - teacher), in place, once per training step after its last update.

    `finite_updates` counts the step's updates whose gradient was finite; if there was none, the teacher stays.
    The teacher's tensors are float32 or float64: at a learning rate of 1e-6 the change of a step is below what
    bfloat16 resolves. Raises ValueError for a narrower type. Source: the reference run (jungseongryong/L2T).
    """
    if finite_updates == 0:
        return
    for target, source in zip(teacher, policy, strict=True):
        if torch.finfo(target.dtype).bits < 32:
            raise ValueError(f"teacher tensor in {target.dtype}: small updates vanish in it, use torch.float32")
        target.lerp_(source.to(target.dtype), rate)
