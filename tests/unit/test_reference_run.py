"""The pinned run file beside the model card's table and the set-up of the published run."""

from pathlib import Path

import pytest

from retort.config import RunConfig, load_config

FILE = Path(__file__).parents[2] / "configs" / "qwen3-4b-sciknoweval.toml"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(FILE, env={})


def test_the_hyperparameters_are_the_model_cards(config: RunConfig) -> None:
    trainer, method = config.trainer, config.method
    assert {
        "Base model": config.model.path,
        "Training steps": trainer.steps,
        "Train batch size": trainer.groups_per_step,
        "Rollouts per prompt": trainer.group_size,
        "Generations per step": trainer.groups_per_step * trainer.group_size,
        "PPO mini batch size": trainer.groups_per_update,
        "Learning rate": trainer.learning_rate,
        "LR warmup steps": trainer.warmup_steps,
        "Weight decay": trainer.weight_decay,
        "Grad clip": trainer.max_grad_norm,
        "Max prompt length": config.data.max_prompt_tokens,
        "Max response length": config.sampling.max_completion_tokens,
        "Max model length": config.model.max_length,
        "Train temperature": config.sampling.temperature,
        "Train top_p": config.sampling.top_p,
        "Validation generations": config.validation.samples,
        "Validation temperature": config.validation.temperature,
        "Validation top_p": config.validation.top_p,
        "vLLM GPU memory utilization": config.rollout.gpu_memory_utilization,
        "Save frequency": config.checkpoint.every,
        "Validation frequency": config.validation.every,
        "Token reweight lambda": method.reweight_lambda,
        "Token reweight eps_w": method.reweight_clip,
        "Token reweight decay steps": method.reweight_decay_steps,
        "Teacher update rate": method.teacher_update_rate,
        "Max reprompt length": method.max_teacher_prompt_tokens,
        "Rollout correction threshold": method.max_rollout_ratio,
    } == {
        "Base model": "Qwen/Qwen3-4B",
        "Training steps": 100,
        "Train batch size": 256,
        "Rollouts per prompt": 8,
        "Generations per step": 2048,
        "PPO mini batch size": 8,
        "Learning rate": 1e-6,
        "LR warmup steps": 10,
        "Weight decay": 0.01,
        "Grad clip": 1.0,
        "Max prompt length": 2048,
        "Max response length": 8192,
        "Max model length": 10240,
        "Train temperature": 1.0,
        "Train top_p": 1.0,
        "Validation generations": 16,
        "Validation temperature": 0.6,
        "Validation top_p": 0.95,
        "vLLM GPU memory utilization": 0.8,
        "Save frequency": 10,
        "Validation frequency": 10,
        "Token reweight lambda": 0.5,
        "Token reweight eps_w": 0.2,
        "Token reweight decay steps": 0,
        "Teacher update rate": 0.05,
        "Max reprompt length": 10240,
        "Rollout correction threshold": 2.0,
    }


def test_the_rest_is_as_the_published_runs_script_sets_it(config: RunConfig) -> None:
    method = config.method
    assert method.name == "rlsd"
    assert (method.clip_low, method.clip_high, method.dual_clip) == (0.2, 0.28, 3.0)
    assert method.success_threshold == 0.5
    assert config.trainer.update_order == "length_sweep"
    assert config.trainer.max_staleness == 0
    assert config.model.dtype == "bfloat16"
    assert config.data.checker == "mcq"
    assert config.validation.max_questions == 0


def test_no_part_of_the_method_is_replaced(config: RunConfig) -> None:
    parts = ("advantages", "context", "reweighting", "surrogate", "aggregation", "refill")
    assert [getattr(config.method, part) for part in parts] == [None] * len(parts)


def test_the_run_needs_the_eight_gpus_of_one_host(config: RunConfig) -> None:
    assert config.trainer.ranks + config.rollout.replicas * config.rollout.tensor_parallel == 8
