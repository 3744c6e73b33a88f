"""Connections to Redis or Valkey, and the one way to call the function library over them."""

import asyncio
import time
from functools import partialmethod
from typing import Any
from urllib.parse import urlsplit

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from retort.config import ConfigError
from retort.queues import replies
from retort.queues.protocol import LIBRARY_SOURCE, function
from retort.queues.replies import Reply

OLDEST_REDIS = 7
SOCKET_TIMEOUT_S = 10.0
BACKOFF = ExponentialWithJitterBackoff(base=0.05, cap=1.0)
ATTEMPTS = 60
"""Of every call, about 30 s in all where a connection is refused, as by a Redis that died or starts later.

Where packets are dropped, each takes SOCKET_TIMEOUT_S.
"""
LIBRARY_WITHIN_S, LIBRARY_POLL_S = 600.0, 0.5
IMPATIENT = 4
"""About half a second in all, for those who ask whether an address is right."""


def _may_mend(error: Exception) -> bool:
    """Whether time may mend it. A refused password is told at once, though it is a ConnectionError."""
    return not isinstance(error, AuthenticationError)


class _Retry(Retry):
    """For `Redis`."""

    call_with_retry = partialmethod(Retry.call_with_retry, is_retryable=_may_mend)


class _AsyncRetry(AsyncRetry):
    """For `AsyncRedis`."""

    call_with_retry = partialmethod(AsyncRetry.call_with_retry, is_retryable=_may_mend)


def connect(url: str, attempts: int = ATTEMPTS) -> Redis:
    """A client of the server at `url` (`redis://[:password@]host:port[/db]`, `rediss://`, `unix://`).

    Calls, the first included, are repeated while the server restarts; everything this package sends may be repeated.
    Raises ConfigError when nothing usable answers.
    """
    try:
        redis = Redis.from_url(url, retry=_Retry(BACKOFF, attempts), **_settings())
        _check(url, redis.info())
    except (RedisError, ValueError) as error:
        raise _unusable(url, error) from error
    return redis


class _HeedfulRedis(AsyncRedis):
    """Raises CancelledError where its task was cancelled during a command, also where redis-py does not.

    It sends within `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that comes while it ends
    (bpo-42130). A task that runs for ever would then go on, and whoever cancelled it would wait for ever.
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None, "redis.asyncio is called within a task"
        before = task.cancelling()
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py gives it no types
        finally:
            if task.cancelling() > before:
                raise asyncio.CancelledError


async def connect_async(url: str, attempts: int = ATTEMPTS) -> AsyncRedis:
    """The same for asyncio."""
    try:
        redis = _HeedfulRedis.from_url(url, retry=_AsyncRetry(BACKOFF, attempts), **_settings())
        _check(url, await redis.info())
    except (RedisError, ValueError) as error:
        raise _unusable(url, error) from error
    return redis


def call(redis: Redis, name: str, keys: list[str], *args: str | bytes | int) -> Reply:
    """Call a function of the library; a server that does not have it (new, or emptied) gets it first."""
    try:
        return redis.fcall(function(name), len(keys), *keys, *args)
    except ResponseError as error:
        if not replies.library_is_missing(error):
            raise
    load_library(redis)
    return redis.fcall(function(name), len(keys), *keys, *args)


def load_library(redis: Redis) -> None:
    """Give the server the functions, if it does not have them. Only trainer and operator may."""
    try:
        redis.function_load(LIBRARY_SOURCE)
    except OutOfMemoryError:
        return  # a server that is full says so first; one that has been at work has the functions
    except ResponseError as error:
        if not replies.library_is_there(error):
            raise


async def call_async(redis: AsyncRedis, name: str, keys: list[str], *args: str | bytes | int) -> Reply:
    """The same for asyncio."""
    try:
        return await redis.fcall(function(name), len(keys), *keys, *args)
    except ResponseError as error:
        if not replies.library_is_missing(error):
            raise
    try:
        await redis.function_load(LIBRARY_SOURCE)
    except NoPermissionError:
        return await _call_when_loaded(redis, name, keys, *args)
    except ResponseError as error:
        if not replies.library_is_there(error):
            raise
    return await redis.fcall(function(name), len(keys), *keys, *args)


async def _call_when_loaded(redis: AsyncRedis, name: str, keys: list[str], *args: str | bytes | int) -> Reply:
    """For a replica, which may not load functions: the launcher or the trainer does, at start or when they are gone."""
    deadline = time.monotonic() + LIBRARY_WITHIN_S
    while True:
        await asyncio.sleep(LIBRARY_POLL_S)
        try:
            return await redis.fcall(function(name), len(keys), *keys, *args)
        except ResponseError as error:
            if not replies.library_is_missing(error) or time.monotonic() > deadline:
                raise


def _settings() -> dict[str, Any]:
    # RESP2 is pinned because redis-py gives stream replies another shape under RESP3.
    timeouts = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": SOCKET_TIMEOUT_S}
    return {"protocol": 2, "socket_keepalive": True, **timeouts}


def _check(url: str, info: Reply) -> None:
    version = str(info["redis_version"])
    if int(version.partition(".")[0]) < OLDEST_REDIS:
        raise ConfigError(f"{_shown(url)} is Redis {version}; Retort needs Redis 7.0 or newer, or Valkey.")
    if info["maxmemory"] and info["maxmemory_policy"] != "noeviction":
        raise ConfigError(
            f"{_shown(url)} has maxmemory-policy {info['maxmemory_policy']}, which deletes work when "
            "memory is full. Set it to noeviction."
        )


def _unusable(url: str, error: Exception) -> ConfigError:
    where = _shown(url)
    if isinstance(error, AuthenticationError):
        return ConfigError(f"Redis at {where} refused the password ({error}). The URL is redis://USER:PASSWORD@HOST.")
    if isinstance(error, ConnectionError | TimeoutError):
        return ConfigError(
            f"No Redis answers at {where}: {error}. Start one there, or correct redis.url in the run file "
            "(environment RETORT_REDIS__URL or REDIS_URL). With none of them set `retort run` starts its own."
        )
    return ConfigError(f"Redis at {where} cannot be used: {error}")


def _shown(url: str) -> str:
    """The address without its password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.netloc else repr(url)
