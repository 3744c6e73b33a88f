"""vLLM's own scheduler: paused, it lets the probe through and nothing else, whatever room there is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from services.rollout.probe_scheduler import PROBE, AsyncProbeScheduler, ProbeScheduler

MODEL = Path(__file__).parents[3] / "models" / "tiny"
BLOCK = 16
SCHEDULERS = pytest.mark.parametrize("scheduler_of", [ProbeScheduler, AsyncProbeScheduler])
Kind = Callable[..., Scheduler]


def a_scheduler(kind: Kind, *, blocks: int = 100) -> Scheduler:
    """Of an engine that runs three requests at a time, with a cache of so many blocks, of which vLLM keeps one."""
    config = EngineArgs(
        model=str(MODEL),
        max_num_seqs=4,
        max_num_active_seqs=3,
        scheduling_policy="priority",
        async_scheduling=False,
        enable_prefix_caching=False,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = kind is AsyncProbeScheduler  # not on a CPU
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )


def add(scheduler: Scheduler, name: str, priority: int = 0, *, max_tokens: int = 9) -> None:
    prompt = list(range(2 * BLOCK))
    scheduler.add_request(Request(name, prompt, SamplingParams(max_tokens=max_tokens), None, priority=priority))


def step(scheduler: Scheduler) -> set[str]:
    """Who was given a token in an engine step."""
    output = scheduler.schedule()
    names = list(output.num_scheduled_tokens)
    indices = {name: index for index, name in enumerate(names)}
    scheduler.update_from_output(output, ModelRunnerOutput(names, indices, sampled_token_ids=[[7] for _ in names]))
    return set(names)


@SCHEDULERS
def test_paused_nothing_is_sampled_and_the_engine_has_nothing_to_do(scheduler_of: Kind) -> None:
    scheduler = a_scheduler(scheduler_of)
    for name in "abcd":
        add(scheduler, name)
    assert step(scheduler) == {"a", "b", "c"}
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not scheduler.has_requests()
    assert step(scheduler) == set()


@SCHEDULERS
def test_paused_the_probe_is_sampled_alone_and_afterwards_all_go_on(scheduler_of: Kind) -> None:
    """Three run, one waits, so the probe has a place beyond those that the engine has."""
    scheduler = a_scheduler(scheduler_of)
    for name in "abcd":
        add(scheduler, name)
    step(scheduler)
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    add(scheduler, "probe", PROBE, max_tokens=1)
    add(scheduler, "e")
    assert scheduler.has_requests()
    assert step(scheduler) == {"probe"}
    assert step(scheduler) == set()
    assert not scheduler.has_unfinished_requests()

    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert step(scheduler) == {"a", "b", "c"}
    assert all(request.num_output_tokens == 2 for request in scheduler.running)
    for _ in range(7):
        step(scheduler)
    assert step(scheduler) == {"d", "e"}


@SCHEDULERS
def test_a_full_cache_gives_the_probe_the_place_of_the_newest_request(scheduler_of: Kind) -> None:
    """The three have three blocks each, of nine that can be had; the probe needs two."""
    scheduler = a_scheduler(scheduler_of, blocks=10)
    for name in "abc":
        add(scheduler, name)
    step(scheduler)
    step(scheduler)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    add(scheduler, "probe", PROBE, max_tokens=1)
    assert step(scheduler) == set()
    assert step(scheduler) == {"probe"}

    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert step(scheduler) == {"a", "b", "c"}
    assert [len(request.output_token_ids) for request in scheduler.requests.values()] == [3, 3, 3]
