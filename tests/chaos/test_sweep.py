"""A process that dies before or after any of its operations: the run is finished, with the undisturbed bits."""

from pathlib import Path

import pytest

from tests.chaos.conftest import chaos_seed
from tests.chaos.run import ChaosRun
from tests.chaos.services_of_a_run import begin, outcome_of
from tests.chaos.sweep import sweep
from tests.chaos.tally import Tally

pytestmark = pytest.mark.timeout(6 * 3600)
ALL, BESIDE = 1.0, 4


@pytest.mark.parametrize(
    ("who", "share", "parts"),
    [
        pytest.param("trainer", 0.006, 1, id="trainer-some"),
        pytest.param("replica", 0.006, 1, id="replica-some"),
        pytest.param("trainer", ALL, BESIDE, id="trainer-all", marks=pytest.mark.chaos),
        pytest.param("replica", ALL, BESIDE, id="replica-all", marks=pytest.mark.chaos),
    ],
)
def test_a_process_may_die_before_and_after_any_operation(
    who: str, share: float, parts: int, chaos_config, context, tmp_path: Path, tally: Tally
) -> None:
    config = chaos_config(2, checkpoint={"every": 1}, rollout={"replicas": 1})
    places = [tmp_path / f"part-{part}" for part in range(parts)]
    begun = [
        begin(sweep, config, place, context, who, part, parts, share, chaos_seed()) for part, place in enumerate(places)
    ]
    outcomes = [outcome_of(process, place) for process, place in zip(begun, places, strict=True)]
    # Each part counts them anew.
    [boundaries] = {outcome["boundaries"] for outcome in outcomes}
    codes = {boundary: ended for outcome in outcomes for boundary, ended in outcome["codes"].items()}
    tally.boundaries[who] = (len(codes), boundaries)
    assert {boundary: ended for boundary, ended in codes.items() if ended != [-9, 0]} == {}
    assert share < ALL or len(codes) == boundaries
    for place, outcome in zip(places, outcomes, strict=True):
        results = {}
        for name in ("undisturbed", *(f"boundary-{number}" for number in range(1, len(outcome["codes"]) + 1))):
            run = ChaosRun(place / "run" / name, config, context)
            run.check_exactly_once()
            results[name] = run.results()
        assert {name for name, result in results.items() if result != results["undisturbed"]} == set()
        tally.runs += len(results)
        tally.identical += len(results)
