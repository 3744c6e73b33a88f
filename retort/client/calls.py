"""The calls: repeated while the service is away or full, until a deadline."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from retort.client.messages import Item, Result, RewardServiceError, from_results, to_request, to_stream_request
from retort.proto.reward.v1 import reward_pb2_grpc

REPEATED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Checkers are pure, so a repeated call is safe."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
STREAM_BATCH = 64
"""Items of one message of a stream, at most."""

OPTIONS = (
    # A response may repeat the completions as what was parsed, and the default limit is 4 MiB.
    ("grpc.max_receive_message_length", -1),
    # The default waits up to two minutes before it looks again for a service that has restarted.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


class RewardClient:
    """One connection to a reward service. Threads may share it."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 60.0,
        token: str = "",
        ca_file: Path | str = "",
        client_files: tuple[Path | str, Path | str] | None = None,
    ) -> None:
        """`timeout_s` bounds a call with all its repetitions, and the connecting of a stream. `ca_file` (PEM) turns
        TLS on; "system" uses the authorities that gRPC ships with. `client_files`: certificate and key (PEM), for a
        service that asks for them.
        """
        self._address, self._timeout_s, self._metadata = address, timeout_s, _metadata(token)
        credentials = _credentials(ca_file, client_files)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=OPTIONS)
        self._service = reward_pb2_grpc.RewardServiceStub(self._channel)

    def score(self, items: Sequence[Item]) -> list[Result]:
        """The results in the order of the items. Raises RewardServiceError; ValueError or TypeError for what is no
        text that can be sent.
        """
        request, attempts = to_request(items), _Attempts(self._address, self._timeout_s)
        while True:
            try:
                response = self._service.Score(request, timeout=attempts.left_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                # The only wait of a synchronous client: for the moment that the service has named.
                time.sleep(attempts.pause_after(error))
                continue
            return from_results(response.results)

    def stream(self, items: Sequence[Item]) -> Iterator[Result]:
        """Results as they are ready, in any order; an item without an id has its position as its id.

        Never repeated, since results may have been given out already; only connecting is, until `timeout_s`. Raises
        RewardServiceError; behind the results of the items before it, what making or writing an item raised.
        """
        ready = grpc.channel_ready_future(self._channel)
        with contextlib.suppress(grpc.FutureTimeoutError):
            # A call on a channel that is not ready by then fails at once, and says why.
            ready.result(self._timeout_s)
        ready.cancel()
        raised: list[Exception] = []
        call = self._service.ScoreStream(_messages(items, raised), metadata=self._metadata)
        try:
            for response in call:
                yield from from_results(response.results)
        except grpc.RpcError as error:
            raise RewardServiceError(f"reward service at {self._address}: {_describe(error)}") from error
        finally:
            call.cancel()
        for failure in raised:
            raise failure

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncRewardClient:
    """The same for coroutines. To be created where the event loop runs."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 60.0,
        token: str = "",
        ca_file: Path | str = "",
        client_files: tuple[Path | str, Path | str] | None = None,
    ) -> None:
        self._address, self._timeout_s, self._metadata = address, timeout_s, _metadata(token)
        credentials = _credentials(ca_file, client_files)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=OPTIONS)
        self._service = reward_pb2_grpc.RewardServiceStub(self._channel)

    async def score(self, items: Sequence[Item]) -> list[Result]:
        """The results in the order of the items. Raises RewardServiceError; ValueError or TypeError for what is no
        text that can be sent.
        """
        request, attempts = to_request(items), _Attempts(self._address, self._timeout_s)
        while True:
            try:
                response = await self._service.Score(request, timeout=attempts.left_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_after(error))
                continue
            return from_results(response.results)

    async def stream(self, items: AsyncIterable[Item] | Sequence[Item]) -> AsyncIterator[Result]:
        """Results as they are ready, in any order; an item without an id has its position as its id.

        Never repeated, since results may have been given out already; only connecting is, until `timeout_s`. Raises
        RewardServiceError; behind the results of the items before it, what making or writing an item raised.
        """
        with contextlib.suppress(TimeoutError):
            # A call on a channel that is not ready by then fails at once, and says why.
            async with asyncio.timeout(self._timeout_s):
                await self._channel.channel_ready()
        raised: list[Exception] = []
        call = self._service.ScoreStream(_in_batches(items, raised), metadata=self._metadata)
        try:
            async for response in call:
                for result in from_results(response.results):
                    yield result
        except grpc.RpcError as error:
            raise RewardServiceError(f"reward service at {self._address}: {_describe(error)}") from error
        finally:
            call.cancel()
        for failure in raised:
            raise failure

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Attempts:
    """How long one call may still go on, and how long to wait between its repetitions."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._give_up = time.monotonic() + timeout_s
        self._pause_s = FIRST_PAUSE_S

    def left_s(self) -> float:
        return max(0.001, self._give_up - time.monotonic())

    def pause_after(self, error: grpc.RpcError) -> float:
        """Seconds until the next attempt. Raises RewardServiceError if there is to be none."""
        hint_s = _retry_hint(error)
        # Too large a request is RESOURCE_EXHAUSTED too, but only a full service says when to come back.
        hopeless = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and hint_s is None
        if error.code() not in REPEATED or hopeless:
            raise RewardServiceError(f"reward service at {self._address}: {_describe(error)}") from error
        pause_s = self._pause_s if hint_s is None else hint_s
        if pause_s >= self.left_s():
            raise RewardServiceError(
                f"reward service at {self._address}: no results within {self._timeout_s:g} s ({_describe(error)})"
            ) from error
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s


@contextlib.contextmanager
def _kept(raised: list[Exception]) -> Iterator[None]:
    """Keeps an exception of the writing side of a stream for its reader, and lets the stream end."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # grpc would log it and tell the reader only that there was one
        raised.append(error)


def _messages(items: Sequence[Item], raised: list[Exception]) -> Iterator[object]:
    with _kept(raised):
        for first in range(0, len(items), STREAM_BATCH):
            yield to_stream_request(items[first : first + STREAM_BATCH], first)


async def _in_batches(items: AsyncIterable[Item] | Sequence[Item], raised: list[Exception]) -> AsyncIterator[object]:
    if isinstance(items, Sequence):
        for message in _messages(items, raised):
            yield message
        return
    with _kept(raised):
        position = 0
        # One by one: whoever makes items one by one wants their results as soon as they can be had.
        async for item in items:
            yield to_stream_request([item], position)
            position += 1


def _retry_hint(error: grpc.RpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-retry-pushback-ms":
            return int(value) / 1000
    return None


def _describe(error: grpc.RpcError) -> str:
    details = error.details()
    if details == "Internal error from Core":
        # What grpc.aio has in place of any status that came while it was writing.
        details = "the connection was lost, or the service ended the stream, while items were being sent"
    return f"{error.code().name}: {details}"


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _credentials(
    ca_file: Path | str, client_files: tuple[Path | str, Path | str] | None
) -> grpc.ChannelCredentials | None:
    if not ca_file:
        return None
    authority = None if ca_file == "system" else Path(ca_file).read_bytes()
    if client_files is None:
        return grpc.ssl_channel_credentials(authority)
    certificate, key = (Path(file).read_bytes() for file in client_files)
    return grpc.ssl_channel_credentials(authority, key, certificate)
