"""A trainer that was frozen while another took over."""

from itertools import pairwise
from pathlib import Path

import pytest

from tests.chaos.conftest import chaos_seed
from tests.chaos.run import ChaosRun
from tests.chaos.services_of_a_run import FENCED, begin, outcome_of, take_over_again_and_again
from tests.chaos.tally import Tally

pytestmark = pytest.mark.timeout(1800)
STEPS = 24


@pytest.mark.parametrize("times", [2, pytest.param(12, marks=pytest.mark.chaos)])
def test_a_trainer_that_wakes_up_after_another_took_over_changes_nothing(
    times: int, chaos_config, context, tmp_path: Path, undisturbed, tally: Tally
) -> None:
    config = chaos_config(STEPS)
    seed = chaos_seed()
    outcome = outcome_of(begin(take_over_again_and_again, config, tmp_path, context, seed, times), tmp_path)
    assert outcome["last"] == 0
    assert set(outcome["zombies"]) == {FENCED}
    accepted = [(epoch, call) for _, epoch, call in outcome["accepted"]]
    assert [pair for pair in pairwise(accepted) if pair[1][0] < pair[0][0]] == []
    run = ChaosRun(tmp_path / "run", config, context)
    run.check_exactly_once()
    assert run.results() == undisturbed(config)
    tally.runs += 1
    tally.identical += 1
    tally.zombies.update(outcome["frozen in"])
    tally.accepted_calls += len(accepted)
