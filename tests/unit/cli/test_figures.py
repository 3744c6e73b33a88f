"""The plan's numbers, worked out by hand for the published run."""

from pathlib import Path

import pytest

from retort.cli.plan.figures import (
    GIB,
    Assumptions,
    best_split,
    cache_bytes,
    cache_bytes_per_token,
    figures,
    sampling_seconds,
    step_seconds,
    training_seconds,
)
from retort.cli.plan.model_shape import KNOWN_MODELS
from retort.config import ConfigError, RunConfig, load_config

CONFIGS = Path(__file__).parents[3] / "configs"
SHAPE = KNOWN_MODELS["Qwen/Qwen3-4B"]
N = 4_022_468_096
GIVEN = Assumptions(prompt_tokens=256, completion_tokens=1000, gpu_gib=140, tflops=350, bandwidth=2.9)


def reference(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "qwen3-4b-sciknoweval.toml", overrides, env={})


def values(config: RunConfig) -> dict[tuple[str, str], float]:
    return {(figure.section, figure.name): figure.value for figure in figures(config, SHAPE, GIVEN)}


def test_the_published_run_makes_32_updates_of_64_completions_a_step_and_3200_in_all() -> None:
    work = {name: value for (section, name), value in values(reference()).items() if section == "Work"}
    assert work == {
        "completions per step": 2048,
        "completions per update": 64,
        "updates per step": 32,
        "updates in the run": 3200,
        "validations": 11,
    }


def test_the_number_of_ranks_changes_no_update() -> None:
    work = [value for (section, _), value in values(reference("trainer.ranks=2")).items() if section == "Work"]
    assert work == [2048, 64, 32, 3200, 11]


def test_the_teacher_reads_a_demonstration_besides() -> None:
    tokens = [value for (section, _), value in values(reference()).items() if section.startswith("Tokens")]
    assert tokens == [2048 * 1000, 2048 * 1256, 2048 * 2256]


def test_a_rank_keeps_twenty_bytes_a_parameter_divided_by_the_ranks() -> None:
    memory = {name: value for (section, name), value in values(reference()).items() if section.endswith("trainer rank")}
    kept = [memory[name] for name in ("weights", "gradients", "optimizer", "teacher")]
    assert sum(kept) == pytest.approx(20 * N / 6)
    assert memory["together"] == pytest.approx(sum(memory.values()) - memory["together"])


def test_what_is_offloaded_takes_twelve_of_them_off_the_gpu() -> None:
    section = "Memory of a trainer rank"
    whole, rest = values(reference()), values(reference('trainer.offload=["teacher", "optimizer"]'))
    assert rest[section, "teacher"] == rest[section, "optimizer"] == 0
    assert whole[section, "together"] - rest[section, "together"] == pytest.approx(12 * N / 6)


def test_adapters_are_what_is_trained_sent_and_saved_beside_a_frozen_base() -> None:
    # A layer's matrices have 6656, 3584, 3584, 6656, 12288, 12288 and 12288 numbers in and out: 57,344.
    adapters = 36 * 16 * 57_344
    numbers = values(reference("lora.rank=16"))
    assert numbers["Weights", "adapters' parameters"] == adapters == 33_030_144
    assert numbers["Weights", "sent per weight sync"] == 2 * adapters
    assert numbers["Weights", "a checkpoint"] == 16 * adapters
    memory = {name: value for (section, name), value in numbers.items() if section == "Memory of a trainer rank"}
    assert memory["frozen weights"] == pytest.approx(2 * N / 6)
    kept = [memory[name] for name in ("weights", "gradients", "optimizer", "teacher")]
    assert sum(kept) == pytest.approx(20 * adapters / 6)
    assert memory["together"] == pytest.approx(sum(memory.values()) - memory["together"])


def test_adapters_of_one_projection_are_its_two_factors() -> None:
    numbers = values(reference("lora.rank=8", 'lora.targets=["q_proj"]'))
    assert numbers["Weights", "adapters' parameters"] == 36 * 8 * (2560 + 4096)


def test_frozen_weights_take_no_gradient_of_their_own_in_the_backward_pass() -> None:
    difference = training_seconds(reference(), SHAPE, GIVEN, ranks=6) - training_seconds(
        reference("lora.rank=16"), SHAPE, GIVEN, ranks=6
    )
    assert difference == pytest.approx(N * 2 * 2048 * 1256 / 6 / 350e12)


def test_checkpointing_keeps_the_input_of_every_layer_and_one_whole_layer() -> None:
    whole = 4 * (2560 + 32 * 128 + 8 * 128 + 9728)
    section = "Memory of a trainer rank"
    activations = values(reference())[section, "activations"]
    assert activations == 32768 * 2 * (36 * 2560 + whole)
    without = values(reference("trainer.activation_checkpointing=false"))[section, "activations"]
    assert without == 32768 * 2 * 36 * whole


def test_a_token_of_cache_is_147456_bytes() -> None:
    assert cache_bytes_per_token(reference(), SHAPE) == 2 * 36 * 8 * 128 * 2 == 147_456


def test_the_cache_is_what_the_weights_leave_of_the_engines_share() -> None:
    assert cache_bytes(reference(), SHAPE, GIVEN) == pytest.approx(0.8 * 140 * GIB - 2 * N)


def test_weights_that_do_not_fit_are_refused_in_words() -> None:
    small = Assumptions(prompt_tokens=256, completion_tokens=1000, gpu_gib=8, tflops=350, bandwidth=2.9)
    with pytest.raises(ConfigError, match=r"need 7.5 GiB of each rollout GPU"):
        cache_bytes(reference(), SHAPE, small)


def test_a_weight_sync_sends_two_bytes_a_parameter_in_buckets_of_64_mib() -> None:
    numbers = values(reference())
    assert numbers["Weights", "sent per weight sync"] == 2 * N == 8_044_936_192
    assert numbers["Weights", "buckets"] == 120  # 119.9


def test_training_takes_eight_operations_a_parameter_and_token_two_for_old_logprobs_and_two_for_the_teacher() -> None:
    """Of 32 updates the first has no pass for old log-probs."""
    operations = N * (8 * 2048 * 1256 + 2 * 2048 * 1256 * 31 / 32 + 2 * 2048 * 2256)
    unshared = reference("trainer.share_prompts=false")
    assert training_seconds(unshared, SHAPE, GIVEN, ranks=6) == pytest.approx(operations / 6 / 350e12)


def test_old_logprobs_read_a_prompt_once_a_group_and_a_teacher_two_demonstrations() -> None:
    scored, taught = 2048 * 1000 + 256 * 256, 2048 * 1000 + 512 * 1256
    operations = N * (8 * 2048 * 1256 + 2 * scored * 31 / 32 + 2 * taught)
    assert training_seconds(reference(), SHAPE, GIVEN, ranks=6) == pytest.approx(operations / 6 / 350e12)


def test_with_one_update_a_step_nothing_is_scored_for_old_logprobs() -> None:
    one = reference("trainer.share_prompts=false", "trainer.groups_per_update=256")
    operations = N * (8 * 2048 * 1256 + 2 * 2048 * 2256)
    assert training_seconds(one, SHAPE, GIVEN, ranks=6) == pytest.approx(operations / 6 / 350e12)


def test_sampling_reads_the_weights_and_every_live_cache_for_each_token() -> None:
    # 1,024 completions on each of two GPUs, 512 at a time: 2,000 reads of weights and 512 caches of 756 tokens.
    reading = 2 * N + 512 * 756 * 147_456
    assert sampling_seconds(reference(), SHAPE, GIVEN, replicas=2) == pytest.approx(2000 * reading / 2.9e12)


def test_on_policy_sampling_and_training_take_turns_and_otherwise_overlap() -> None:
    assert step_seconds(reference(), 40.0, 60.0) == 100.0
    assert step_seconds(reference("trainer.max_staleness=1"), 40.0, 60.0) == 60.0


def test_the_best_split_of_the_gpus_is_the_quickest() -> None:
    replicas, seconds = best_split(reference(), SHAPE, GIVEN)
    for other in range(1, 8):
        sampling = sampling_seconds(reference(), SHAPE, GIVEN, replicas=other)
        training = training_seconds(reference(), SHAPE, GIVEN, ranks=8 - other)
        assert seconds <= sampling + training
    assert replicas == 3
