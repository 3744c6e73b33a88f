"""A trainer that was frozen while another took over, and a trainer that dies between any two operations."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from retort.config import RunConfig, dump_config
from tests.chaos import forked
from tests.chaos.conftest import chaos_seed
from tests.chaos.run import ChaosRun
from tests.chaos.services_of_a_run import (
    FENCED,
    in_a_process_of_its_own,
    sweep,
    take_over_again_and_again,
    with_run_id,
)
from tests.chaos.tally import Tally

pytestmark = pytest.mark.timeout(1800)
STEPS = 24


def outcome_of(work: Any, config: RunConfig, directory: Path, context: Any, *arguments: object) -> dict[str, Any]:
    file, output = directory / "config.toml", directory / "output.log"
    file.write_text(dump_config(with_run_id(config, directory / "run")))
    process = forked.start_in_fork_server(context, in_a_process_of_its_own, work, str(file), output, *arguments)
    process.join(1500)
    logs = [output, *(directory / "run" / "logs").glob("*.log")]
    print("\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs))
    assert process.exitcode == 0
    return json.loads(output.with_suffix(".json").read_text())


@pytest.mark.parametrize("times", [2, pytest.param(12, marks=pytest.mark.chaos)])
def test_a_trainer_that_wakes_up_after_another_took_over_changes_nothing(
    times: int, chaos_config, context, tmp_path: Path, undisturbed, tally: Tally
) -> None:
    config = chaos_config(STEPS)
    seed = chaos_seed()
    outcome = outcome_of(take_over_again_and_again, config, tmp_path, context, seed, times)
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


@pytest.mark.parametrize(
    "share", [pytest.param(0.006, id="some"), pytest.param(1.0, id="all", marks=pytest.mark.chaos)]
)
def test_a_trainer_may_die_before_and_after_any_operation(
    share: float, chaos_config, context, tmp_path: Path, tally: Tally
) -> None:
    config = chaos_config(2, checkpoint={"every": 1}, rollout={"replicas": 1})
    outcome = outcome_of(sweep, config, tmp_path, context, share, chaos_seed())
    codes = outcome["codes"]
    tally.boundaries, tally.swept = outcome["boundaries"], len(codes)
    assert {boundary: ended for boundary, ended in codes.items() if ended != [-9, 0]} == {}
    results = {}
    for place in ("undisturbed", *(f"boundary-{number}" for number in range(1, len(codes) + 1))):
        run = ChaosRun(tmp_path / "run" / place, config, context)
        run.check_exactly_once()
        results[place] = run.results()
    assert {place for place, result in results.items() if result != results["undisturbed"]} == set()
    tally.runs += len(results)
    tally.identical += len(results)
