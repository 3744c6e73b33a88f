"""Random faults, from a seed that is printed. After each run: everything once, the same bits, nothing left."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from retort.config import RunConfig
from tests.chaos.conftest import MakeRun, chaos_seed
from tests.chaos.faults import WEIGHTS, Chaos
from tests.chaos.tally import Tally

pytestmark = pytest.mark.timeout(7200)
STEPS = 24
FAULTS_PER_RUN = 20
BESIDE = 4
"""Runs at the same time: each waits more than it works."""


@pytest.mark.parametrize(
    ("runs", "fewest"), [pytest.param(4, 60, id="some"), pytest.param(56, 1000, id="many", marks=pytest.mark.chaos)]
)
def test_whatever_happens_the_run_ends_with_the_bits_of_the_undisturbed_one(
    runs: int, fewest: int, chaos_config: Callable[..., RunConfig], make_run: MakeRun, undisturbed, tally: Tally
) -> None:
    configs = [chaos_config(STEPS, trainer={"ranks": 2 if number % 8 == 7 else 1}) for number in range(runs)]
    expected = [undisturbed(config) for config in configs]

    def disturbed(number: int) -> int:
        run = make_run(configs[number], f"run-{number}")
        chaos = Chaos(run, chaos_seed() * 1000 + number)
        run.start()
        chaos.do(FAULTS_PER_RUN, WEIGHTS)
        assert chaos.finish() == 0, run.tails()
        tally.add(chaos)
        run.check_exactly_once()
        assert run.results() == expected[number], f"run {number}"
        epochs = run.accepted_epochs()
        assert epochs == sorted(epochs)
        assert chaos.wrong_diagnoses == []
        assert not any(run.leftovers().values())
        run.close()
        tally.identical += 1
        return len(chaos.hits)

    with ThreadPoolExecutor(BESIDE) as pool:
        faults = sum(pool.map(disturbed, range(runs)))
    assert faults >= fewest, "runs ended before their plan did"
