"""Random faults, from a seed that is printed. After each run: everything once, the same bits, nothing left."""

import pytest

from tests.chaos.conftest import MakeRun, chaos_seed
from tests.chaos.faults import WEIGHTS, Chaos
from tests.chaos.tally import Tally

pytestmark = pytest.mark.timeout(1200)
STEPS = 24
FAULTS_PER_RUN = 20
SHORT_FORM, LONG_FORM = range(1), range(1, 50)


@pytest.mark.parametrize("number", [*SHORT_FORM, *(pytest.param(n, marks=pytest.mark.chaos) for n in LONG_FORM)])
def test_whatever_happens_the_run_ends_with_the_bits_of_the_undisturbed_one(
    number: int, chaos_config, make_run: MakeRun, undisturbed, tally: Tally
) -> None:
    config = chaos_config(STEPS, trainer={"ranks": 2 if number % 8 == 7 else 1})
    expected = undisturbed(config)
    run = make_run(config, f"run-{number}")
    chaos = Chaos(run, chaos_seed() * 1000 + number)
    run.start()
    chaos.do(FAULTS_PER_RUN, WEIGHTS)
    assert chaos.finish() == 0, run.tails()
    tally.add(chaos)
    run.check_exactly_once()
    assert run.results() == expected
    epochs = chaos.accepted_epochs()
    assert epochs == sorted(epochs)
    assert not any(run.leftovers().values())
    tally.identical += 1
