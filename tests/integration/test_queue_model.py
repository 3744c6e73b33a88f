"""Random sequences of calls and crashes, compared with a model that fits on one screen."""

from dataclasses import dataclass, field
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from retort.queues import Lease
from tests.integration.queue_run import Run, a_group, an_item, group_ids

GROUPS = [f"g{i}" for i in range(5)]
REPLICAS = ["rollout-0", "rollout-1"]
MAX_DELIVERIES = 3


@dataclass
class Work:
    """What the model knows about a group that is issued and not submitted."""

    order: int
    deliveries: int = 0
    holder: str | None = None
    expired: bool = False


@dataclass
class Model:
    issued: dict[str, Work] = field(default_factory=dict)
    submitted: dict[str, str] = field(default_factory=dict)
    num_issued: int = 0

    def issue(self, group_id: str) -> str:
        if group_id in self.submitted:
            return "submitted"
        if group_id in self.issued:
            return "issued"
        self.num_issued += 1
        self.issued[group_id] = Work(self.num_issued)
        return "new"

    def take(self, replica: str, limit: int) -> list[tuple[str, int]]:
        in_order = sorted(self.issued, key=lambda group_id: self.issued[group_id].order)
        expired = [group_id for group_id in in_order if self.issued[group_id].expired][:limit]
        for poison in [group_id for group_id in expired if self.issued[group_id].deliveries >= MAX_DELIVERIES]:
            expired.remove(poison)
            del self.issued[poison]
        new = [g for g in in_order if g in self.issued and self.issued[g].holder is None]
        taken = expired + new[: limit - len(expired)]
        for group_id in taken:
            work = self.issued[group_id]
            self.issued[group_id] = Work(work.order, work.deliveries + 1, replica)
        return [(group_id, self.issued[group_id].deliveries) for group_id in taken]

    def submit(self, group_id: str) -> str:
        if group_id in self.submitted:
            return "duplicate"
        if self.issued.pop(group_id, None) is None:
            return "unknown"
        self.submitted[group_id] = group_id
        return "stored"


class QueueMachine(RuleBasedStateMachine):
    def __init__(self, redis_url: str) -> None:
        super().__init__()
        self.run = Run(redis_url, f"test-{uuid4().hex}")
        self.trainer = self.run.trainer()
        self.replicas = {name: self.run.replica(name, max_deliveries=MAX_DELIVERIES) for name in REPLICAS}
        self.model = Model()
        self.leases: list[tuple[str, Lease]] = []

    def held(self) -> list[tuple[str, Lease]]:
        """The newest lease of every group that somebody holds."""
        newest = {lease.item.group_id: (name, lease) for name, lease in self.leases}
        return [newest[group_id] for group_id, work in self.model.issued.items() if work.holder]

    @rule(groups=st.lists(st.sampled_from(GROUPS), max_size=4))
    def issue(self, groups: list[str]) -> None:
        expected = [self.model.issue(group_id) for group_id in groups]
        assert self.trainer.issue([an_item(group_id) for group_id in groups]) == expected

    @rule(name=st.sampled_from(REPLICAS), limit=st.integers(1, 3))
    def take(self, name: str, limit: int) -> None:
        leases = self.run.take(self.replicas[name], limit)
        expected = self.model.take(name, limit)
        assert [(lease.item.group_id, lease.deliveries) for lease in leases] == expected
        self.leases += [(name, lease) for lease in leases]

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def submit_under_any_lease_that_ever_was(self, data: st.DataObject) -> None:
        name, lease = data.draw(st.sampled_from(self.leases))
        outcome = self.run.wait(self.replicas[name].submit(lease, a_group(lease, name)))
        assert outcome == self.model.submit(lease.item.group_id)

    @rule(name=st.sampled_from(REPLICAS))
    def crash(self, name: str) -> None:
        for holder, lease in self.held():
            if holder == name:
                self.run.let_lease_run_out(lease)
                self.model.issued[lease.item.group_id].expired = True

    @rule(name=st.sampled_from(REPLICAS))
    def renew_everything(self, name: str) -> None:
        leases = [lease for _, lease in self.held()]
        lost = self.run.wait(self.replicas[name].renew(leases))
        works = self.model.issued
        assert group_ids(lost) == [g for g in group_ids(leases) if works[g].holder != name]
        for work in works.values():
            work.expired = work.expired and work.holder != name

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        name, lease = data.draw(st.sampled_from(self.held()))
        self.run.wait(self.replicas[name].give_back(lease))
        work = self.model.issued[lease.item.group_id]
        if not work.expired:
            work.expired, work.deliveries = True, max(work.deliveries - 1, 0)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        entries = [(entry_id, group.group_id) for entry_id, group in self.trainer.read_groups("train", "0", 0, 99)]
        chosen = [entry for entry in entries if data.draw(st.booleans())]
        assert self.trainer.commit("train", chosen) == len(chosen)
        for _, group_id in chosen:
            del self.model.submitted[group_id]

    @rule()
    def the_server_forgets_everything(self) -> None:
        self.run.empty()
        self.model = Model()

    @invariant()
    def the_server_agrees_with_the_model(self) -> None:
        groups = [group.group_id for _, group in self.trainer.read_groups("train", "0", 0, 99)]
        assert groups == list(self.model.submitted)
        counts = self.trainer.in_flight("train")
        leased = sum(work.holder is not None for work in self.model.issued.values())
        assert (counts.waiting, counts.leased) == (len(self.model.issued) - leased, leased)

    def teardown(self) -> None:
        self.run.close()


@pytest.mark.parametrize(
    "sequences", [100, pytest.param(20_000, marks=[pytest.mark.chaos, pytest.mark.timeout(4 * 3600)])]
)
def test_any_sequence_of_calls_and_crashes_does_what_the_model_does(sequences: int, redis_url: str) -> None:
    run_state_machine_as_test(
        lambda: QueueMachine(redis_url),
        settings=settings(
            max_examples=sequences,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
