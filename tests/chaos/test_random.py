"""Random faults, from a seed that is printed. After each run: everything once, the same bits, nothing left."""

from collections import Counter

import pytest

from tests.chaos.conftest import MakeRun, chaos_seed
from tests.chaos.faults import WEIGHTS, Chaos

pytestmark = pytest.mark.timeout(600)
STEPS = 16


@pytest.mark.parametrize("number", range(3))
def test_whatever_happens_the_run_ends_with_the_bits_of_the_undisturbed_one(
    number: int, chaos_config, make_run: MakeRun, undisturbed
) -> None:
    config = chaos_config(STEPS)
    expected = undisturbed(config)
    run = make_run(config, f"run-{number}")
    chaos = Chaos(run, chaos_seed() * 1000 + number)
    run.start()
    chaos.do(20, WEIGHTS)
    assert chaos.finish() == 0, run.tails()
    run.check_exactly_once()
    assert run.results() == expected
    epochs = chaos.accepted_epochs()
    assert epochs == sorted(epochs)
    assert not any(run.leftovers().values())
    print("HITS", len(chaos.hits), Counter((hit.kind, hit.state) for hit in chaos.hits))
    print("RECOVERED", chaos.recovered_s)
