"""Services that are at their memory limit: what fails of that is repeated by others, or by the user."""

import pytest

from tests.chaos.conftest import MakeRun, chaos_seed
from tests.chaos.faults import Chaos
from tests.chaos.tally import Tally

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
STEPS, FAULTS = 24, 20
STALLED = 4


def test_a_run_whose_services_hit_their_memory_limit_ends_with_the_undisturbed_bits(
    chaos_config, make_run: MakeRun, undisturbed, tally: Tally
) -> None:
    config = chaos_config(STEPS)
    expected = undisturbed(config)
    run = make_run(config)
    chaos = Chaos(run, chaos_seed())
    run.start()
    chaos.do(FAULTS, {"exhaust memory": 1.0})
    # Python waits for ever for a thread that had no memory to start; the watchdog ends such a run.
    while (code := chaos.finish()) == STALLED:
        run.resume()
    assert code == 0, run.tails()
    tally.add(chaos)
    run.check_exactly_once()
    assert run.results() == expected
    tally.identical += 1
    run.close()
