"""The methods: what each makes of rewards, teacher and ratio.

A method is a row of `METHODS` that names its parts; a part is a small function, here or in `loss`, `advantage` or
`surrogates`. A new method is one function and one row. `method.name` in the run file chooses a row; `.advantages`,
`.context`, `.reweighting`, `.surrogate`, `.aggregation` and `.refill` replace single parts of it. docs/algorithm.md
gives formulas and sources.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from retort.config import MethodConfig
from services.trainer.advantage import group_advantages, leave_one_out_advantages
from services.trainer.loss import Aggregation, PolicyLoss, TokenWeights, policy_loss, rlsd_weights
from services.trainer.surrogates import cispo_loss, gspo_loss


class Parts(NamedTuple):
    """A row of the table: the name of each part."""

    advantages: str
    context: Literal["none", "sibling", "shuffled"]
    """Whose solution the teacher is shown: nobody's, a sibling's, or (a control) one of another prompt."""
    reweighting: str
    surrogate: str
    aggregation: Aggregation
    refill: bool = False
    """Replace groups whose rewards are all equal by new ones."""


METHODS = {
    "rlsd": Parts("mean", "sibling", "rlsd", "ppo", "sequence_mean"),
    "rlsd_negative_only": Parts("mean", "sibling", "rlsd_negative_only", "ppo", "sequence_mean"),
    "rlsd_shuffled": Parts("mean", "shuffled", "rlsd", "ppo", "sequence_mean"),
    "rlrt": Parts("mean", "sibling", "rlrt", "ppo", "sequence_mean"),
    "opd": Parts("mean", "sibling", "opd", "ppo", "sequence_mean"),
    "grpo": Parts("std", "none", "none", "ppo", "sequence_mean"),
    "dr_grpo": Parts("mean", "none", "none", "ppo", "horizon"),
    "dapo": Parts("std", "none", "none", "ppo", "token_mean", refill=True),
    "rloo": Parts("leave_one_out", "none", "none", "ppo", "sequence_mean"),
    "gspo": Parts("std", "none", "none", "gspo", "sequence_mean"),
    "cispo": Parts("std", "none", "none", "cispo", "token_mean"),
}


class Evidence(NamedTuple):
    """What is known of each of N tokens when its advantage is decided; all constants."""

    student_logprobs: Tensor
    """Of the policy being trained."""
    teacher_logprobs: Tensor
    """Meaningless where there is no demonstration."""
    advantages: Tensor
    """Of the token's completion."""
    has_demonstration: Tensor
    """bool"""


class TokenAdvantages(NamedTuple):
    values: Tensor
    """[N]"""
    factor: Tensor
    """[N] what the teacher made of the completion's advantage, as a factor on it; 1 where it had no say."""
    statistics: Tensor
    """[4, 3] as `TokenWeights.statistics`."""


class Reweighting(Protocol):
    """Decides the advantage of each token; `share` is the lambda of the step."""

    def __call__(self, evidence: Evidence, share: float, config: MethodConfig) -> TokenAdvantages: ...


class Surrogate(Protocol):
    """The objective. Arguments as for `loss.policy_loss`; `rows` [N] numbers each token's completion."""

    def __call__(
        self,
        *,
        trainer_logprobs: Tensor,
        old_logprobs: Tensor,
        token_advantages: Tensor,
        rollout_weights: Tensor,
        loss_weights: Tensor,
        rows: Tensor,
        config: MethodConfig,
    ) -> PolicyLoss: ...


class Method(NamedTuple):
    """A method with its parts looked up."""

    parts: Parts
    advantages: Callable[[Sequence[float], Sequence[Hashable]], list[float]]
    """(reward, group) of each completion -> its advantage"""
    reweighting: Reweighting
    surrogate: Surrogate

    @property
    def teaches_without_advantage(self) -> bool:
        """Whether completions with advantage 0 have a gradient all the same, and must not be skipped."""
        return self.parts.reweighting == "opd"


def method_of(config: MethodConfig) -> Method:
    """The row that the run file names, with the parts that it replaces."""
    chosen = {part: getattr(config, part) for part in Parts._fields if getattr(config, part, None) is not None}
    parts = METHODS[config.name]._replace(**chosen)
    return Method(parts, ADVANTAGES[parts.advantages], REWEIGHTINGS[parts.reweighting], SURROGATES[parts.surrogate])


def plain(evidence: Evidence, share: float, config: MethodConfig) -> TokenAdvantages:
    """Every token has its completion's advantage."""
    nowhere = torch.zeros_like(evidence.has_demonstration)
    return _times(evidence, _weights(evidence._replace(has_demonstration=nowhere), share, config))


def rlsd(evidence: Evidence, share: float, config: MethodConfig) -> TokenAdvantages:
    """A m: what the informed teacher likes better gets more of the credit, or less of the blame."""
    return _times(evidence, _weights(evidence, share, config))


def rlsd_negative_only(evidence: Evidence, share: float, config: MethodConfig) -> TokenAdvantages:
    """RLSD for completions with A < 0; the others keep A."""
    blamed = evidence.has_demonstration & (evidence.advantages < 0)
    return _times(evidence, _weights(evidence._replace(has_demonstration=blamed), share, config))


def rlrt(evidence: Evidence, share: float, config: MethodConfig) -> TokenAdvantages:
    """The ratio the other way round, student over teacher, for completions with A > 0 (arXiv 2605.10781)."""
    turned = Evidence(
        student_logprobs=evidence.teacher_logprobs,
        teacher_logprobs=evidence.student_logprobs,
        advantages=evidence.advantages,
        has_demonstration=evidence.has_demonstration & (evidence.advantages > 0),
    )
    return _times(evidence, _weights(turned, share, config))


def opd(evidence: Evidence, share: float, config: MethodConfig) -> TokenAdvantages:
    """A + alpha (log teacher - log student): on-policy distillation, added to the advantage."""
    gap = (evidence.teacher_logprobs - evidence.student_logprobs).clamp(-20, 20)
    bonus = config.distillation_alpha * torch.where(evidence.has_demonstration, gap, 0.0)
    weights = _weights(evidence, share, config)
    return TokenAdvantages(evidence.advantages + bonus, torch.ones_like(bonus), weights.statistics)


def ppo_loss(*, rows: Tensor, config: MethodConfig, **tensors: Tensor) -> PolicyLoss:
    """PPO's clip, with the dual clip of the reference run; every token by itself."""
    assert rows.shape == tensors["trainer_logprobs"].shape
    return policy_loss(**tensors, clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip)


def _weights(evidence: Evidence, share: float, config: MethodConfig) -> TokenWeights:
    return rlsd_weights(**evidence._asdict(), reweight_lambda=share, reweight_clip=config.reweight_clip)


def _times(evidence: Evidence, weights: TokenWeights) -> TokenAdvantages:
    return TokenAdvantages(evidence.advantages * weights.factor, weights.factor, weights.statistics)


ADVANTAGES: dict[str, Callable[[Sequence[float], Sequence[Hashable]], list[float]]] = {
    "mean": partial(group_advantages, scale="none"),
    "std": partial(group_advantages, scale="std"),
    "leave_one_out": leave_one_out_advantages,
}
REWEIGHTINGS: dict[str, Reweighting] = {
    "none": plain,
    "rlsd": rlsd,
    "rlsd_negative_only": rlsd_negative_only,
    "rlrt": rlrt,
    "opd": opd,
}
SURROGATES: dict[str, Surrogate] = {"ppo": ppo_loss, "gspo": gspo_loss, "cispo": cispo_loss}
