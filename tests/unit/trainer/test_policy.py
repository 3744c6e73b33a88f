from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from retort.config import ConfigError, ModelConfig
from services.trainer.batch import StepBatch
from services.trainer.policy import Policy, load_language_model
from tests.training import a_batch, a_config, a_group, a_language_model, a_rollout

TINY = Path(__file__).parents[3] / "models" / "tiny"


def a_policy(
    mesh: DeviceMesh,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float64,
    temperature: float = 1.0,
    **settings: Any,
) -> Policy:
    model = a_language_model(tied=tied, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    return Policy(model, a_config(trainer=settings).trainer, mesh, dtype=dtype, temperature=temperature)


def three_rows() -> StepBatch:
    rollouts = [a_rollout([5, 6, 7]), a_rollout([8]), a_rollout([9, 10])]
    return a_batch([a_group(*rollouts, prompt_ids=[1, 2])], [0.5, -0.5, 0.0])


def distribution(prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    logits = a_language_model(attention="sdpa")(torch.tensor([prompt + completion])).logits[0].detach()
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def set_gradients(policy: Policy, value: float) -> None:
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, value)


def values(policy: Policy) -> list[torch.Tensor]:
    return [shard.clone() for shard in policy.local_shards()]


@pytest.mark.parametrize("tied", [True, False])
def test_full_tensors_have_names_shapes_and_values_of_the_checkpoint(mesh: DeviceMesh, tied: bool) -> None:
    policy = a_policy(mesh, tied=tied)
    expected = dict(a_language_model(tied=tied).named_parameters())
    tensors = dict(policy.full_tensors())
    assert list(tensors) == policy.names == list(expected)
    assert ("lm_head.weight" in tensors) is not tied
    assert policy.specs == [(name, list(tensor.shape)) for name, tensor in expected.items()]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("token_budget", [1, 8, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_stand_where_their_tokens_do(mesh: DeviceMesh, token_budget: int, temperature: float) -> None:
    policy = a_policy(mesh, micro_batch_tokens=token_budget, temperature=temperature)
    prompts = [[1, 2], None, [3]]
    scores = policy.score(three_rows(), [2, 0], prompts)
    first, last = distribution([1, 2], [5, 6, 7], temperature), distribution([3], [9, 10], temperature)
    logprobs = [*first[range(3), [5, 6, 7]], 0.0, *last[range(2), [9, 10]]]
    entropies = [*-(first.exp() * first).sum(-1), 0.0, *-(last.exp() * last).sum(-1)]
    torch.testing.assert_close(scores.logprobs.tolist(), [float(v) for v in logprobs], rtol=0, atol=1e-10)
    torch.testing.assert_close(scores.entropies.tolist(), [float(v) for v in entropies], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("share_prompts", "tokens"),
    [(True, [1, 2, 5, 6, 7, 9, 10, 8]), (False, [1, 2, 5, 6, 7, 1, 2, 9, 10, 1, 2, 8])],
)
def test_a_prompt_is_computed_once_for_its_completions_or_for_each_with_the_same_scores(
    mesh: DeviceMesh, share_prompts: bool, tokens: list[int]
) -> None:
    policy, batch = a_policy(mesh, share_prompts=share_prompts), three_rows()
    expected = torch.cat([distribution([1, 2], ids, 1.0)[range(len(ids)), ids] for ids in batch.completions])
    torch.testing.assert_close(policy.score(batch, [0, 1, 2], batch.prompts).logprobs, expected, rtol=0, atol=1e-10)
    [micro_batch] = policy.micro_batches(batch, [0, 1, 2], batch.prompts)
    assert micro_batch.input_ids[0].tolist() == tokens


def test_the_probe_is_scored_at_temperature_1_whatever_the_policy_samples_at(mesh: DeviceMesh) -> None:
    expected = distribution([4], [5, 6], temperature=1.0)[range(2), [5, 6]].tolist()
    assert a_policy(mesh, temperature=0.3).score_prompt([4, 5, 6]) == pytest.approx(expected, abs=1e-10)


def test_the_norm_is_that_before_clipping_and_the_update_that_after(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh, max_grad_norm=0.5)
    set_gradients(policy, 2.0)
    count = sum(shard.numel() for shard in policy.local_shards())
    assert policy.step(1e-3) == pytest.approx(2.0 * count**0.5)
    for parameter in policy.parameters():
        # After the first update Adam's first moment is a tenth of the clipped gradient.
        expected = torch.full_like(parameter, 0.1 * 0.5 / count**0.5)
        torch.testing.assert_close(policy.optimizer.state[parameter]["exp_avg"], expected, rtol=1e-5, atol=0)


def test_the_rate_of_an_update_is_the_one_given(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh, weight_decay=0.0)
    before = values(policy)
    set_gradients(policy, -1e-3)
    policy.step(0.25)
    for shard, old in zip(policy.local_shards(), before, strict=True):
        # Adam's first update is the rate in the direction of the gradient's sign.
        torch.testing.assert_close(shard - old, torch.full_like(old, 0.25), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(mesh: DeviceMesh, value: float) -> None:
    policy = a_policy(mesh)
    before = values(policy)
    set_gradients(policy, value)
    assert not torch.tensor(policy.step(1.0)).isfinite()
    assert all(torch.equal(*pair) for pair in zip(policy.local_shards(), before, strict=True))
    assert not policy.optimizer.state
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_without_any_gradient_weights_and_moments_decay(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh, weight_decay=0.1)
    set_gradients(policy, 1e-3)
    policy.step(0.0)
    before = values(policy)
    moments = [policy.optimizer.state[p]["exp_avg"].clone() for p in policy.parameters()]
    policy.optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    assert policy.step(1e-6) == 0.0
    for parameter, moment in zip(policy.parameters(), moments, strict=True):
        torch.testing.assert_close(policy.optimizer.state[parameter]["exp_avg"], 0.9 * moment)
    for shard, old in zip(policy.local_shards(), before, strict=True):
        # Decay by rate * weight_decay, and a step of at most the rate along what is left of the moment.
        torch.testing.assert_close(shard, old * (1 - 1e-7), rtol=0, atol=1.1e-6)
        assert not torch.equal(shard, old)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activation_checkpointing_computes_every_layer_a_second_time(mesh: DeviceMesh, checkpointing: bool) -> None:
    model = a_language_model().eval()  # as `from_pretrained` leaves it
    passes = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    settings = a_config(trainer={"activation_checkpointing": checkpointing}).trainer
    policy = Policy(model, settings, mesh, dtype=torch.float64, temperature=1.0)
    batch = three_rows()
    [micro_batch] = policy.micro_batches(batch, [0, 1], batch.prompts)
    policy.differentiable_scores(micro_batch, entropies=False).logprobs.sum().backward()
    assert len(passes) == (4 if checkpointing else 2)


def test_a_bfloat16_policy_keeps_float32_weights_gradients_and_scores(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh, dtype=torch.bfloat16)
    batch = three_rows()
    [micro_batch] = policy.micro_batches(batch, [0, 1], batch.prompts)
    logprobs = policy.differentiable_scores(micro_batch, entropies=False).logprobs
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in policy.parameters()} == {torch.float32}
    exact = torch.cat([distribution([1, 2], ids, 1.0)[range(len(ids)), ids] for ids in ([5, 6, 7], [8])])
    torch.testing.assert_close(policy.score(batch, [0, 1], batch.prompts).logprobs[:4], exact.float(), rtol=0, atol=0.2)


def test_the_shipped_model_is_loaded_in_float32() -> None:
    model = load_language_model(ModelConfig(path=str(TINY), dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_path_that_is_no_model_is_bad_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a causal language model"):
        load_language_model(ModelConfig(path=str(tmp_path)))
