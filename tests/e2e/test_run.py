"""`retort run` with every real service: undisturbed, interrupted twice, and with its services killed."""

import math
import re
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.cli.__main__ import main as retort_main
from tests.e2e.launched_run import GROUPS_PER_STEP, ROOT, LaunchedRun
from tests.e2e.outsider import COMMANDS, ROLES, answers_to_an_outsider

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

STEPS = 3
CLOSE = 1e-4
"""Largest difference between served and trained log-probs, or probabilities, in float32."""
NOTHING_LEFT = {"processes": [], "ports": [], "shared memory": []}
REFERENCE_NAMES = {
    "critic/score/mean",
    "critic/rewards/mean",
    "response_length/mean",
    "response_length/max",
    "response_length/min",
    "response_length/clip_ratio",
    "actor/pg_loss",
    "actor/pg_clipfrac",
    "actor/pg_clipfrac_lower",
    "actor/ppo_kl",
    "actor/grad_norm",
    "actor/lr",
    "actor/entropy",
    "self_distillation/success_group_fraction",
    "self_distillation/success_sample_fraction",
    "self_distillation/reprompt_sample_fraction",
    "rollout_corr/rollout_is_mean",
    "rollout_corr/kl",
    "training/rollout_probs_diff_mean",
    "training/rollout_probs_diff_max",
    "training/rollout_probs_diff_std",
    "perf/throughput",
    "perf/total_num_tokens",
    "timing_s/step",
    "timing_s/wait_groups",
    "timing_s/old_logprobs",
    "timing_s/teacher",
    "timing_s/update",
    "timing_s/weight_sync",
    "weight_sync/probe_gap",
    "staleness/max",
}


def check_training(run: LaunchedRun, steps: int) -> None:
    """What holds for every run, however often it was interrupted."""
    metrics = run.metrics()
    assert [line["step"] for line in metrics] == list(range(steps + 1))
    assert [line["policy_version"] for line in metrics] == list(range(steps + 1))
    for line in metrics[1:]:
        if line["critic/mixed_group_fraction"]:  # else nothing is computed for the step
            assert line["training/rollout_probs_diff_max"] < CLOSE, line
        assert line["weight_sync/probe_gap"] < CLOSE, line

    groups = run.groups()
    assert Counter(group["group_id"] for group in groups) == run.admitted(steps)
    assert Counter(group["step"] for group in groups) == dict.fromkeys(range(1, steps + 1), GROUPS_PER_STEP)
    for group in groups:
        for rollout in group["rollouts"]:
            tokens = len(rollout["completion_ids"])
            assert rollout["policy_versions"] == [group["step"] - 1] * tokens, group["group_id"]
            assert len(rollout["rollout_logprobs"]) == tokens > 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> LaunchedRun:
    """A run of three steps with two trainer ranks, whose updates start when their groups are there, at its end.

    Meanwhile an outsider has tried its ports.
    """
    run = LaunchedRun(tmp_path_factory.mktemp("finished") / "run")
    run.start(trainer__steps=STEPS, trainer__ranks=2, trainer__update_order="arrival", checkpoint__every=1)
    run.until_step(0)
    run.answers = answers_to_an_outsider(run)
    assert run.finish() == 0, run.tails()
    return run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[LaunchedRun]:
    """A run of the test's own. Should the test fail, pytest shows its logs."""
    run = LaunchedRun(tmp_path / "run")
    yield run
    if run.launcher.poll() is None:
        run.launcher.kill()
        run.launcher.wait()
    print(run.tails())


def test_versions_advance_and_every_group_is_trained_on_once(finished: LaunchedRun) -> None:
    check_training(finished, STEPS)


def test_every_step_is_measured_under_the_names_of_the_reference(finished: LaunchedRun) -> None:
    untrained, *steps = finished.metrics()
    assert 0 <= untrained["val-core/periodic_table/acc/mean@4"] <= 1
    assert "val-core/periodic_table/acc/best@4/mean" in untrained
    assert "val-core/periodic_table/acc/mean@4" in steps[-1]
    assert [line["step"] for line in finished.metrics() if "val-core/periodic_table/acc/mean@4" in line] == [0, STEPS]
    for line in steps:
        assert REFERENCE_NAMES - line.keys() == set()
        assert [name for name, value in line.items() if not math.isfinite(value)] == []
        assert (line["staleness/max"], line["weight_sync/replicas"]) == (0, 1)


def test_rewards_and_advantages_are_those_of_the_groups(finished: LaunchedRun) -> None:
    for line in finished.metrics()[1:]:
        groups = [group for group in finished.groups() if group["step"] == line["step"]]
        rewards = [rollout["reward"] for group in groups for rollout in group["rollouts"]]
        assert line["critic/score/mean"] == pytest.approx(sum(rewards) / len(rewards))
        for group in groups:
            correct = [rollout["parsed"] == group["answer"] for rollout in group["rollouts"]]
            assert [rollout["reward"] for rollout in group["rollouts"]] == list(map(float, correct))
            assert sum(rollout["advantage"] for rollout in group["rollouts"]) == pytest.approx(0, abs=1e-5)


def test_the_exported_model_loads_and_every_tensor_was_trained(finished: LaunchedRun) -> None:
    before = dict(AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny").named_parameters())
    model = AutoModelForCausalLM.from_pretrained(finished.directory / "hf")
    assert {name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])} == set()
    tokenizer = AutoTokenizer.from_pretrained(finished.directory / "hf")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Au?"}], add_generation_prompt=True)
    assert len(prompt) > 0


def test_the_report_is_one_page_that_needs_no_network(finished: LaunchedRun) -> None:
    page = (finished.directory / "report.html").read_text()
    assert "<html" in page
    assert re.findall(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?https?:|@import""", page) == []


def test_the_status_tells_how_it_ended(finished: LaunchedRun) -> None:
    status = finished.status()
    assert (status["phase"], status["exit_code"], status["processes"]) == ("done", 0, [])
    assert (status["step"], status["steps"], status["policy_version"]) == (STEPS, STEPS, STEPS)


def test_a_finished_run_leaves_no_process_no_port_and_no_shared_memory(finished: LaunchedRun) -> None:
    assert len(finished.addresses) == 3  # Valkey, reward service, rollout service
    assert not finished.shared_memory  # vLLM's, between several processes, of which a CPU has one
    assert finished.leftovers() == NOTHING_LEFT


def test_whoever_has_no_secret_of_the_run_gets_nothing_and_a_role_only_its_own(finished: LaunchedRun) -> None:
    refused = {f"redis, {role}, {command}": "NoPermissionError" for role in ROLES for command in COMMANDS}
    assert finished.answers == refused | {f"redis, {role}, PING": "True" for role in ROLES} | {
        "redis, no password": "AuthenticationError",
        "reward": "UNAUTHENTICATED",
        "reward, wrong token": "UNAUTHENTICATED",
        "reward, token": "reward 1.0",
        "control": "401",
    }
    secrets = [file for file in (finished.directory / "secrets").glob("*/*") if file.suffix != ".acl"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets} == {0o600}
    assert {stat.S_IMODE(file.parent.stat().st_mode) for file in secrets} == {0o700}
    assert stat.S_IMODE((finished.directory / "config.toml").stat().st_mode) == 0o600


def test_a_run_of_a_new_task_is_resumed_after_an_interruption_and_after_its_launcher_was_killed(
    run: LaunchedRun, tmp_path: Path
) -> None:
    steps = 8
    assert retort_main(["task", "new", "symbols", "--directory", str(tmp_path)]) == 0
    run.start("--task", str(tmp_path / "symbols.py"), trainer__steps=steps, checkpoint__every=2)
    run.until_step(1)
    run.signal(signal.SIGINT)
    assert run.finish() == 130, run.tails()
    saved = run.last_step()
    assert 1 <= saved < steps
    assert (run.status()["phase"], run.status()["exit_code"]) == ("stopped", 130)
    assert "--resume" in run.output.read_text()
    assert run.leftovers() == NOTHING_LEFT

    run.start("--resume")
    run.until_step(saved + 1)
    assert len(run.processes()) >= 4
    run.signal(signal.SIGKILL)
    run.launcher.wait()
    assert run.leftovers() == NOTHING_LEFT

    run.start("--resume")
    assert run.finish() == 0, run.tails()
    check_training(run, steps)
    assert "val-core/symbols/acc/mean@4" in run.metrics()[-1]
    assert run.leftovers() == NOTHING_LEFT


def test_a_run_that_trains_adapters_leaves_a_whole_model_that_differs_where_adapters_are(run: LaunchedRun) -> None:
    steps = 2
    run.start(trainer__steps=steps, lora__rank=4, trainer__learning_rate=1e-3)
    assert run.finish() == 0, run.tails()
    check_training(run, steps)
    before = dict(AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny").named_parameters())
    model = AutoModelForCausalLM.from_pretrained(run.directory / "hf")
    trained = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert trained == {name for name in before if "_proj" in name}


def test_a_run_with_staleness_samples_ahead_within_the_bound_and_serves_its_last_version(run: LaunchedRun) -> None:
    run.start(trainer__steps=6, trainer__max_staleness=1, trainer__learning_rate=1e-3)
    assert run.finish() == 0, run.tails()
    lines = [line for line in run.metrics() if line["step"] > 0]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line["staleness/max"] for line in lines} == {0, 1}
    assert all(line["weight_sync/replicas"] == 1 and line["weight_sync/seconds"] > 0 for line in lines)
    assert all(line["timing_s/snapshot"] <= line["timing_s/weight_sync"] for line in lines)
    assert "leaked" not in (run.directory / "logs" / "trainer.log").read_text()


@pytest.mark.chaos
def test_services_that_are_killed_come_back_and_the_run_goes_on(run: LaunchedRun) -> None:
    steps = 14
    run.start(trainer__steps=steps, checkpoint__every=2)
    run.until_step(1)
    for service in ("rollout-0", "reward", "trainer"):
        run.kill(service)
    assert run.restarts() == {"redis": 0, "reward": 1, "rollout-0": 1, "trainer": 1}
    assert run.finish() == 0, run.tails()
    check_training(run, steps)
    assert run.leftovers() == NOTHING_LEFT
