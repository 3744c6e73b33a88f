"""`retort replay`: the files of a run alone give its numbers again, every bit of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retort.cli.ports import free_ports
from services.trainer import replay
from tests.chaos import forked
from tests.chaos.conftest import MakeRun
from tests.chaos.run import ChaosRun
from tests.e2e.launched_run import ROOT

pytestmark = pytest.mark.timeout(900)
DIVERGED = 5


def replay_in_fork_server(arguments: list[str], output: Path) -> None:
    """`services.trainer.replay` as torchrun starts it, in a process that has torch loaded."""
    forked.redirect(output)
    [port] = free_ports(1)
    os.environ.update(
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    )
    sys.argv = ["services.trainer.replay", *arguments]
    os.chdir(ROOT)
    sys.exit(replay.main())


def replayed(run: ChaosRun, step: int, context) -> dict[str, dict[str, object]]:
    """What the replay of a step found."""
    out, output = run.directory.parent / f"replay-{step}.json", run.directory.parent / "replay.output"
    arguments = ["--config", str(run.directory / "config.toml"), "--step", str(step), "--out", str(out)]
    process = forked.start_in_fork_server(context, replay_in_fork_server, arguments, output)
    process.join(300)
    assert process.exitcode == 0, output.read_text()
    return json.loads(out.read_text())


def test_a_recorded_step_is_repeated_bit_by_bit_without_redis_and_replicas(
    chaos_config, make_run: MakeRun, context
) -> None:
    run = make_run(chaos_config(6))
    run.start()
    assert run.finish(400) == 0, run.tails()
    assert sorted(path.name for path in (run.directory / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    before = {path: path.stat().st_mtime_ns for path in run.directory.rglob("*") if path.is_file()}
    # Step 6 from the checkpoint of version 4, step 3 from the initial model, whose checkpoints are gone.
    for step, start in ((6, 4), (3, 0)):
        found = replayed(run, step, context)
        assert found["start"] == start
        numbers = found["replayed"]
        assert {name: found["recorded"][name] for name in numbers} == numbers
        assert numbers["actor/pg_loss"] != 0
        assert len(numbers) > 30
    assert {path: path.stat().st_mtime_ns for path in before} == before

    # As a user types it; and a group whose log-probability is another by one bit is another step.
    command = [sys.executable, "-m", "retort.cli", "replay", str(run.directory), "--step", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "numbers have the same bits" in done.stdout
    file = run.directory / "rollouts" / "step-000006.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    logprobs = next(one for line in lines for one in line["rollouts"] if one["advantage"])["rollout_logprobs"]
    logprobs[0] += 1e-3
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = replayed(run, 6, context)
    assert found["replayed"]["rollout_corr/kl"] != found["recorded"]["rollout_corr/kl"]


def test_the_step_that_a_guard_stopped_is_kept_and_repeated(chaos_config, make_run: MakeRun, context) -> None:
    """So high a rate makes the weights infinite in the first update, and the loss of the second NaN."""
    run = make_run(
        chaos_config(2, trainer={"learning_rate": 1e30, "max_skipped_updates": 1}, timeouts={"max_restarts": 3})
    )
    run.start()
    assert run.finish(400) == DIVERGED, run.tails()
    found = replayed(run, 1, context)
    assert found["replayed"] == found["recorded"]
    assert found["recorded"]["update 2, grad norm"] == "nan"
    assert found["recorded"]["update 1, loss"] != "nan"
    assert "1 updates in a row had a gradient that is not finite" in found["recorded"]["why"]
