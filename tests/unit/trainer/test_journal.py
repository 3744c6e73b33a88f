import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from services.trainer.batch import StepBatch
from services.trainer.fence import Fence
from services.trainer.journal import Journal, RunJournal
from services.trainer.moments import moments
from services.trainer.update import Update
from services.trainer.weight_sender import SyncReport
from services.trainer.work import Work
from tests.integration.queue_run import an_item
from tests.training import a_batch, a_config, a_group, a_question, a_rollout

UPDATE = Update(0.25, 1.5, 1e-3, torch.stack([moments(torch.ones(1))] * 3), torch.stack([moments(torch.ones(1))] * 4))
QUESTIONS = [a_question(index, answer="C") for index in range(20)]


@pytest.fixture
def progress() -> dict[str, Any]:
    """What was last said to Redis."""
    return {}


def a_journal(directory: Path, progress: dict[str, Any], version: int = 0) -> RunJournal:
    return RunJournal(
        a_config(directory),
        version=version,
        question_of=lambda group: QUESTIONS[int(group.group_id.rpartition("-")[2])],
        decode=lambda ids: " ".join(map(str, ids)),
        set_progress=lambda **fields: progress.update(fields),
        fence=Fence(directory / "epoch", patience_s=1.0),
    )


def a_step(step: int, reward: float = 1.0) -> StepBatch:
    """Question 17 with a right answer that no sibling taught, a wrong one that the first taught; and question 3."""
    taught = a_group(
        a_rollout([5, 6], reward=reward), a_rollout([7], reward=0.0), group_id="0-000017", step=step, prompt_ids=[1]
    )
    other = a_group(a_rollout([8], reward=1.0), group_id="0-000003", step=step)
    batch = a_batch([taught, other], [0.5, -0.5, 0.0], [None, [1, 2], [1]], step=step)
    batch.old_logprobs, batch.entropies = batch.rollout_logprobs, torch.ones(4)
    batch.token_weights = torch.tensor([1.0, 1.0, 0.9, 0.0])
    batch.update_of = torch.tensor([2, 1, 1])
    return batch


def record(journal: RunJournal, batch: StepBatch) -> None:
    journal.record(batch, [UPDATE], SyncReport(replicas=2, probe_gap=0.125), Work())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("torn", ['{"part": "upd', '{"part": "update", "step": 1, "end": 3.0, "seconds": 1.0}'])
def test_a_line_of_the_timeline_that_a_crash_cut_off_costs_no_other(
    tmp_path: Path, progress: dict[str, Any], torn: str
) -> None:
    first = '{"part": "teacher", "step": 1, "end": 2.0, "seconds": 1.0}\n'
    (tmp_path / "timeline.jsonl").write_text(first + torn)
    with a_journal(tmp_path, progress).timing("update"):
        pass
    assert [span["part"] for span in lines(tmp_path / "timeline.jsonl")] == ["teacher", "update"]


def test_every_part_of_a_step_is_a_line_of_the_timeline(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    journal = a_journal(tmp_path, progress)
    for name in ("wait_groups", "update", "wait_groups", "update"):
        with journal.timing(name):
            pass
    record(journal, a_step(1))
    with journal.timing("checkpoint"):
        pass
    spans = lines(tmp_path / "timeline.jsonl")
    assert [(span["part"], span["step"]) for span in spans] == [
        *[("wait_groups", 1), ("update", 1)] * 2,
        ("checkpoint", 1),
    ]
    ends = [span["end"] for span in spans]
    assert ends == sorted(ends)


def test_a_step_is_one_line_of_metrics(mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]) -> None:
    journal = a_journal(tmp_path, progress)
    journal.record_untrained()
    for name in ("wait_groups", "old_logprobs", "teacher", "update", "weight_sync"):
        with journal.timing(name):
            pass
    record(journal, a_step(1))
    untrained, line = lines(tmp_path / "metrics.jsonl")
    assert (untrained["step"], untrained["policy_version"]) == (0, 0)
    assert (line["step"], line["policy_version"]) == (1, 1)
    for name in ("wait_groups", "old_logprobs", "teacher", "update", "weight_sync", "step"):
        assert 0 <= line[f"timing_s/{name}"] < 60
    tokens = 1 + 1 + 3 + 4
    assert line["perf/throughput"] == pytest.approx(tokens / line["timing_s/step"])
    expected = {
        "perf/total_num_tokens": tokens,
        "critic/score/mean": 2 / 3,
        "actor/pg_loss": 0.25,
        "actor/grad_norm": 1.5,
        "weight_sync/replicas": 2,
        "weight_sync/probe_gap": 0.125,
        "staleness/max": 0,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected)


def test_times_add_up_within_a_step_and_start_again_with_the_next(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    journal = a_journal(tmp_path, progress)
    with journal.timing("checkpoint"):
        pass
    record(journal, a_step(1))
    record(journal, a_step(2))
    first, second = lines(tmp_path / "metrics.jsonl")
    assert "timing_s/checkpoint" in first
    assert "timing_s/checkpoint" not in second


def test_the_groups_of_a_step_are_kept_with_what_was_learned_from_them(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    record(a_journal(tmp_path, progress), a_step(12))
    group, other = lines(tmp_path / "rollouts" / "step-000012.jsonl")
    rollouts = group.pop("rollouts")
    assert group == {
        "group_id": "0-000017",
        "step": 12,
        "data_index": 17,
        "data_source": "toy",
        "question": "Question 17?",
        "answer": "C",
        "sampled_by": "rollout-0",
        "generate_seconds": 0.5,
        "score_seconds": 0.25,
        "began": 1000.0,
        "prompt_ids": [1],
    }
    assert rollouts[0] == {
        "completion_ids": [5, 6],
        "rollout_logprobs": [-1.0, -1.0],
        "policy_versions": [0, 0],
        "finish_reason": "stop",
        "reward": 1.0,
        "parsed": "B",
        "format_ok": True,
        "text": "5 6",
        "advantage": 0.5,
        "demonstration": None,
        "token_weights": None,
        "update": 2,
        "has_gradient": True,
    }
    assert (rollouts[1]["advantage"], rollouts[1]["demonstration"]) == (-0.5, 0)
    assert rollouts[1]["token_weights"] == pytest.approx([0.9])
    assert other["rollouts"][0]["token_weights"] is None, "a row without advantage was not computed"
    counted = [(r["update"], r["has_gradient"]) for r in (*rollouts, *other["rollouts"])]
    assert counted == [(2, True), (1, True), (1, False)]


def test_a_step_that_is_trained_again_replaces_its_file(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    record(a_journal(tmp_path, progress), a_step(1, reward=0.5))
    record(a_journal(tmp_path, progress), a_step(1, reward=1.0))
    [path] = (tmp_path / "rollouts").iterdir()
    assert [group["rollouts"][0]["reward"] for group in lines(path)] == [1.0, 1.0]


def test_a_resumed_run_cuts_its_metrics_back_to_the_checkpoint(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    journal = a_journal(tmp_path, progress)
    journal.record_untrained()
    for step in (1, 2, 3):
        record(journal, a_step(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 17')  # torn by the kill
    resumed = a_journal(tmp_path, progress, version=2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    record(resumed, a_step(3))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_run_without_checkpoint_begins_its_metrics_anew(tmp_path: Path, progress: dict[str, Any]) -> None:
    a_journal(tmp_path, progress).record_untrained()
    a_journal(tmp_path, progress).record_untrained()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0]


def test_a_validation_is_kept_and_counts_in_the_line_of_its_step_alone(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    journal = a_journal(tmp_path, progress)
    groups = [a_group(a_rollout(), a_rollout(reward=0.0), group_id="v10-000001", kind="validation", step=10)]
    journal.keep_validation(10, [(group, QUESTIONS[1]) for group in groups])
    record(journal, a_step(10))
    record(journal, a_step(11))
    with_validation, without = lines(tmp_path / "metrics.jsonl")
    assert with_validation["val-core/toy/acc/mean@2"] == 0.5
    assert not any(name.startswith("val-") for name in without)
    [kept] = lines(tmp_path / "validation" / "step-000010.jsonl")
    assert (kept["group_id"], kept["data_index"]) == ("v10-000001", 1)
    taught = [(r["advantage"], r["demonstration"], r["token_weights"]) for r in kept["rollouts"]]
    assert taught == [(None, None, None)] * 2


def test_a_validation_that_ends_beside_a_later_step_is_one_more_line_of_its_own(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    journal = a_journal(tmp_path, progress)
    record(journal, a_step(10))
    assert not journal.is_validated(10)
    group = a_group(a_rollout(), a_rollout(reward=0.0), group_id="v10-000001", kind="validation", step=10)
    journal.keep_validation(10, [(group, QUESTIONS[1])])
    record(journal, a_step(11))
    ten, validation, eleven = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in (ten, validation, eleven)] == [10, 10, 11]
    assert validation["val-core/toy/acc/mean@2"] == 0.5
    assert not any(name.startswith("val-") for name in ten | eleven)
    assert journal.is_validated(10)
    assert a_journal(tmp_path, progress, version=10).is_validated(10), "a resumed run knows it as well"


def test_progress_says_what_the_trainer_does_and_for_whom_it_waits(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    journal = a_journal(tmp_path, progress, version=4)
    with journal.timing("wait_groups", waiting_for="the groups of step 5", step=5):
        assert progress["phase"] == "waiting for rollouts"
        assert progress["waiting_for"] == "the groups of step 5"
        assert (progress["step"], progress["steps"], progress["policy_version"]) == (5, 3, 4)
        since, updated = progress["since"], progress["updated"]
        journal.beat()
        assert progress["since"] == since
        assert progress["updated"] >= updated
    record(journal, a_step(5))
    journal.show("done")
    assert (progress["phase"], progress["step"], progress["policy_version"]) == ("done", 5, 5)


def test_other_ranks_write_nothing_and_take_part_in_gathering_token_weights(mesh: DeviceMesh, tmp_path: Path) -> None:
    journal, batch = Journal(), a_step(1)
    with journal.timing("update"):
        journal.beat()
    journal.record_untrained()
    journal.record(batch, [UPDATE], SyncReport(), Work())
    assert batch.token_weights.tolist() == pytest.approx([1.0, 1.0, 0.9, 0.0])
    assert list(tmp_path.iterdir()) == []


def test_work_that_was_given_up_is_noted_with_its_question_and_the_reason(
    mesh: DeviceMesh, tmp_path: Path, progress: dict[str, Any]
) -> None:
    journal = a_journal(tmp_path, progress)
    for reason in ("completion 0 is unscorable: answer is empty", "failed 4 times"):
        journal.keep_given_up(an_item("0-000017", step=3), QUESTIONS[17], reason)
    first, second = lines(tmp_path / "given_up.jsonl")
    assert first.pop("time") > 0
    assert first == {
        "group_id": "0-000017",
        "step": 3,
        "data_index": 17,
        "data_source": "toy",
        "question": "Question 17?",
        "answer": "C",
        "reason": "completion 0 is unscorable: answer is empty",
    }
    assert second["reason"] == "failed 4 times"


def test_while_a_sync_lasts_the_phase_at_hand_waits_for_who_has_not_answered(
    tmp_path: Path, progress: dict[str, Any]
) -> None:
    journal = a_journal(tmp_path, progress)
    with journal.timing("wait_replica", waiting_for="a rollout replica"):
        since = progress["since"]
        journal.beat_in_sync("rollout-1 to answer probe")
        assert (progress["phase"], progress["since"]) == ("waiting for a rollout replica", since)
        assert progress["waiting_for"] == "rollout-1 to answer probe"
        journal.beat_in_sync("")
        assert progress["waiting_for"] == "a rollout replica"
        assert progress["updated"] >= since
