"""A process that dies before or after any of its operations: the run is finished, with the undisturbed bits."""

import random
from pathlib import Path
from typing import Any

import pytest

from retort.config import RunConfig
from tests.chaos.conftest import chaos_seed
from tests.chaos.run import ChaosRun
from tests.chaos.services_of_a_run import begin, outcome_of
from tests.chaos.sweep import boundaries, sweep
from tests.chaos.tally import Tally

pytestmark = pytest.mark.timeout(6 * 3600)
BESIDE = 4


def swept(who: str, share: float, config: RunConfig, directory: Path, context: Any, tally: Tally) -> None:
    """Kill it at a share of its boundaries, in parts beside each other."""
    first = directory / "undisturbed"
    all_of_them = outcome_of(begin(boundaries, config, first, context, who), first)
    chosen = random.Random(chaos_seed()).sample(all_of_them, max(1, round(share * len(all_of_them))))
    parts = {directory / f"part-{number}": chosen[number::BESIDE] for number in range(min(BESIDE, len(chosen)))}
    begun = {place: begin(sweep, config, place, context, who, part) for place, part in parts.items()}
    codes = {place: outcome_of(process, place) for place, process in begun.items()}
    tally.boundaries[who] = (sum(map(len, codes.values())), len(all_of_them))
    expected = ChaosRun(first / "run" / "undisturbed", config, context).results()
    for place, part in parts.items():
        assert codes[place] == {boundary: [-9, 0] for boundary in part}
        for number in range(1, len(part) + 1):
            run = ChaosRun(place / "run" / f"boundary-{number}", config, context)
            run.check_exactly_once()
            assert run.results() == expected, part[number - 1]
            tally.runs += 1
            tally.identical += 1


@pytest.mark.parametrize(
    "share", [pytest.param(0.006, id="some"), pytest.param(1.0, id="all", marks=pytest.mark.chaos)]
)
@pytest.mark.parametrize("who", ["trainer", "replica", "launcher"])
def test_a_process_may_die_before_and_after_any_operation(
    who: str, share: float, chaos_config, context, tmp_path: Path, tally: Tally
) -> None:
    swept(who, share, chaos_config(2, checkpoint={"every": 1}, rollout={"replicas": 1}), tmp_path, context, tally)
