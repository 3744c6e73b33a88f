"""Every case of the vectors file, one test a case: values, gradients and metrics, in float64 and float32.

The file's tensors are padded [B, T]. They are flattened by the mask first, as the trainer packs them, so what stands in
padding provably never enters.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.advantage import demonstration_choice, group_advantages
from services.trainer.loss import (
    PolicyLoss,
    TokenWeights,
    aggregation_weights,
    loss_metrics,
    policy_loss,
    rlsd_weights,
    weight_metrics,
)
from services.trainer.rollout_correction import rollout_correction_metrics, rollout_weights
from services.trainer.schedule import learning_rate, reweight_lambda, update_sizes, update_teacher
from services.trainer.teacher_prompt import teacher_user_turn
from services.trainer.validation_metrics import best_at_k_limit, bootstrap_metrics, pass_at_k
from tests.vectors import each_case, sections

Case = dict[str, Any]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
LAST_FULL_STEP = {"seed": 1, "official": 0, "trl": 0}
AGGREGATION = {
    "row_micro_mean": "sequence_mean",
    "seq_mean_token_mean": "sequence_mean",
    "token_mean": "token_mean",
    "seq_mean_token_sum_norm": "horizon",
}
STATISTIC = {"w_clip_fraction": "w_clip_frac"}
COVERED = {
    "group_advantages",
    "lambda_schedule",
    "rlsd_weights",
    "policy_loss",
    "ema",
    "learning_rate",
    "updates_per_step",
    "validation_metrics",
    "demonstration_choice",
    "teacher_user_turn",
    "mcq_grading",  # by the reward service's tests
}


def assert_same(actual: Any, expected: Any, tolerance: float) -> None:
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 10, equal_nan=True)


def assert_metrics(actual: Mapping[str, float], expected: Mapping[str, float], tolerance: float) -> None:
    """Each expected metric, compared by name."""
    assert set(expected) <= set(actual)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), name


class Packing:
    """Between the padded [B, T] of the file and the packed [N] of the trainer."""

    def __init__(self, mask: list[list[int]], dtype: torch.dtype) -> None:
        self.mask = torch.tensor(mask, dtype=torch.bool)
        self.dtype = dtype
        self.lengths = self.mask.sum(1)
        self.rows = self.mask.nonzero()[:, 0]

    def pack(self, padded: list[list[float]]) -> Tensor:
        return torch.tensor(padded, dtype=self.dtype)[self.mask]

    def per_token(self, per_completion: Iterable[float], dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(list(per_completion), dtype=dtype or self.dtype)[self.rows]

    def pad(self, packed: Tensor, fill: float) -> Tensor:
        padded = torch.full(self.mask.shape, fill, dtype=packed.dtype)
        padded[self.mask] = packed
        return padded

    def context(self, given: list[int] | None) -> Tensor:
        return self.per_token([1] * len(self.mask) if given is None else given, torch.bool)


def test_every_section_of_the_file_is_covered() -> None:
    assert sections() - COVERED == set()


@each_case("group_advantages")
def test_group_advantages(case: Case) -> None:
    assert_same(group_advantages(**case["input"]), case["expected"]["advantages"], 1e-9)


@each_case("demonstration_choice")
def test_demonstration_choice(case: Case) -> None:
    assert demonstration_choice(**case["input"]) == case["expected"]


@each_case("lambda_schedule")
def test_lambda_schedule(case: Case) -> None:
    given = case["input"]
    actual = reweight_lambda(
        given["step"],
        initial=given["lam0"],
        decay_steps=given["decay_steps"],
        last_full_step=LAST_FULL_STEP[given["convention"]],
    )
    assert_same(actual, case["expected"], 1e-9)


@each_case("learning_rate")
def test_learning_rate(case: Case) -> None:
    given = case["input"]
    actual = learning_rate(given["step"], base=given["base"], warmup_steps=given["warmup"])
    assert actual == pytest.approx(case["expected"], rel=1e-9, abs=0)


@each_case("updates_per_step")
def test_updates_per_step(case: Case) -> None:
    given = case["input"]
    sizes = update_sizes(
        groups_per_step=given["train_batch"],
        groups_per_update=given["mini"],
        group_size=given["n"],
        ranks=given["world"],
    )
    assert list(sizes) == case["expected"]


@each_case("teacher_user_turn")
def test_teacher_user_turn(case: Case) -> None:
    assert teacher_user_turn(**case["input"]) == case["expected"]


@each_case("ema")
def test_ema(case: Case) -> None:
    given = case["input"]
    updated = given["updated"] or [True] * len(given["students"])
    for dtype, tolerance in TOLERANCE.items():
        teacher = torch.tensor(given["teacher0"], dtype=dtype)
        for student, finite, expected in zip(
            given["students"], updated, case["expected"]["teacher_after_each_step"], strict=True
        ):
            policy = torch.tensor(student, dtype=dtype)
            update_teacher([teacher], [policy], rate=given["rate"], finite_updates=int(finite))
            assert_same(teacher, expected, tolerance)


@each_case("validation_metrics")
def test_validation_metrics(case: Case) -> None:
    given, expected = case["input"], case["expected"]
    scores = [prompt["scores"] for prompt in given["prompts"]]
    predictions = [prompt["preds"] for prompt in given["prompts"]]
    metrics = bootstrap_metrics(scores, predictions, draws=given["draws"], seed=given["seed"])
    assert metrics == pytest.approx(expected["metrics"], rel=1e-9, abs=1e-12)
    for k, value in expected["pass_at_k_unbiased"].items():
        assert pass_at_k(scores, int(k)) == pytest.approx(value, rel=1e-9, abs=1e-12)
    for k, value in expected["best_at_k_limit"].items():
        assert best_at_k_limit(scores, int(k)) == pytest.approx(value, rel=1e-9, abs=1e-12)


@each_case("rlsd_weights")
def test_rlsd_weights(case: Case) -> None:
    given, expected = case["input"], case["expected"]
    for dtype, tolerance in TOLERANCE.items():
        packing = Packing(given["mask"], dtype)
        advantages = packing.per_token(given["advantages"])
        weights = rlsd_weights(
            student_logprobs=packing.pack(given["student_lp"]),
            teacher_logprobs=packing.pack(given["teacher_lp"]),
            advantages=advantages,
            has_demonstration=packing.context(given["context"]),
            reweight_lambda=given["lambda"],
            reweight_clip=given["eps_w"],
        )
        assert weights.factor.dtype == dtype
        assert_same(packing.pad(weights.evidence, 1.0), expected["w"], tolerance)
        assert_same(packing.pad(weights.clipped, 1.0), expected["w_clipped"], tolerance)
        assert_same(packing.pad(weights.factor, 1.0), expected["modulator"], tolerance)
        assert_same(packing.pad(advantages * weights.factor, 0.0), expected["refined"], tolerance)
        metrics = weight_metrics(weights.statistics)
        wanted = {STATISTIC.get(name, name): value for name, value in expected["stats"].items()}
        assert_metrics(
            metrics, {f"self_distillation/token_reweight_{name}": wanted[name] for name in wanted}, tolerance
        )


@each_case("policy_loss")
def test_policy_loss(case: Case) -> None:
    given, expected = case["input"], case["expected"]
    for dtype, tolerance in TOLERANCE.items():
        packing = Packing(given["mask"], dtype)
        current = torch.tensor(given["cur_lp"], dtype=dtype, requires_grad=True)
        correction, weights, result = loss_of_case(given, packing, current[packing.mask])
        result.loss.backward()

        refined = packing.per_token(given["advantages"]) * weights.factor
        assert_same(result.loss.detach(), expected["loss"], tolerance)
        assert_same(packing.pad(result.token_losses, 0.0), expected["per_token"], tolerance)
        assert_same(current.grad, expected["grad"], tolerance)
        assert_same(packing.pad(refined, 0.0), expected["refined"], tolerance)
        if expected["is_w"] is not None:
            assert_same(packing.pad(correction, 0.0), expected["is_w"], tolerance)
        metrics = loss_metrics(result.statistics)
        assert_same(metrics["actor/pg_clipfrac"], expected["clip_fraction"], tolerance)
        assert_same(metrics["actor/pg_clipfrac_lower"], expected["clip_fraction_lower"], tolerance)
        assert_same(metrics["actor/ppo_kl"], expected["approx_kl"], tolerance)
        for flavour, reported in (("seed", "raw"), ("head", "applied")):
            if (wanted := expected.get(f"tis_metrics_{flavour}")) is not None:
                actual = rollout_correction_metrics(
                    old_logprobs=packing.pack(given["old_lp"]),
                    rollout_logprobs=packing.pack(given["rollout_lp"]),
                    lengths=packing.lengths,
                    max_ratio=given["tis_threshold"],
                    weights=reported,
                )
                assert_metrics(actual, {f"rollout_corr/{name}": wanted[name] for name in wanted}, tolerance)


def loss_of_case(given: Case, packing: Packing, trainer_logprobs: Tensor) -> tuple[Tensor, TokenWeights, PolicyLoss]:
    """Rollout weights, token weights and loss, composed as the trainer composes them."""
    old = packing.pack(given["old_lp"])
    advantages = packing.per_token(given["advantages"])
    weights = rlsd_weights(
        student_logprobs={"current": trainer_logprobs.detach(), "old": old}[given["student"]],
        teacher_logprobs=packing.pack(given["teacher_lp"]),
        advantages=advantages,
        has_demonstration=packing.context(given["context"]),
        reweight_lambda=given["lam"],
        reweight_clip=given["eps_w"],
    )
    correction = torch.ones_like(old)
    if given["tis_threshold"] is not None:
        rollout = packing.pack(given["rollout_lp"])
        correction = rollout_weights(old_logprobs=old, rollout_logprobs=rollout, max_ratio=given["tis_threshold"])
    loss_weights = aggregation_weights(
        AGGREGATION[given["agg"]],
        packing.lengths,
        num_sequences=len(packing.mask),
        num_tokens=int(packing.lengths.sum()),
        horizon=given["horizon"] or packing.mask.shape[1],
    )
    result = policy_loss(
        trainer_logprobs=trainer_logprobs,
        old_logprobs=old,
        token_advantages=advantages * weights.factor,
        rollout_weights=correction,
        loss_weights=loss_weights[packing.rows],
        clip_low=given["lo"],
        clip_high=given["hi"],
        dual_clip=math.inf if given["dual"] is None else given["dual"],
    )
    return correction, weights, result
