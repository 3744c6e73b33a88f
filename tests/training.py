"""What the tests of the trainer are built from: tiny language models, rollouts, groups, batches and configurations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from retort.config import RunConfig
from retort.questions import Question
from retort.rollouts import Rollout, RolloutGroup
from services.trainer.attention import PACKED_ATTENTION
from services.trainer.batch import StepBatch

VOCABULARY = 32


def a_language_model(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = PACKED_ATTENTION,
    tied: bool = True,
    kv_heads: int = 2,
    vocabulary: int = VOCABULARY,
) -> Qwen3ForCausalLM:
    """A random Qwen3 with two layers. In float64 its norms are too, where transformers' own would round to float32."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=4,
        tie_word_embeddings=tied,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(dtype)
    if dtype == torch.float64:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "Qwen3RMSNorm":
                    setattr(module, name, nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=dtype))
    return model


def a_rollout(
    completion_ids: Sequence[int] = (5, 6, 7),
    *,
    reward: float = 1.0,
    logprobs: Sequence[float] | None = None,
    policy_version: int = 0,
    parsed: str = "B",
) -> Rollout:
    return Rollout(
        completion_ids=list(completion_ids),
        rollout_logprobs=[-1.0] * len(completion_ids) if logprobs is None else list(logprobs),
        policy_versions=[policy_version] * len(completion_ids),
        finish_reason="stop",
        reward=reward,
        parsed=parsed,
        format_ok=True,
    )


def a_group(
    *rollouts: Rollout,
    group_id: str = "0-000000",
    kind: Any = "train",
    step: int = 1,
    prompt_ids: Sequence[int] = (1, 2, 3),
) -> RolloutGroup:
    return RolloutGroup(
        group_id=group_id,
        kind=kind,
        step=step,
        sampled_by="rollout-0",
        prompt_ids=list(prompt_ids),
        rollouts=list(rollouts),
        generate_seconds=0.5,
        began=1000.0,
        score_seconds=0.25,
    )


def a_question(index: int = 0, answer: str = "B", data_source: str = "toy") -> Question:
    messages = [{"role": "user", "content": f"Question {index}?"}]
    return Question(index=index, messages=messages, answer=answer, data_source=data_source)


def a_batch(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[float],
    teacher_prompts: Sequence[list[int] | None] | None = None,
    *,
    step: int = 1,
) -> StepBatch:
    """A step's batch as `assemble` makes it, with advantages and teacher prompts of the test's own choice."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    taught = list(teacher_prompts or [None] * len(rollouts))
    return StepBatch(
        step=step,
        groups=list(groups),
        rollouts=rollouts,
        prompts=[group.prompt_ids for group in groups for _ in group.rollouts],
        teacher_prompts=taught,
        demonstrations=[None if prompt is None else 0 for prompt in taught],
        advantages=torch.tensor(advantages, dtype=torch.float64),
        rollout_logprobs=torch.tensor([value for rollout in rollouts for value in rollout.rollout_logprobs]),
    )


def a_config(directory: Path | str = "", **sections: Mapping[str, Any]) -> RunConfig:
    """A small run: steps of 4 groups of 2, two updates a step. `sections` change single keys."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": "models/tiny", "dtype": "float32", "max_length": 256},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "sampling": {"max_completion_tokens": 8},
        "trainer": {
            "steps": 3,
            "groups_per_step": 4,
            "group_size": 2,
            "groups_per_update": 2,
            "update_order": "group",
            "activation_checkpointing": False,
        },
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return RunConfig.model_validate({"name": "test", "run_dir": str(directory), **values})
