"""A policy of adapters: what is trained, how it is saved and what is exported. One rank, float64."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.config import ConfigError, LoraConfig, MethodConfig, MissingDependencyError
from retort.lora import base_digest
from retort.weight_sync import Snapshot
from services.trainer.batch import StepBatch
from services.trainer.checkpoint import Checkpoints
from services.trainer.export import Exports
from services.trainer.lora import Adapters, add_adapters, specs_of
from services.trainer.parts import make_policy
from services.trainer.policy import Policy
from services.trainer.publish import WeightPublisher
from services.trainer.teacher import Teacher
from services.trainer.update import update_policy
from services.trainer.weight_copy import WeightCopy
from tests.integration.reference_trainer import logprobs_of
from tests.training import a_batch, a_config, a_group, a_language_model, a_rollout
from tests.unit.trainer.test_publish import CollectingSender

TINY = Path(__file__).parents[3] / "models" / "tiny"
CONFIG = LoraConfig(rank=2, alpha=3.0)
SCALE = 1.5
LAYERS = 2 * 7
"""Two blocks of q, k, v, o, gate, up and down."""


def a_policy(
    mesh: DeviceMesh,
    config: LoraConfig = CONFIG,
    *,
    model: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Policy:
    language_model = a_language_model(model, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    adapters = add_adapters(language_model, config, dtype=dtype, seed=seed)
    trainer = a_config(trainer={"max_grad_norm": 1e9, "weight_decay": 0.0, **settings}).trainer
    return Policy(language_model, trainer, mesh, dtype=dtype, temperature=1.0, adapters=adapters)


def three_rows() -> StepBatch:
    rollouts = [a_rollout([5, 6, 7]), a_rollout([8]), a_rollout([9, 10])]
    batch = a_batch([a_group(*rollouts, prompt_ids=[1, 2])], [0.5, -0.5, 0.25])
    batch.old_logprobs = batch.teacher_logprobs = torch.full((6,), -3.0, dtype=torch.float64)
    return batch


def with_random_factors(policy: Policy) -> dict[str, Tensor]:
    """Both factors of every layer become numbers of about 0.3."""
    generator = torch.Generator().manual_seed(7)
    for shard in policy.local_shards():
        shard.copy_(0.3 * torch.randn(shard.shape, generator=generator, dtype=shard.dtype))
    return {name: tensor.clone() for name, tensor in policy.full_tensors()}


def explicit_logprobs(factors: Mapping[str, Tensor], prompt: list[int], completion: list[int]) -> Tensor:
    """Of a plain model whose weights are W0 + s B A; differentiable by the factors."""
    model = a_language_model(attention="sdpa")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in factors:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix("lora_A.weight")
            product = factors[f"{layer}lora_B.weight"] @ factors[name]
            weights[f"{layer}weight"] = weights[f"{layer}weight"] + SCALE * product

    def plain(ids: Tensor) -> Any:
        return functional_call(model, weights, (ids,))

    return logprobs_of(plain, prompt, completion)  # type: ignore[arg-type]  # it only calls it


def frozen(policy: Policy) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters() if not parameter.requires_grad]


def test_the_adapters_of_every_linear_layer_of_the_blocks_are_all_that_is_trained(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    assert len(policy.names) == 2 * LAYERS
    shapes = dict(policy.specs)
    assert shapes["model.layers.0.mlp.up_proj.lora_A.weight"] == [2, 16]
    assert shapes["model.layers.0.mlp.up_proj.lora_B.weight"] == [24, 2]
    optimized = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    assert list(map(id, optimized)) == list(map(id, policy.parameters()))
    base = frozen(policy)
    update_policy(policy, three_rows(), [0, 1, 2], MethodConfig(), learning_rate=1e-2)
    assert all(torch.equal(*pair) for pair in zip(frozen(policy), base, strict=True))
    assert all(tensor.abs().max() > 0 for _, tensor in policy.full_tensors())


def test_targets_are_layers_by_the_last_part_of_their_names(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh, LoraConfig(rank=1, targets=["q_proj", "down_proj"]))
    assert {name.split(".")[-3] for name in policy.names} == {"q_proj", "down_proj"}
    assert len(policy.names) == 2 * 2 * 2


def test_before_the_first_update_the_policy_is_its_base_to_the_last_bit(mesh: DeviceMesh) -> None:
    base = Policy(a_language_model(), a_config().trainer, mesh, dtype=torch.float64, temperature=1.0)
    ids = [1, 2, 5, 6, 7]
    assert a_policy(mesh).score_prompt(ids) == base.score_prompt(ids)


def test_equal_seeds_make_equal_adapters_and_leave_the_ranks_own_randomness_alone(mesh: DeviceMesh) -> None:
    torch.manual_seed(1)
    first = a_policy(mesh, seed=3)
    after = torch.rand(1)
    torch.manual_seed(2)
    second, other = a_policy(mesh, seed=3), a_policy(mesh, seed=4)
    assert all(torch.equal(*pair) for pair in zip(first.local_shards(), second.local_shards(), strict=True))
    assert not torch.equal(first.local_shards()[0], other.local_shards()[0])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_gradient_is_that_of_the_explicit_sum(mesh: DeviceMesh, checkpointing: bool) -> None:
    policy = a_policy(mesh, activation_checkpointing=checkpointing)
    factors = {name: tensor.requires_grad_() for name, tensor in with_random_factors(policy).items()}
    batch = three_rows()
    [micro_batch] = policy.micro_batches(batch, [0, 2], batch.prompts)
    policy.differentiable_scores(micro_batch, entropies=False).logprobs.sum().backward()
    rows = [batch.completions[row] for row in micro_batch.rows]
    sum(explicit_logprobs(factors, [1, 2], row).sum() for row in rows).backward()  # type: ignore[union-attr]
    for name, parameter in zip(policy.names, policy.parameters(), strict=True):
        assert factors[name].grad is not None and factors[name].grad.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad.full_tensor(), factors[name].grad, rtol=1e-9, atol=1e-11)


def test_the_teacher_follows_the_factors_and_shares_the_base(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    teacher = Teacher(policy)
    before = [shard.clone() for shard in teacher.shards]
    with_random_factors(policy)
    teacher.follow(policy, rate=0.25, finite_updates=1)
    for average, old, new in zip(teacher.shards, before, policy.local_shards(), strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new)
    factors = dict(zip(policy.names, teacher.shards, strict=True))
    scores = policy.score(three_rows(), [0], [[1, 2]] * 3, teacher).logprobs[:3]
    torch.testing.assert_close(scores, explicit_logprobs(factors, [1, 2], [5, 6, 7]))


def test_a_base_in_bfloat16_is_kept_so_and_its_adapters_in_float32(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in frozen(policy)} == {torch.bfloat16}
    assert {shard.dtype for shard in policy.local_shards()} == {torch.float32}
    update = update_policy(policy, three_rows(), [0, 1, 2], MethodConfig(), learning_rate=1e-2)
    assert update.is_finite and update.grad_norm > 0
    assert {shard.dtype for shard in policy.local_shards()} == {torch.float32}


def test_a_pass_with_a_gradient_counts_as_two_because_frozen_weights_have_none(mesh: DeviceMesh) -> None:
    operations = []
    for policy in (a_policy(mesh), a_policy(mesh)):
        batch = three_rows()
        [micro_batch] = policy.micro_batches(batch, [0, 1, 2], batch.prompts)
        for _ in range(2 - len(operations)):
            policy.differentiable_scores(micro_batch, entropies=False)
        operations.append(policy.take_work().operations)
    assert operations[0] == 2 * operations[1] > 0


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["qproj"], r"lora.targets = \['qproj'\].*not found"),
        (["lm_head"], "lora.targets: lm_head cannot have an adapter"),
        (["q_proj", "embed_tokens"], "lora.targets: embed_tokens cannot have an adapter"),
        (["input_layernorm"], "lora.targets = .*not supported"),
    ],
)
def test_targets_that_cannot_be_are_refused_by_name(mesh: DeviceMesh, targets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        a_policy(mesh, LoraConfig(rank=2, targets=targets))


def test_without_peft_the_run_says_what_to_install(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"lora.rank = 2 needs peft.*retort\[lora\]"):
        a_policy(mesh)


def state_of(policy: Policy, teacher: WeightCopy) -> list[Tensor]:
    moments = [policy.optimizer.state[parameter] for parameter in policy.parameters()]
    averages = [one[name].full_tensor() for one in moments for name in ("exp_avg", "exp_avg_sq")]
    return [tensor.clone() for tensor in [*policy.local_shards(), *teacher.shards, *averages]]


def train(policy: Policy, teacher: Teacher, updates: int) -> None:
    for _ in range(updates):
        update_policy(policy, three_rows(), [0, 1, 2], MethodConfig(), learning_rate=1e-2)
        teacher.follow(policy, rate=0.05, finite_updates=1)
        policy.version += 1


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(mesh: DeviceMesh, tmp_path: Path) -> None:
    undisturbed = a_policy(mesh)
    its_teacher = Teacher(undisturbed)
    train(undisturbed, its_teacher, 2)
    Checkpoints(tmp_path, keep_last=1).save(undisturbed, its_teacher)
    train(undisturbed, its_teacher, 2)
    resumed = a_policy(mesh, seed=5)
    teacher = Teacher(resumed)
    assert Checkpoints(tmp_path, keep_last=1).load(resumed, teacher)
    assert resumed.version == 2
    train(resumed, teacher, 2)
    pairs = zip(state_of(resumed, teacher), state_of(undisturbed, its_teacher), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_checkpoint_holds_adapters_alone(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy = a_policy(mesh)
    teacher = Teacher(policy)
    train(policy, teacher, 1)
    Checkpoints(tmp_path, keep_last=1).save(policy, teacher)
    names = load_file(tmp_path / "step-000001" / "rank-0.safetensors").keys()
    kinds = ("policy", "teacher", "exp_avg", "exp_avg_sq")
    assert set(names) == {f"{kind}.{name}" for kind in kinds for name in policy.names}


@pytest.mark.parametrize(
    "changed",
    [
        {"config": LoraConfig(rank=4, alpha=3.0)},
        {"config": LoraConfig(rank=2, alpha=4.0)},
        {"config": LoraConfig(rank=2, alpha=3.0, targets=["q_proj"])},
        {"model": 1},
    ],
    ids=["rank", "alpha", "targets", "base"],
)
def test_adapters_do_not_go_on_as_others_or_on_another_base(
    mesh: DeviceMesh, tmp_path: Path, changed: dict[str, Any]
) -> None:
    policy = a_policy(mesh)
    Checkpoints(tmp_path, keep_last=1).save(policy, Teacher(policy))
    other = a_policy(mesh, **changed)
    with pytest.raises(
        ConfigError, match=r"holds rank 2, alpha 3, on every linear layer of base .* and this run trains"
    ):
        Checkpoints(tmp_path, keep_last=1).load(other, Teacher(other))


def test_adapters_do_not_go_on_as_all_weights(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy = a_policy(mesh)
    Checkpoints(tmp_path, keep_last=1).save(policy, Teacher(policy))
    whole = Policy(a_language_model(), a_config().trainer, mesh, dtype=torch.float64, temperature=1.0)
    with pytest.raises(ConfigError, match="and this run trains all weights"):
        Checkpoints(tmp_path, keep_last=1).load(whole, Teacher(whole))


def a_published(mesh: DeviceMesh, directory: Path, dtype: str = "float32") -> tuple[Policy, Exports, Snapshot]:
    """The shipped model with adapters that are not zero any more, as it is published."""
    config = a_config(directory, model={"path": str(TINY), "dtype": dtype}, lora={"rank": 4, "alpha": 8.0})
    policy, sender = make_policy(config), CollectingSender()
    with_random_factors(policy)
    policy.version = 1
    WeightPublisher(sender, config, policy, probe_ids=[1, 2]).publish(policy)
    return policy, Exports(config, AutoTokenizer.from_pretrained(TINY), write_card=None), sender.published[0][0]


def test_what_is_sent_are_the_bytes_of_the_adapters(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy, _, snapshot = a_published(mesh, tmp_path)
    assert sum(len(bucket) for bucket in snapshot.buckets) == 4 * sum(shard.numel() for shard in policy.local_shards())
    assert [name for name, _ in snapshot.tensors()] == policy.names
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    specs = specs_of(base, torch.float32)
    assert snapshot.manifest.lora_base is not None
    assert (snapshot.manifest.lora_base.tensors, snapshot.manifest.lora_base.scale) == (specs, 2.0)
    assert snapshot.digests[-1] == base_digest(specs, dict(base.named_parameters()))


def test_an_export_is_a_whole_model_and_beside_it_what_peft_reads(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy, exports, snapshot = a_published(mesh, tmp_path)
    exports.after_run(snapshot)
    ids = [11, 12, 13, 14, 15]
    expected = pytest.approx(policy.score_prompt(ids), abs=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        assert logprobs_of(merged, ids[:1], ids[1:]).tolist() == expected
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        assert logprobs_of(base, ids[:1], ids[1:]).tolist() != expected
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "hf" / "adapter"))
        assert logprobs_of(adapted, ids[:1], ids[1:]).tolist() == expected


def test_an_export_of_adapters_to_another_base_is_refused(mesh: DeviceMesh, tmp_path: Path) -> None:
    _, exports, snapshot = a_published(mesh, tmp_path)
    other = Snapshot(snapshot.version, snapshot.manifest, snapshot.buckets, [*snapshot.digests[:-1], 1])
    with pytest.raises(ConfigError, match="does not hold the weights any more with which the trainer started"):
        exports.after_run(other)
    assert not (tmp_path / "hf").exists()


def test_what_adapters_are_made_for_is_said_in_one_line(mesh: DeviceMesh) -> None:
    adapters = a_policy(mesh).adapters
    assert isinstance(adapters, Adapters)
    assert adapters.description == f"rank 2, alpha 3, on every linear layer of base {adapters.base_digest:016x}"
