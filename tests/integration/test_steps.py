"""Rank 0 admits what the staleness bound allows, waits for it, and lets go of what a checkpoint holds."""

import math
import random
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from retort.queues import Fenced, RolloutQueue
from retort.rollouts import RolloutGroup, WorkItem
from services.trainer import admission
from services.trainer.admission import StalledError, WorkList
from services.trainer.batch import StepBatch
from services.trainer.fence import Fence
from services.trainer.journal import RunJournal
from services.trainer.steps import Rank0Steps, Steps
from tests.integration.queue_run import Run
from tests.integration.test_weight_sender import a_sender, publish
from tests.integration.torch_replica import TorchReplica
from tests.training import a_batch, a_config, a_group, a_question, a_rollout

QUESTIONS = [a_question(index) for index in range(8)]


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def as_batch(step: int, groups: list[RolloutGroup]) -> StepBatch:
    return a_batch(groups, [0.0] * sum(len(group.rollouts) for group in groups), step=step)


def sampled(item: WorkItem) -> RolloutGroup:
    rollouts = [a_rollout() for _ in range(item.group_size)]
    return a_group(*rollouts, group_id=item.group_id, kind=item.kind, step=item.step)


class SamplingJournal(RunJournal):
    """While the trainer waits, work is done."""

    def __init__(self, run: Run, replica: RolloutQueue, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.admitted: list[tuple[int, int]] = []
        self._run = run
        self._replica = replica

    def beat(self) -> None:
        super().beat()
        for lease in self._run.take(self._replica):
            self.admitted.append((lease.item.step, lease.item.min_policy_version))
            self._run.wait(self._replica.submit(lease, sampled(lease.item)))


def rank_0(
    run: Run, directory: Path, *, journal_type: type[SamplingJournal] = SamplingJournal, **sections: Any
) -> tuple[Rank0Steps, Any]:
    config = a_config(directory, **sections)
    queue = run.trainer()
    work = WorkList(config, QUESTIONS, QUESTIONS[:2], encode=lambda question: [question.index])
    sender = a_sender(run)
    publish(sender, 0)
    journal = journal_type(
        run,
        run.replica("sampler"),
        config,
        version=0,
        question_of=work.question,
        decode=str,
        set_progress=queue.set_progress,
        fence=Fence(directory / "epoch", patience_s=1.0),
    )

    def stop_requested() -> bool:
        return bool(queue.stop_requested())

    steps = Rank0Steps(
        as_batch, config, work=work, queue=queue, sender=sender, journal=journal, stop_requested=stop_requested
    )
    return steps, journal


def test_a_step_comes_with_its_groups_in_slot_order(run: Run, tmp_path: Path) -> None:
    steps, journal = rank_0(run, tmp_path)
    with TorchReplica(run):
        [first], [second] = steps.take(1), steps.take(2)
    assert (first.step, len(first.groups), len(first.rollouts)) == (1, 4, 8)
    asked = {group.group_id for group in first.groups + second.groups}
    assert asked == {f"0-{index:06d}" for index in range(8)}
    assert journal.admitted == [(1, 0)] * 4 + [(2, 1)] * 4


def test_staleness_admits_so_many_steps_ahead_but_none_after_the_last(run: Run, tmp_path: Path) -> None:
    steps, journal = rank_0(run, tmp_path, trainer={"max_staleness": 2, "steps": 2})
    with TorchReplica(run):
        assert len(list(steps.take(1))) == 1
    assert set(journal.admitted) == {(1, 0), (2, 0)}


def test_a_step_that_older_versions_may_sample_is_taken_while_a_new_one_is_being_sent(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps, _ = rank_0(run, tmp_path, trainer={"max_staleness": 1})
    goes_on = threading.Event()
    goes_on.set()

    def wire(_: int, __: Tensor) -> None:
        assert goes_on.wait(10)

    with TorchReplica(run, corrupt=wire) as replica:
        assert len(list(steps.take(1))) == 1
        goes_on.clear()
        publish(steps._sender, 1)
        assert steps._sender.start_sync() == 1, "it has served this trainer's version 0"
        assert len(list(steps.take(2))) == 1
        assert steps._sender.start_sync(1) == 0, "the transfer cannot have ended"
        assert replica.receiver.state == "updating"
        goes_on.set()
        publish(steps._sender, 2)
        assert replica.receiver.served_version == 1, "the next version waits for the end of the sync before"
    assert not [record for record in caplog.records if record.getMessage() == "replica_evicted"]


def test_without_that_a_step_waits_for_its_version(run: Run, tmp_path: Path) -> None:
    steps, _ = rank_0(run, tmp_path)
    with TorchReplica(run) as replica:
        assert len(list(steps.take(1))) == 1
        publish(steps._sender, 1)
        assert steps._sender.start_sync(1) == 0
        assert len(list(steps.take(2))) == 1
        assert replica.says_it_serves(1)


def test_a_sync_that_goes_on_when_training_ends_is_brought_to_its_end(run: Run, tmp_path: Path) -> None:
    steps, _ = rank_0(run, tmp_path, trainer={"max_staleness": 1})
    begun = threading.Event()

    def wire(_: int, __: Tensor) -> None:
        begun.set()
        time.sleep(0.1)

    with TorchReplica(run, corrupt=wire) as replica:
        steps._sender.start_sync()
        assert begun.wait(10)
        steps._sender.close()
        assert replica.says_it_serves(0)


def test_what_ends_a_sync_beside_training_ends_the_trainer(run: Run, tmp_path: Path) -> None:
    steps, _ = rank_0(run, tmp_path, trainer={"max_staleness": 1})
    with TorchReplica(run, silent_at="prepare"):
        steps._sender.start_sync()
        run.trainer(epoch=2)
        with pytest.raises(Fenced, match="epoch 1 was replaced by epoch 2"):
            publish(steps._sender, 1)


class HeavyTail(SamplingJournal):
    """Lengths from a Pareto distribution; in every tick a completion grows by four tokens, and a group ends with its
    longest. Remembers what was begun, whether it ended or not."""

    served = 0
    longest = 60

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generated: dict[str, list[int]] = {}
        self._growing: list[tuple[int, Any, RolloutGroup]] = []
        self._ticks = 0
        self._random = random.Random(0)

    def beat(self) -> None:
        self._ticks += 1
        for lease in self._run.take(self._replica):
            item = lease.item
            lengths = [min(self.longest, int(self._random.paretovariate(1.1))) for _ in range(item.group_size)]
            self.generated[item.group_id] = lengths
            rollouts = [a_rollout([5] * length, policy_version=self.served) for length in lengths]
            group = a_group(*rollouts, group_id=item.group_id, step=item.step)
            self._growing.append((self._ticks + max(lengths) // 4, lease, group))
        for due, lease, group in self._growing:
            if due <= self._ticks:
                self._run.wait(self._replica.submit(lease, group))
        self._growing = [one for one in self._growing if one[0] > self._ticks]

    def share_up_to(self, length: int) -> float:
        """Of the distribution from which the lengths are drawn."""
        return 1.0 if length >= self.longest else 1 - (length + 1) ** -1.1


@pytest.mark.parametrize("update_order", ["arrival", "group"])
@pytest.mark.parametrize("bound", [0, 1, 2, 4])
def test_however_heavy_the_tail_exactly_what_was_generated_is_trained_within_the_bound(
    run: Run, tmp_path: Path, bound: int, update_order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No completion is dropped for being long: the lengths that are trained on are those that were begun, and the test
    of Kolmogorov and Smirnov cannot tell them from their distribution. With a bound some are of older versions."""
    monkeypatch.setattr(admission, "POLL_S", 0.005)
    num_steps = 12
    trainer = {"max_staleness": bound, "steps": num_steps, "update_order": update_order}
    steps, journal = rank_0(run, tmp_path, journal_type=HeavyTail, trainer=trainer)
    trained: dict[str, list[int]] = {}
    stalest = 0
    with TorchReplica(run):
        for step in range(1, num_steps + 1):
            groups = [group for part in steps.take(step) for group in part.groups]
            assert len(groups) == 4
            for group in groups:
                stalest = max(stalest, step - 1 - group.oldest_policy_version)
                trained[group.group_id] = [len(rollout.completion_ids) for rollout in group.rollouts]
            journal.served = step
    assert stalest <= bound
    assert (stalest > 0) == (bound > 0)
    assert trained == journal.generated
    assert len(trained) == 4 * num_steps
    lengths = [length for of_group in trained.values() for length in of_group]
    assert max(lengths) > 10 * statistics.median(lengths), "the tail is heavy"
    shares = [sum(one <= length for one in lengths) / len(lengths) for length in range(1, journal.longest + 1)]
    gap = max(abs(share - journal.share_up_to(length)) for length, share in enumerate(shares, start=1))
    assert gap < 1.95 / math.sqrt(len(lengths)), "at a level of 0.001"


def test_validation_is_collected_recorded_and_forgotten(run: Run, tmp_path: Path) -> None:
    steps, _ = rank_0(run, tmp_path, validation={"samples": 3})
    with TorchReplica(run):
        assert steps.validate(0, at_once=False) == 1.0, "every rollout of this replica is right"
    # With one replica it goes first, and the panel shows why nothing is trained.
    progress = run.view.progress()
    assert progress["phase"] == "validating"
    assert progress["waiting_for"] == "2 validation groups of version 0; training goes on when they are there"
    assert len((tmp_path / "validation" / "step-000000.jsonl").read_text().splitlines()) == 2
    assert run.view.in_flight("validation").finished == 0


def test_with_two_replicas_the_next_step_is_taken_while_a_version_is_validated(run: Run, tmp_path: Path) -> None:
    steps, journal = rank_0(run, tmp_path)
    with TorchReplica(run, "one"), TorchReplica(run, "two"):
        assert steps.validate(0, at_once=False) is None
        assert run.view.in_flight("validation").waiting == 2
        [batch] = steps.take(1)
        assert batch.step == 1
        assert steps.finish_validation() == 1.0
        assert steps.finish_validation() is None, "there is none any more"
        assert journal.is_validated(0)
        assert steps.validate(0, at_once=True) is None, "that has been done"


def test_the_last_validation_is_waited_for_however_many_replicas_there_are(run: Run, tmp_path: Path) -> None:
    steps, _ = rank_0(run, tmp_path)
    with TorchReplica(run, "one"), TorchReplica(run, "two"):
        assert steps.validate(0, at_once=True) == 1.0


def test_groups_stay_until_a_checkpoint_holds_their_step(run: Run, tmp_path: Path) -> None:
    steps, _ = rank_0(run, tmp_path)
    with TorchReplica(run):
        assert len([*steps.take(1), *steps.take(2)]) == 2
    assert run.view.in_flight("train").finished == 8
    steps.release(1)
    assert run.view.in_flight("train").finished == 4
    steps.release(2)
    assert run.view.in_flight("train").finished == 0


def test_a_run_that_was_asked_to_stop_gets_no_further_step(run: Run, tmp_path: Path) -> None:
    steps, _ = rank_0(run, tmp_path)
    run.redis.set(run.keys("stop"), "SIGINT")
    assert list(steps.take(1)) == []
    assert run.view.in_flight("train").waiting == 0


def test_without_a_replica_the_wait_ends_by_name(run: Run, tmp_path: Path) -> None:
    steps, _ = rank_0(run, tmp_path, timeouts={"startup_s": 0.1})
    with pytest.raises(StalledError, match="waits for a rollout replica to serve policy version 0"):
        list(steps.take(1))
    assert run.view.progress()["waiting_for"] == "a rollout replica"


def test_other_ranks_take_what_rank_0_collected_and_have_no_queue() -> None:
    steps = Steps(as_batch)
    assert list(steps.take(1)) == []
    assert steps.validate(0, at_once=True) is None
    assert steps.finish_validation() is None
    steps.release(0)


class Alternating(SamplingJournal):
    """Groups that teach nothing, as often as it is told to: all their rewards are equal."""

    teach_nothing = 0

    def beat(self) -> None:
        RunJournal.beat(self)
        for lease in self._run.take(self._replica):
            item = lease.item
            self.admitted.append((item.step, item.min_policy_version))
            rewards = [1.0, 1.0] if self.teach_nothing > 0 else [1.0, 0.0]
            self.teach_nothing -= 1
            group = a_group(*(a_rollout(reward=reward) for reward in rewards), group_id=item.group_id, step=item.step)
            self._run.wait(self._replica.submit(lease, group))


@pytest.mark.parametrize(
    ("teach_nothing", "asked", "idle"),
    [(0, 4, 0), (2, 6, 0), (4 + 3, 4 + 4 + 3, 0), (99, 4 + 3 * 4, 4)],
    ids=["all teach", "two are replaced", "of their replacements three again", "none ever teaches"],
)
def test_groups_that_teach_nothing_are_replaced_three_times_at_most_within_the_bound(
    run: Run, tmp_path: Path, teach_nothing: int, asked: int, idle: int
) -> None:
    """Of four other questions each time; the step has its four groups whatever comes of it."""
    steps, journal = rank_0(run, tmp_path, journal_type=Alternating, method={"name": "dapo"})
    journal.teach_nothing = teach_nothing
    with TorchReplica(run):
        [batch] = steps.take(1)
    assert len(batch.groups) == len({group.group_id for group in batch.groups}) == 4
    assert sum(len({rollout.reward for rollout in group.rollouts}) == 1 for group in batch.groups) == idle
    assert journal.admitted == [(1, 0)] * asked, "every one of this step, sampled by no older version"
