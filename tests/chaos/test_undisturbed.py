"""What every run under chaos is compared with."""

import time

from tests.chaos.conftest import MakeRun


def test_two_undisturbed_runs_end_with_the_same_bits(make_run: MakeRun, chaos_config) -> None:
    results = []
    for name in ("first", "second"):
        started = time.monotonic()
        run = make_run(chaos_config(6), name)
        run.start()
        assert run.finish(60) == 0, run.tails()
        print("SECONDS", time.monotonic() - started)
        run.check_exactly_once()
        assert not any(run.leftovers().values())
        results.append(run.results())
    assert results[0] == results[1]
