"""Every method against numbers worked out by hand."""

import math

import pytest
import torch

from retort.config import MethodConfig
from services.trainer.advantage import leave_one_out_advantages, overlong_penalty
from services.trainer.methods import METHODS, Evidence, method_of

LN2 = math.log(2)


def evidence(*, teacher: list[float], student: list[float], advantage: list[float]) -> Evidence:
    """Tokens with a demonstration; log-probs in units of ln 2."""
    return Evidence(
        student_logprobs=torch.tensor(student, dtype=torch.float64) * LN2,
        teacher_logprobs=torch.tensor(teacher, dtype=torch.float64) * LN2,
        advantages=torch.tensor(advantage, dtype=torch.float64),
        has_demonstration=torch.ones(len(teacher), dtype=torch.bool),
    )


def token_advantages(name: str, tokens: Evidence, **parts: object) -> list[float]:
    config = MethodConfig.model_validate({"name": name, **parts})
    return method_of(config).reweighting(tokens, 0.5, config).values.tolist()


def loss_of(name: str, *, log_ratios: list[float], advantages: list[float], rows: list[int], **config: object) -> float:
    """Loss with a weight of 1 a token, from log ratios in units of ln 2."""
    return float(_loss(name, log_ratios, advantages, rows, config)[0])


def gradient_of(
    name: str, *, log_ratios: list[float], advantages: list[float], rows: list[int], **config: object
) -> list[float]:
    """d loss / d log-prob of each token."""
    loss, logprobs = _loss(name, log_ratios, advantages, rows, config)
    loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad.tolist()


def _loss(
    name: str, log_ratios: list[float], advantages: list[float], rows: list[int], settings: dict[str, object]
) -> tuple[torch.Tensor, torch.Tensor]:
    config = MethodConfig.model_validate({"name": name, **settings})
    ones = torch.ones(len(rows), dtype=torch.float64)
    logprobs = (torch.tensor(log_ratios, dtype=torch.float64) * LN2).requires_grad_()
    result = method_of(config).surrogate(
        trainer_logprobs=logprobs,
        old_logprobs=0 * ones,
        token_advantages=torch.tensor(advantages, dtype=torch.float64),
        rollout_weights=ones,
        loss_weights=ones,
        rows=torch.tensor(rows),
        config=config,
    )
    return result.loss, logprobs


def test_rlsd_gives_more_credit_to_what_the_teacher_likes_and_more_blame_to_what_it_does_not() -> None:
    # Twice and half as likely for the teacher: w is 2 or 1/2, clipped to 1.2 or 0.8, and half of that counts.
    tokens = evidence(teacher=[1, -1, 1, -1], student=[0, 0, 0, 0], advantage=[1, 1, -1, -1])
    assert token_advantages("rlsd", tokens) == pytest.approx([1.1, 0.9, -0.9, -1.1])


def test_rlsd_for_negatives_only_leaves_credit_alone() -> None:
    tokens = evidence(teacher=[1, -1, 1, -1], student=[0, 0, 0, 0], advantage=[1, 1, -1, -1])
    assert token_advantages("rlsd_negative_only", tokens) == pytest.approx([1, 1, -0.9, -1.1])


def test_rlrt_turns_the_ratio_round_and_touches_right_completions_only() -> None:
    tokens = evidence(teacher=[1, -1, 1, -1], student=[0, 0, 0, 0], advantage=[1, 1, -1, -1])
    assert token_advantages("rlrt", tokens) == pytest.approx([0.9, 1.1, -1, -1])


def test_distillation_is_added_to_the_advantage_and_teaches_without_one() -> None:
    tokens = evidence(teacher=[1, 0, -2], student=[0, 0, 0], advantage=[1, 0, 0])
    assert token_advantages("opd", tokens, distillation_alpha=0.5) == pytest.approx([1 + LN2 / 2, 0, -LN2])
    assert method_of(MethodConfig(name="opd")).teaches_without_advantage
    assert not method_of(MethodConfig(name="rlsd")).teaches_without_advantage


def test_methods_without_a_teacher_keep_the_advantage() -> None:
    tokens = evidence(teacher=[5, -5], student=[0, 0], advantage=[0.5, -0.5])
    for name in ("grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo"):
        assert token_advantages(name, tokens) == [0.5, -0.5]


def test_gspo_clips_the_geometric_mean_of_a_completion() -> None:
    # Ratios 4 and 1 in one completion: both count as 2. Clipped at 1.5 the loss is -1.5 a token, without gradient.
    doubled = {"log_ratios": [2.0, 0.0], "advantages": [1.0, 1.0], "rows": [7, 7]}
    assert loss_of("gspo", **doubled, clip_high=2) == pytest.approx(-4)
    assert loss_of("gspo", **doubled, clip_high=0.5) == pytest.approx(-3)
    assert gradient_of("gspo", **doubled, clip_high=0.5) == [0, 0]
    # d/dlogp of -(s + s): every token moves s by s/2, in both terms.
    assert gradient_of("gspo", **doubled, clip_high=2) == pytest.approx([-2, -2])


def test_gspo_keeps_completions_apart() -> None:
    assert loss_of("gspo", log_ratios=[1.0, -1.0], advantages=[1.0, 1.0], rows=[0, 1], clip_high=2) == pytest.approx(
        -2.5
    )


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    # Ratio 2 clipped to 1.28: PPO has no gradient there, CISPO has -1.28 A.
    clipped = {"log_ratios": [1.0], "advantages": [1.0], "rows": [0]}
    assert gradient_of("grpo", **clipped) == [0]
    assert gradient_of("cispo", **clipped) == pytest.approx([-1.28])
    assert loss_of("cispo", **clipped) == pytest.approx(-1.28 * LN2)


def test_leave_one_out_compares_with_the_others() -> None:
    # The mean of the other three is 1/3 for the winners and 2/3 for the losers.
    assert leave_one_out_advantages([1, 0, 0, 1], ["q"] * 4) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert leave_one_out_advantages([1], ["alone"]) == [1]


def test_length_costs_nothing_until_the_buffer_and_one_at_the_end() -> None:
    assert [overlong_penalty(length, max_length=100, buffer=20) for length in (80, 90, 100, 120)] == [0, -0.5, -1, -1]
    assert overlong_penalty(100, max_length=100, buffer=0) == 0


def test_a_part_can_be_replaced_by_name() -> None:
    method = method_of(MethodConfig(name="rlsd", surrogate="cispo", advantages="std"))
    assert method.parts == METHODS["rlsd"]._replace(surrogate="cispo", advantages="std")


def test_every_name_in_the_run_file_is_a_row() -> None:
    names = MethodConfig.model_fields["name"].annotation
    assert set(METHODS) == set(names.__args__)
