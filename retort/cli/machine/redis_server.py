"""The Redis that the user runs: settings that lose work, and whether its clock agrees with ours."""

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from retort.cli.machine.finding import Answer, failed, ok, skipped, warning
from retort.cli.preflight import redis_url
from retort.config import RunConfig
from retort.queues import connect

EMBEDDED = "the run starts a Valkey of its own"
LARGEST_SKEW_S = 1.0
"""Leases are counted by Redis alone; progress and presence carry the time of who wrote them."""


def settings(config: RunConfig) -> Answer:
    url = redis_url(config)
    if not url:
        return skipped(EMBEDDED)
    redis = connect(url)  # raises ConfigError for a version or an eviction policy that cannot work
    try:
        return describe(dict(redis.info()), _durability(redis))
    finally:
        redis.close()


def describe(info: Mapping[str, Any], durability: Mapping[str, str]) -> Answer:
    """`durability`: appendonly and appendfsync, empty where the server does not tell."""
    version = info.get("valkey_version", info["redis_version"])
    if info.get("cluster_enabled"):
        return failed(f"{version} in cluster mode", "Use a single server: a call of the queue changes several keys.")
    if info.get("role") != "master":
        return failed(f"{version}, a replica", "Name the master in redis.url: a replica refuses to write.")
    if durability.get("appendonly") == "no":
        return warning(
            f"{version} without an append-only file: a restart forgets all sampled groups",
            "CONFIG SET appendonly yes, and appendfsync everysec. Those groups would be sampled again.",
        )
    if not info["maxmemory"]:
        return warning(f"{version} without a memory limit", "CONFIG SET maxmemory, to spare the host.")
    return ok(f"{version}, {info['maxmemory'] / 2**30:.1f} GiB at most, {info['maxmemory_policy']}, append-only file")


def clock(config: RunConfig) -> Answer:
    """Against Redis, the one clock that every service shares."""
    url = redis_url(config)
    if not url:
        return skipped("one machine, one clock")
    redis = connect(url)
    try:
        before = time.time()
        seconds, micros = redis.time()
        skew = seconds + micros / 1e6 - (before + time.time()) / 2
    finally:
        redis.close()
    return describe_skew(skew)


def describe_skew(skew_s: float) -> Answer:
    text = f"{abs(skew_s) * 1000:.0f} ms {'behind' if skew_s > 0 else 'before'} Redis"
    if abs(skew_s) > LARGEST_SKEW_S:
        return failed(text, "Synchronise the clocks (chrony, systemd-timesyncd); progress would look stale or to come.")
    return ok(text)


def _durability(redis: Redis) -> dict[str, str]:
    try:
        return {str(key): str(value) for key, value in redis.config_get("append*").items()}
    except ResponseError:  # a managed Redis that keeps CONFIG to itself
        return {}
    except RedisError as error:
        return {"error": str(error)}


CHECKS: Mapping[str, Callable[[RunConfig], Answer]] = MappingProxyType({"Redis": settings, "clock": clock})
