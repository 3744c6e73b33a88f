"""A replica serves a version only after prepare, transfer, probe and commit, in this order, by the newest trainer."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from retort.weight_sync import CommitRequest, PrepareRequest, ProbeRequest, TransferRequest, WeightManifest
from services.rollout.weight_receiver import RefusedError, WeightReceiver
from tests.scripted_engine import ScriptedEngine

PHASES = ("prepare", "transfer", "probe", "commit")
MANIFEST = WeightManifest(buckets=[])


class Replica:
    """A receiver with its engine, driven as the trainer of an epoch drives it."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.receiver = WeightReceiver(self.engine)

    def call(self, phase: str, *, version: int = 1, epoch: int = 1) -> Coroutine[Any, Any, Any]:
        receiver = self.receiver
        if phase == "prepare":
            return receiver.prepare(PrepareRequest(epoch=epoch, version=version, manifest=MANIFEST))
        if phase == "transfer":
            return receiver.transfer(a_transfer(epoch))
        if phase == "probe":
            return receiver.probe(ProbeRequest(epoch=epoch, prompt_ids=[1, 2, 3]))
        return receiver.commit(CommitRequest(epoch=epoch, version=version))

    async def sync(self, *, version: int = 1, epoch: int = 1, until: str = "commit") -> None:
        for phase in PHASES[: PHASES.index(until) + 1]:
            await self.call(phase, version=version, epoch=epoch)


def a_transfer(epoch: int) -> TransferRequest:
    return TransferRequest(
        epoch=epoch,
        group="one",
        backend="gloo",
        store_host="127.0.0.1",
        store_port=1,
        broadcast_rank=1,
        world_size=2,
        deadline_s=1.0,
    )


def test_a_version_is_served_after_the_four_calls_and_not_before() -> None:
    async def story() -> None:
        replica = Replica()
        seen = [(replica.receiver.state, replica.receiver.served_version)]
        for phase in PHASES:
            await replica.call(phase, version=4)
            seen.append((replica.receiver.state, replica.receiver.served_version))
        assert seen == [("joining", None), ("updating", None), ("updating", None), ("updating", None), ("serving", 4)]
        assert replica.engine.calls == ["prepare", "receive", "load 4", "probe", "resume"]

    asyncio.run(story())


def test_who_has_served_is_updating_from_the_first_moment_of_an_update() -> None:
    async def story() -> None:
        replica = Replica()
        for phase in PHASES:
            await replica.call(phase, version=4)
        seen = []

        async def prepare() -> None:
            seen.append(replica.receiver.state)

        replica.engine.prepare = prepare  # type: ignore[method-assign]
        await replica.call("prepare", version=5)
        assert seen == ["updating"]

    asyncio.run(story())


def test_the_answers_are_the_engines() -> None:
    async def story() -> None:
        replica = Replica()
        assert (await replica.call("prepare")).num_workers == 1
        assert (await replica.call("transfer")).digests == [[11, 22]]
        assert (await replica.call("probe")).logprobs == [-1.0, -1.0]

    asyncio.run(story())


IN_ORDER = {("prepare", "transfer"), ("transfer", "probe"), ("probe", "commit"), ("commit", "commit")}
OUT_OF_ORDER = sorted({(reached, asked) for reached in ("nothing", *PHASES) for asked in PHASES[1:]} - IN_ORDER)


@pytest.mark.parametrize(("reached", "asked"), OUT_OF_ORDER)
def test_a_phase_out_of_order_is_refused_and_changes_nothing(reached: str, asked: str) -> None:
    async def story() -> None:
        replica = Replica()
        if reached != "nothing":
            await replica.sync(until=reached)
        calls, state = list(replica.engine.calls), replica.receiver.state
        with pytest.raises(RefusedError, match=r"expected phase .* but this replica is in"):
            await replica.call(asked)
        assert (replica.engine.calls, replica.receiver.state) == (calls, state)

    asyncio.run(story())


@pytest.mark.parametrize("phase", PHASES[:3])
def test_an_older_trainer_is_refused(phase: str) -> None:
    async def story() -> None:
        replica = Replica()
        await replica.sync(epoch=2, version=3)
        await replica.call("prepare", epoch=3, version=4)
        with pytest.raises(RefusedError, match=r"epoch 2 is over|of epoch 2"):
            await replica.call(phase, epoch=2, version=9)
        assert replica.engine.version == 3

    asyncio.run(story())


def test_the_commit_of_a_version_that_is_not_being_verified_is_refused() -> None:
    async def story() -> None:
        replica = Replica()
        await replica.sync(version=4, until="probe")
        with pytest.raises(RefusedError, match="version 3 is not the one being verified, 4 is"):
            await replica.call("commit", version=3)
        assert replica.receiver.served_version is None

    asyncio.run(story())


def test_a_commit_whose_answer_was_lost_may_be_repeated() -> None:
    async def story() -> None:
        replica = Replica()
        await replica.sync(version=4)
        await replica.call("commit", version=4)
        assert (replica.receiver.state, replica.receiver.served_version) == ("serving", 4)

    asyncio.run(story())


def test_a_replica_that_is_being_updated_serves_nothing() -> None:
    async def story() -> None:
        replica = Replica()
        await replica.sync(version=1)
        await replica.call("prepare", version=2)
        assert replica.receiver.served_version is None
        assert not await replica.receiver.wait_until_serving(0, 0.01)

    asyncio.run(story())


@pytest.mark.parametrize("until", ["prepare", "transfer"])
def test_a_new_prepare_abandons_an_unfinished_update(until: str) -> None:
    async def story() -> None:
        replica = Replica()
        await replica.sync(until=until)
        replica.engine.calls.clear()
        await replica.sync(version=2)
        assert replica.engine.calls == ["abandon", "prepare", "receive", "load 2", "probe", "resume"]
        assert replica.receiver.served_version == 2

    asyncio.run(story())


def test_weights_that_were_loaded_and_not_committed_are_replaced_by_the_next_update() -> None:
    async def story() -> None:
        replica = Replica()
        await replica.sync(until="probe")
        replica.engine.calls.clear()
        await replica.sync(version=2)
        assert replica.engine.calls == ["prepare", "receive", "load 2", "probe", "resume"]

    asyncio.run(story())


@pytest.mark.parametrize(("call", "phase"), [("receive", "transfer"), ("load 1", "probe")])
def test_a_failure_of_the_engine_leaves_the_update_unfinished_until_the_next_prepare(call: str, phase: str) -> None:
    async def story() -> None:
        replica = Replica()
        replica.engine.failures[call] = RuntimeError("the connection was closed")
        with pytest.raises(RuntimeError, match="the connection was closed"):
            await replica.sync(until=phase)
        assert replica.receiver.served_version is None
        replica.engine.calls.clear()
        await replica.sync(version=1)
        assert replica.engine.calls[:2] == ["abandon", "prepare"]
        assert replica.receiver.served_version == 1

    asyncio.run(story())


def test_who_waits_for_a_version_goes_on_when_it_or_a_newer_one_is_committed() -> None:
    async def story() -> None:
        replica = Replica()
        await replica.sync(version=1)
        waiting = asyncio.create_task(replica.receiver.wait_until_serving(2, 5.0))
        await replica.sync(version=2, until="probe")
        assert not waiting.done()
        await replica.call("commit", version=2)
        assert await waiting
        assert await replica.receiver.wait_until_serving(1, 0.0)
        assert not await replica.receiver.wait_until_serving(3, 0.01)

    asyncio.run(story())


def test_what_a_committed_version_sampled_need_not_wait_for_the_end_of_an_update() -> None:
    async def story() -> None:
        replica = Replica()
        await replica.sync(version=3, epoch=1)
        for phase in PHASES[:3]:
            await replica.call(phase, version=4, epoch=1)
            assert await replica.receiver.wait_until_committed(3, 1, 0.0)
            assert not await replica.receiver.wait_until_committed(4, 1, 0.01)

        await replica.call("prepare", version=4, epoch=2)
        assert not await replica.receiver.wait_until_committed(3, 1, 0.01), "a new trainer may have begun again"
        assert not await replica.receiver.wait_until_committed(3, 2, 0.01), "it has committed nothing yet"

    asyncio.run(story())


def test_who_waits_for_a_change_is_woken_by_it() -> None:
    async def story() -> None:
        replica = Replica()
        waiting = asyncio.create_task(replica.receiver.wait_for_change(5.0))
        await asyncio.sleep(0)
        await replica.call("prepare")
        await asyncio.wait_for(waiting, 1.0)

    asyncio.run(story())


def test_calls_come_one_after_the_other() -> None:
    async def story() -> None:
        replica = Replica()
        await replica.call("prepare")
        transfer = asyncio.create_task(replica.call("transfer"))
        probe = asyncio.create_task(replica.call("probe"))
        await asyncio.gather(transfer, probe)
        assert replica.engine.calls == ["prepare", "receive", "load 1", "probe"]

    asyncio.run(story())
