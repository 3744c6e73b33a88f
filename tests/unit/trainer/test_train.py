"""The loop: what happens in a step, in which order, and what a stop or a resume leaves out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from retort.weight_sync import Snapshot
from services.trainer.batch import StepBatch
from services.trainer.checkpoint import Checkpoints
from services.trainer.export import Exports
from services.trainer.guards import DivergedError, Guards
from services.trainer.journal import Journal
from services.trainer.policy import Policy
from services.trainer.policy_model import TokenScores
from services.trainer.publish import WeightPublisher
from services.trainer.steps import Steps
from services.trainer.teacher import Teacher
from services.trainer.train import learn, train
from services.trainer.update import Update
from services.trainer.weight_sender import SyncReport
from services.trainer.work import Work
from tests.training import a_batch, a_config, a_group, a_language_model, a_rollout


class Recorder(Steps, WeightPublisher, Exports, Journal):
    """Hands out steps, and writes down what the loop asks of the outside world."""

    def __init__(self, logprob: float, stop_before: int, parts: Sequence[Sequence[int]], beside: bool) -> None:
        Journal.__init__(self)
        self.events: list[str] = []
        self.steps: list[StepBatch] = []
        self._pending: int | None = None
        self._beside = beside
        self._parts = parts
        self._logprob = logprob
        self._stop_before = stop_before

    @property
    def report(self) -> SyncReport:
        return SyncReport()

    @property
    def snapshot(self) -> Snapshot | None:
        return None

    def take(self, step: int) -> Iterator[StepBatch]:
        self.events.append(f"take {step}")
        if step == self._stop_before:
            return
        for ids in self._parts:
            rollouts = [a_rollout([5, one], logprobs=[self._logprob] * 2) for one in ids]
            yield a_batch([a_group(*rollouts)], [0.5, -0.25] * (len(ids) // 2), [[1, 2]] * len(ids), step=step)

    def publish(self, policy: Policy) -> None:
        self.events.append(f"publish {policy.version}")

    def validate(self, version: int, *, at_once: bool) -> float | None:
        self.events.append(f"validate {version}")
        self._pending = None if at_once or not self._beside else version
        return None if self._pending else version / 4

    def finish_validation(self) -> float | None:
        if self._pending is None:
            return None
        self.events.append(f"finish validation {self._pending}")
        score, self._pending = self._pending / 4, None
        return score

    def after_step(self, snapshot: Snapshot | None, score: float | None) -> None:
        self.events.append(f"export, {score}")

    def after_validation(self, snapshot: Snapshot | None, score: float) -> None:
        self.events.append(f"export if best, {score}")

    def release(self, version: int) -> None:
        self.events.append(f"release {version}")

    def should_save(self) -> bool:
        return False

    def record_untrained(self) -> None:
        self.events.append("record 0")

    def record(self, batch: StepBatch, updates: Sequence[Update], report: SyncReport, work: Work) -> None:
        self.events.append(f"record {batch.step}, {len(updates)} updates")
        self.steps.append(batch)


class LoggedCheckpoints(Checkpoints):
    """Says when it saves."""

    def __init__(self, directory: Path, events: list[str]) -> None:
        super().__init__(directory, keep_last=1)
        self._events = events

    def save(self, policy: Policy, teacher: Teacher) -> None:
        super().save(policy, teacher)
        self._events.append(f"save {policy.version}")


class ScoringPolicy(Policy):
    """Remembers how many rows were scored without a gradient."""

    scored: tuple[int, ...] = ()

    def score(self, batch: StepBatch, rows: Sequence[int], *rest: Any, **options: Any) -> TokenScores:
        self.scored += (len(rows),)
        return super().score(batch, rows, *rest, **options)


def run(
    mesh: DeviceMesh, directory: Path, *, version: int = 0, stop_before: int = 99, logprob: float = -3.0
) -> tuple[bool, list[str], Policy]:
    """Three steps of two updates; validation and checkpoint every second step."""
    world, finished, policy, _ = run_parts(
        mesh, directory, [range(8, 16)], version=version, stop_before=stop_before, logprob=logprob
    )
    return finished, world.events, policy


def run_parts(
    mesh: DeviceMesh,
    directory: Path,
    parts: Sequence[Sequence[int]],
    *,
    order: str = "group",
    version: int = 0,
    stop_before: int = 99,
    logprob: float = -3.0,
    beside: bool = False,
) -> tuple[Recorder, bool, Policy, Teacher]:
    """A run whose steps come in the given parts, each a group of completions that end in the given tokens."""
    config = a_config(
        directory,
        trainer={"warmup_steps": 0, "learning_rate": 1e-3, "max_logprob_gap": 9.0, "update_order": order},
        validation={"every": 2},
        checkpoint={"every": 2},
    )
    policy = Policy(a_language_model(), config.trainer, mesh, dtype=torch.float64, temperature=1.0)
    policy.version = version
    teacher = Teacher(policy)
    world = Recorder(logprob, stop_before, parts, beside)
    checkpoints = LoggedCheckpoints(directory / "checkpoints", world.events)
    finished = train(config, policy, teacher, world, world, checkpoints, world, world)
    return world, finished, policy, teacher


def test_a_run_from_the_beginning_to_the_end(mesh: DeviceMesh, tmp_path: Path) -> None:
    finished, events, policy = run(mesh, tmp_path)
    assert finished
    assert policy.version == 3
    assert events == [
        *("publish 0", "validate 0", "record 0"),
        *("take 1", "publish 1", "record 1, 2 updates", "export, None"),
        *("take 2", "publish 2", "validate 2", "record 2, 2 updates", "export, 0.5", "save 2", "release 2"),
        *("take 3", "publish 3", "validate 3", "record 3, 2 updates", "export, 0.75", "save 3", "release 3"),
    ]


def test_a_validation_beside_the_next_step_ends_before_another_version_is_served(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    world, *_ = run_parts(mesh, tmp_path, [range(8, 16)], beside=True)
    assert world.events[7:] == [
        *("take 2", "publish 2", "validate 2", "record 2, 2 updates", "export, None", "save 2", "release 2"),
        *("take 3", "finish validation 2", "export if best, 0.5"),
        *("publish 3", "validate 3", "record 3, 2 updates", "export, 0.75", "save 3", "release 3"),
    ]


def test_a_stop_during_a_validation_does_not_wait_for_it_and_the_resumed_run_validates_again(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    world, *_ = run_parts(mesh, tmp_path, [range(8, 16)], beside=True, stop_before=3)
    assert world.events[-3:] == ["save 2", "release 2", "take 3"]
    resumed, *_ = run_parts(mesh, tmp_path, [range(8, 16)], version=2)
    assert resumed.events[:3] == ["publish 2", "validate 2", "export if best, 0.5"]


def test_a_stop_saves_what_was_not_saved_and_says_that_it_is_not_finished(mesh: DeviceMesh, tmp_path: Path) -> None:
    finished, events, _ = run(mesh, tmp_path, stop_before=2)
    assert not finished
    assert events[-3:] == ["take 2", "save 1", "release 1"]


def test_a_stop_right_after_a_checkpoint_saves_nothing_twice(mesh: DeviceMesh, tmp_path: Path) -> None:
    _, events, _ = run(mesh, tmp_path, stop_before=3)
    assert events.count("save 2") == 1
    assert events[-1] == "take 3"


def test_a_resumed_run_publishes_what_it_has_and_goes_on(mesh: DeviceMesh, tmp_path: Path) -> None:
    finished, events, _ = run(mesh, tmp_path, version=2)
    assert finished
    assert events[:3] == ["publish 2", "validate 2", "export if best, 0.5"]
    assert events[3] == "take 3"


def test_a_finished_run_that_is_resumed_does_nothing(mesh: DeviceMesh, tmp_path: Path) -> None:
    assert run(mesh, tmp_path, version=3)[:2] == (True, ["publish 3", "validate 3", "export if best, 0.75"])


def test_an_engine_that_disagrees_ends_the_run_before_anything_is_learned(mesh: DeviceMesh, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="step 1"):
        run(mesh, tmp_path, logprob=-30.0)


def test_nothing_is_learned_from_what_an_engine_that_disagrees_sampled(mesh: DeviceMesh) -> None:
    config = a_config(trainer={"max_logprob_gap": 9.0})
    policy = Policy(a_language_model(), config.trainer, mesh, dtype=torch.float64, temperature=1.0)
    before = [shard.clone() for shard in policy.local_shards()]
    [batch] = Recorder(-30.0, 99, [range(8, 16)], beside=False).take(1)
    with pytest.raises(DivergedError, match="Nothing was learned from it"):
        learn(config, policy, Teacher(policy), None, batch, Guards(config.trainer, lambda _: None), Journal())
    assert all(map(torch.equal, policy.local_shards(), before))


@pytest.mark.parametrize(("groups_per_update", "rows"), [(2, 4), (4, 0)])
def test_rows_of_the_first_update_have_no_pass_for_their_old_logprobs_alone(
    mesh: DeviceMesh, groups_per_update: int, rows: int
) -> None:
    config = a_config(trainer={"max_logprob_gap": 9.0, "groups_per_update": groups_per_update})
    policy = ScoringPolicy(a_language_model(), config.trainer, mesh, dtype=torch.float64, temperature=1.0)
    [batch] = Recorder(-3.0, 99, [range(8, 16)], beside=False).take(1)
    learn(config, policy, Teacher(policy), None, batch, Guards(config.trainer, lambda _: None), Journal())
    for_the_teacher = 8
    assert policy.scored == (rows, for_the_teacher)


def test_a_step_that_arrives_in_parts_equals_one_that_came_whole(mesh: DeviceMesh, tmp_path: Path) -> None:
    """Old log-probs stay those of the version that sampled, whatever updates have been made since."""
    whole, _, policy, teacher = run_parts(mesh, tmp_path / "whole", [range(8, 16)])
    parts = [range(8, 12), range(12, 16)]
    streamed, _, other, other_teacher = run_parts(mesh, tmp_path / "streamed", parts, order="arrival")
    for name in ("old_logprobs", "teacher_logprobs", "entropies", "token_weights", "advantages"):
        for ours, theirs in zip(streamed.steps, whole.steps, strict=True):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-10)
    optimizers = [
        [values for parameter in one.parameters() for values in one.optimizer.state[parameter].values()]
        for one in (policy, other)
    ]
    for pairs in (
        zip(policy.local_shards(), other.local_shards(), strict=True),
        zip(teacher.shards, other_teacher.shards, strict=True),
        zip(*optimizers, strict=True),
    ):
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_had_the_second_part_been_scored_by_the_moved_policy_its_old_logprobs_would_differ(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    parts = [range(8, 12), range(12, 16)]
    streamed, *_ = run_parts(mesh, tmp_path / "streamed", parts, order="arrival")
    moved, *_ = run_parts(mesh, tmp_path / "moved", parts, order="group")
    assert not torch.allclose(streamed.steps[0].old_logprobs, moved.steps[0].old_logprobs, atol=1e-6)
