"""The messages between trainer and rollout service."""

import msgspec
import pytest

from retort.rollouts import Rollout, RolloutGroup, SamplingParameters, WorkItem, sample_seed

SAMPLING = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=8)


def a_work_item(seeds: list[int]) -> WorkItem:
    return WorkItem(
        group_id="0-000017",
        kind="train",
        step=3,
        min_policy_version=2,
        prompt_ids=[1, 2, 3],
        group_size=2,
        seeds=seeds,
        sampling=SAMPLING,
        checker="mcq",
        answer="B",
    )


def a_rollout(policy_versions: list[int]) -> Rollout:
    return Rollout(
        completion_ids=[5] * len(policy_versions),
        rollout_logprobs=[-0.5] * len(policy_versions),
        policy_versions=policy_versions,
        finish_reason="stop",
        reward=1.0,
        parsed="B",
        format_ok=True,
    )


def a_group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(
        group_id="0-000017",
        kind="train",
        step=3,
        sampled_by="rollout-0",
        prompt_ids=[1, 2, 3],
        rollouts=list(rollouts),
        generate_seconds=0.5,
        score_seconds=0.25,
    )


def test_a_work_item_survives_the_wire() -> None:
    item = a_work_item(seeds=[7, 8])
    assert WorkItem.from_bytes(item.to_bytes()) == item


def test_a_group_survives_the_wire_bit_by_bit() -> None:
    group = a_group(a_rollout([2, 2, 3]))
    assert RolloutGroup.from_bytes(group.to_bytes()) == group


def test_every_completion_needs_its_seed() -> None:
    with pytest.raises(ValueError, match="2 completions but 1 seeds"):
        a_work_item(seeds=[7])


def test_every_token_needs_its_logprob() -> None:
    with pytest.raises(ValueError, match="2 completion tokens but 1 logprobs and 2 policy versions"):
        Rollout(
            completion_ids=[5, 6],
            rollout_logprobs=[-0.5],
            policy_versions=[2, 2],
            finish_reason="stop",
            reward=1.0,
            parsed="B",
            format_ok=True,
        )


def test_a_message_that_breaks_its_rules_is_refused_when_it_is_decoded() -> None:
    fields = msgspec.to_builtins(a_work_item(seeds=[7, 8])) | {"seeds": [7]}
    with pytest.raises(msgspec.ValidationError, match="2 completions but 1 seeds"):
        WorkItem.from_bytes(msgspec.msgpack.encode(fields))


def test_a_finish_reason_that_nobody_defined_is_refused() -> None:
    fields = msgspec.to_builtins(a_rollout([2])) | {"finish_reason": "abort"}
    with pytest.raises(msgspec.ValidationError, match="abort"):
        Rollout.from_bytes(msgspec.msgpack.encode(fields))


def test_half_a_message_is_refused() -> None:
    data = a_group(a_rollout([2])).to_bytes()
    with pytest.raises(msgspec.DecodeError):
        RolloutGroup.from_bytes(data[: len(data) // 2])


def test_the_oldest_policy_version_is_that_of_the_oldest_token() -> None:
    assert a_group(a_rollout([3, 3]), a_rollout([2, 3])).oldest_policy_version == 2


def test_a_group_without_tokens_counts_as_of_its_own_step() -> None:
    assert a_group(a_rollout([])).oldest_policy_version == 3


def test_a_seed_is_a_function_of_run_group_and_sample() -> None:
    assert sample_seed(0, "0-000017", 1) == sample_seed(0, "0-000017", 1)
    seeds = {
        sample_seed(0, "0-000017", 1),
        sample_seed(1, "0-000017", 1),
        sample_seed(0, "0-000018", 1),
        sample_seed(0, "0-000017", 2),
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
