from typing import Any

from retort.cli.bottleneck import bottleneck


def a_line(number: int, **seconds: float) -> dict[str, Any]:
    timings = {f"timing_s/{part}": spent for part, spent in seconds.items()}
    return {"step": number, "perf/trainer_ranks": 4, "weight_sync/replicas": 4, **timings}


def test_a_trainer_that_works_most_of_the_step_wants_a_rank() -> None:
    line = a_line(1, step=100.0, old_logprobs=10.0, teacher=20.0, update=30.0, wait_groups=30.0)
    # 60 s of training on 4 ranks are 48 s on 5; 30 s of waiting for 4 replicas are 40 s for 3.
    assert bottleneck([line]) == (
        "Most of a step of 100 s goes into training: 60%. One trainer rank more would make that about 88 s, "
        "on a GPU taken from rollout 98 s."
    )


def test_a_trainer_that_waits_most_of_the_step_wants_a_replica() -> None:
    line = a_line(1, step=100.0, update=30.0, wait_groups=60.0) | {"perf/trainer_ranks": 1}
    # The trainer's only GPU cannot be given away.
    assert bottleneck([line]) == (
        "Most of a step of 100 s goes into waiting for completions: 60%. "
        "One rollout replica more would make that about 88 s."
    )


def test_the_median_of_the_last_ten_steps_counts() -> None:
    slow, fast = a_line(1, step=1000.0, weight_sync=900.0), a_line(2, step=10.0, weight_sync=6.0, update=2.0)
    lines = [slow] * 20 + [fast] * 8 + [slow] * 2
    assert bottleneck(lines) == "Most of a step of 10 s goes into weight sync: 60%."


def test_nothing_is_said_before_the_first_step() -> None:
    assert bottleneck([]) == ""
    assert bottleneck([a_line(0, step=5.0)]) == ""
