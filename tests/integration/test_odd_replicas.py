"""One odd replica is evicted and named; it neither ends the trainer nor keeps the others paused."""

import logging
import socket
from collections.abc import Iterator

import msgspec
import pytest

from retort.config import WeightSyncConfig
from retort.identity import Identity
from retort.network import address_of
from retort.weight_sync import CommitRequest, PrepareRequest, ProbeRequest, TransferRequest
from services.rollout.control import make_control_app
from services.trainer.weight_sender import WeightSender
from tests.integration.queue_run import Run
from tests.integration.replica import AUTHORIZATION
from tests.integration.test_weight_sender import a_sender, assert_evicted, assert_holds, evictions, publish
from tests.integration.torch_replica import TorchReplica

CALLS = {"prepare": PrepareRequest, "transfer": TransferRequest, "probe": ProbeRequest, "commit": CommitRequest}


class Garbled(msgspec.Struct):
    """What is no answer to any call."""

    answer: int = 42

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self.answer)


@pytest.fixture
def well(run: Run) -> Iterator[TorchReplica]:
    with TorchReplica(run, "well") as replica:
        yield replica


@pytest.mark.parametrize("phase", CALLS)
def test_an_answer_that_cannot_be_read_evicts_who_gave_it(
    run: Run, well: TorchReplica, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    odd = TorchReplica(run, "odd")
    act = getattr(odd.receiver, phase)

    async def garbled(request: msgspec.Struct) -> Garbled:
        await act(request)
        return Garbled()

    monkeypatch.setattr(odd.receiver, phase, garbled)
    odd.control = make_control_app(odd.receiver, AUTHORIZATION)
    with odd:
        sender = a_sender(run)
        policy = publish(sender, 0)
        assert sender.sync() == 1
        assert_holds(well, policy)
        assert well.says_it_serves(0)
        assert odd.name not in run.view.members()
    [(name, at, reason)] = evictions(caplog)
    assert (name, at) == ("odd", phase)
    assert f"{odd.url}/weights/{phase} answered with no " in reason


def test_an_address_that_is_none_evicts_who_gave_it(
    run: Run, well: TorchReplica, caplog: pytest.LogCaptureFixture
) -> None:
    odd = TorchReplica(run, "odd")
    odd.url = "http://fd00::5:1234"
    with odd:
        sender = a_sender(run)
        publish(sender, 0)
        assert sender.sync() == 1
        assert well.says_it_serves(0)
    [(name, at, reason)] = evictions(caplog)
    assert (name, at) == ("odd", "prepare")
    assert "http://fd00::5:1234/weights/prepare: InvalidURL" in reason


def test_every_worker_has_to_say_what_it_received(
    run: Run, well: TorchReplica, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TorchReplica(run, "odd", num_workers=2) as odd:
        receive = odd.engine.receive

        async def only_the_first(*request: object) -> list[list[int]]:
            return (await receive(*request))[:1]  # type: ignore[arg-type]

        monkeypatch.setattr(odd.engine, "receive", only_the_first)
        sender = a_sender(run)
        publish(sender, 0)
        assert sender.sync() == 1
        assert_evicted(run, odd)
    assert evictions(caplog) == [("odd", "transfer", "1 of its 2 workers said what they received")]


def test_a_proxy_that_the_environment_names_is_not_asked(
    run: Run, well: TorchReplica, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port}")
    sender = a_sender(run)
    publish(sender, 0)
    assert sender.sync() == 1


def test_who_waits_for_a_sync_says_every_second_for_whom(run: Run, well: TorchReplica) -> None:
    said: list[str] = []
    config = WeightSyncConfig(deadline_s=3.0, max_probe_gap=1e-4)
    sender = WeightSender(
        run.trainer(),
        config,
        epoch=1,
        backend="gloo",
        authorization=AUTHORIZATION,
        identity=Identity(),
        tell=said.append,
    )
    with TorchReplica(run, "silent", silent_at="probe"):
        publish(sender, 0)
        assert sender.sync() == 1
    assert "silent to answer probe" in said


def test_a_fleet_may_have_addresses_of_ip_version_6(run: Run) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with TorchReplica(run, host="::1") as replica:
        assert replica.url.startswith("http://[::1]:")
        sender = a_sender(run, host="::1")
        policy = publish(sender, 0)
        assert sender.sync() == 1
        assert_holds(replica, policy)


def test_an_address_has_brackets_around_ip_version_6() -> None:
    assert address_of("fd00::5", 80) == "[fd00::5]:80"
    assert address_of("10.0.0.5", 80) == "10.0.0.5:80"
    assert address_of("rollout-0", 80) == "rollout-0:80"


def test_evictions_are_written_when_the_others_serve_because_redis_may_be_slow(
    run: Run, well: TorchReplica, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="retort")
    sender = a_sender(run)
    serving_then: list[bool] = []
    evict = sender._queue.evict

    def noting(member: object) -> None:
        serving_then.append(well.says_it_serves(0))
        evict(member)  # type: ignore[arg-type]

    monkeypatch.setattr(sender._queue, "evict", noting)
    with TorchReplica(run, "silent", silent_at="prepare"):
        publish(sender, 0)
        assert sender.sync() == 1
    assert serving_then == [True]
