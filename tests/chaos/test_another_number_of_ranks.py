"""A run that is killed and goes on with another number of trainer ranks."""

import pytest

from services.trainer.admission import data_indices
from tests.chaos.conftest import MakeRun
from tests.chaos.run import wait_until

STEPS = 8


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 3, marks=pytest.mark.chaos)])
def test_data_order_and_groups_are_those_of_an_undisturbed_run(
    before: int, after: int, chaos_config, make_run: MakeRun
) -> None:
    config = chaos_config(STEPS, trainer={"ranks": before})
    run = make_run(config)
    run.start()
    wait_until((run.directory / "checkpoints" / "step-000004").exists, "the checkpoint of step 4", 240)
    run.launcher.kill()
    run.resume(trainer__ranks=after)
    assert run.finish() == 0
    run.check_exactly_once()
    plans = [
        data_indices(step, num_questions=48, groups_per_step=config.trainer.groups_per_step, seed=config.seed)
        for step in range(1, STEPS + 1)
    ]
    in_order = [f"{epoch}-{index:06d}" for epoch, indices in plans for index in indices]
    assert [group["group_id"] for group in run.groups()] == in_order
    checkpoint = run.directory / "checkpoints" / f"step-{STEPS:06d}"
    assert len(list(checkpoint.glob("rank-*.safetensors"))) == after
    run.close()
