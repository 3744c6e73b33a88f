"""A simulated fleet with the services' own control plane and a real server; its times can be worked out by hand."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.config import load_config
from services.rollout.engine_steps import TokenTime
from services.rollout.simulated_engine import Lengths
from services.trainer import weight_sender
from simulation import virtual_time
from simulation.run import simulate
from simulation.setup import Setup
from simulation.trainer import SimulatedTrainer

REFERENCE = Path(__file__).parents[2] / "configs" / "qwen3-4b-sciknoweval.toml"


def a_setup(replicas: int, order: str) -> Setup:
    """Four groups of two completions of 100 tokens at 10 ms, one group at a time; 2 s of training, 0.5 s of sync."""
    overrides = [
        f"rollout.replicas={replicas}",
        "rollout.concurrent_groups=1",
        f"trainer.update_order={order}",
        "trainer.groups_per_step=4",
        "trainer.groups_per_update=2",
        "trainer.group_size=2",
    ]
    return Setup(
        config=load_config(REFERENCE, overrides, env={}),
        token_time=TokenTime(0.01, 0.0),
        live_completions=16,
        lengths=Lengths(100, 0.0),
        prompt_tokens=1,
        training_s=2.0,
        transfer_s=0.5,
        reward_s=0.0,
        restart_s=3.0,
    )


@pytest.mark.parametrize(
    ("order", "expected_s"),
    [
        # Groups come after 1, 2, 3 and 4 s; then training, then the sync.
        ("group", 4 + 2 + 0.5),
        # The first update, of 1 s, is made while the last groups are sampled.
        ("arrival", 4 + 1 + 0.5),
    ],
)
def test_a_step_takes_what_sampling_training_and_sync_take(redis_url: str, order: str, expected_s: float) -> None:
    measured = simulate(a_setup(1, order), 2, redis_url)
    # The first step waits for the first weights besides.
    assert measured.step_s == pytest.approx([0.5 + expected_s, expected_s], abs=0.01)
    assert (measured.groups, measured.tokens) == (8, 8 * 2 * 100)


@pytest.mark.parametrize(("max_staleness", "expected_s"), [(0, 4 + 6 + 0.5), (1, 6)])
def test_with_staleness_sampling_and_sync_go_on_beside_training(
    redis_url: str, max_staleness: int, expected_s: float
) -> None:
    """Training takes 6 s, sampling 4 and the sync 0.5."""
    setup = replace(a_setup(1, "group"), training_s=6.0)
    trainer = setup.config.trainer.model_copy(update={"max_staleness": max_staleness})
    setup = replace(setup, config=setup.config.model_copy(update={"trainer": trainer}))
    assert simulate(setup, 4, redis_url).step_s[1:3] == pytest.approx([expected_s] * 2, abs=0.01)


def test_two_replicas_sample_in_half_the_time(redis_url: str) -> None:
    assert simulate(a_setup(2, "group"), 2, redis_url).step_s[1] == pytest.approx(2 + 2 + 0.5, abs=0.01)


def test_a_group_costs_redis_as_much_in_a_large_fleet_as_in_a_small_one(redis_url: str) -> None:
    """Eight replicas do eight times the work in the same time; what waits by the clock is divided by more groups."""
    alone, eight = (simulate(with_work_for(a_setup(replicas, "group")), 4, redis_url) for replicas in (1, 8))
    assert alone.step_s[1:] == eight.step_s[1:] == pytest.approx([6.5] * 3, abs=0.01)
    assert 30 < eight.redis_calls < alone.redis_calls < 60
    assert 14_000 < eight.redis_bytes < alone.redis_bytes < 20_000


def with_work_for(setup: Setup) -> Setup:
    """Four groups a step for each replica."""
    trainer = setup.config.trainer
    replicas, names = setup.config.rollout.replicas, ("groups_per_step", "groups_per_update")
    wider = {name: replicas * getattr(trainer, name) for name in names}
    return replace(setup, config=setup.config.model_copy(update={"trainer": trainer.model_copy(update=wider)}))


def test_a_replica_that_dies_costs_its_lease_and_no_group(redis_url: str) -> None:
    setup = replace(a_setup(2, "group"), deaths=1, death_every_s=1.6)  # in its second group, of four
    measured = simulate(setup, 2, redis_url)
    assert measured.groups == 8
    lease_s = setup.config.rollout.lease_s
    # Sampled anew by whoever looks first, at most 2 s after the lease ran out.
    assert 1.5 + lease_s <= measured.step_s[0] <= 1.6 + lease_s + 2 + 1 + 2 + 1


def test_the_command_prints_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(REFERENCE), "--replicas", "1", "--groups", "8", "--no-prediction", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["replicas"], row["efficiency"]) for row in printed["fleets"]] == [
        ("barrier", 1, 1.0),
        ("streamed", 1, 1.0),
    ]
    assert printed["assumptions"]["tflops"] == 350


def test_the_split_that_is_recommended_is_the_quickest_for_each_machine(capsys: pytest.CaptureFixture[str]) -> None:
    smaller = ["trainer.groups_per_step=4", "trainer.groups_per_update=2", "sampling.max_completion_tokens=2048"]
    words = ["simulate", str(REFERENCE), "--replicas", "1", "--groups", "8"]
    assert main([*words, *(word for setting in smaller for word in ("--set", setting))]) == 0
    text = capsys.readouterr().out
    rows = re.findall(r"^ +(8|16)  (barrier|streamed) +(\d+) +(\d+) +([\d.]+)(  <- recommended)?$", text, re.MULTILINE)
    for gpus in ("8", "16"):
        of_machine = [row for row in rows if row[0] == gpus]
        assert {row[1] for row in of_machine} == {"barrier", "streamed"}
        assert all(int(sampling) + int(training) == int(gpus) for _, _, sampling, training, _, _ in of_machine)
        [recommended] = [row for row in of_machine if row[5]]
        assert float(recommended[4]) == min(float(row[4]) for row in of_machine)


def test_a_stall_of_the_machine_makes_no_replica_silent(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = SimulatedTrainer._publish

    def stalled(trainer: SimulatedTrainer, version: int) -> None:
        time.sleep(0.5)
        publish(trainer, version)

    monkeypatch.setattr(weight_sender, "HEARD_OF_WITHIN_S", 0.2)
    monkeypatch.setattr(virtual_time, "REAL_WORK_S", 3)
    monkeypatch.setattr(SimulatedTrainer, "_publish", stalled)
    assert simulate(a_setup(1, "group"), 2, redis_url).step_s[1] == pytest.approx(4 + 2 + 0.5, abs=0.01)
