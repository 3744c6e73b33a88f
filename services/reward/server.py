"""The gRPC face of the reward service. Only this file of the service knows the protobuf types."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from retort.config import ConfigError
from retort.network import address_of
from retort.proto.reward.v1 import reward_pb2
from services.reward.admission import FullError
from services.reward.checkers import Unscorable
from services.reward.requests import LONGEST_NAME, MAX_REQUEST_BYTES, malformed, too_large
from services.reward.scorer import Scorer
from services.reward.scoring import Item, Scored, identity
from services.reward.security import Security

SERVICE = "reward.v1.RewardService"
MAX_STREAM_ITEMS = 4096
"""Unanswered items of one stream; then the service reads no further."""
MAX_STREAMED_REQUESTS = 64
"""Unanswered messages of one stream."""

# Both responses have their results in field 1, and a result its id.
RESULTS_TAG = ID_TAG = b"\x0a"

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # With the default a second server would bind the same port without a word and take half of the calls.
    ("grpc.so_reuseport", 0),
)

Context: TypeAlias = grpc.aio.ServicerContext


class RewardServicer:
    """Scores items with the checkers it was given."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    async def score(self, request: reward_pb2.ScoreRequest | None, context: Context) -> bytes:
        items, problem = _read(request)
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        try:
            scored = await self._scorer.score(items)
        except FullError as error:
            await _refuse(error, context)
        return _written([item.id for item in items], scored)

    async def list_checkers(
        self, request: reward_pb2.ListCheckersRequest, context: Context
    ) -> reward_pb2.ListCheckersResponse:
        return reward_pb2.ListCheckersResponse(
            checkers=[
                reward_pb2.CheckerInfo(
                    name=checker.name,
                    version=checker.version,
                    description=checker.description,
                    options=checker.options,
                    accepts=checker.accepts,
                    examples=[
                        reward_pb2.Example(
                            completion=one.completion, answer=one.answer, options=one.options, reward=one.reward
                        )
                        for one in checker.examples
                    ],
                )
                for checker in self._scorer.checkers.values()
            ]
        )

    async def score_stream(
        self, requests: AsyncIterator[reward_pb2.ScoreStreamRequest | None], context: Context
    ) -> AsyncIterator[bytes]:
        """Results as they come. Ends when the client has sent its last item and every result is out, or something
        that is malformed and every result of what came before.
        """
        stream = _Stream(self._scorer)
        reading = asyncio.create_task(stream.read(requests))
        try:
            while (response := await stream.responses.get()) is not None:
                yield response
            if problem := await reading:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        finally:
            reading.cancel()


class _Stream:
    """One stream: reads, scores several messages at a time, and collects what is to be sent."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.responses: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_STREAMED_REQUESTS)
        """None is the last one."""
        self._ids: set[str] = set()
        self._room = asyncio.Condition()

    async def read(self, requests: AsyncIterator[reward_pb2.ScoreStreamRequest | None]) -> str:
        """Read to the end, or to the first message that is malformed, whose problem is returned."""
        try:
            async with asyncio.TaskGroup() as tasks:
                running = asyncio.Semaphore(MAX_STREAMED_REQUESTS)
                async for request in requests:
                    items, problem = _read(request)
                    problem = problem or self._problem(items)
                    if problem:
                        return problem
                    await running.acquire()
                    async with self._room:
                        await self._room.wait_for(lambda: len(self._ids) < MAX_STREAM_ITEMS)
                    self._ids.update(item.id for item in items)
                    tasks.create_task(self._answer(items)).add_done_callback(lambda _: running.release())
            return ""
        except asyncio.CancelledError:
            # The client has gone: nobody takes results from the queue, which may be full.
            self.responses = asyncio.Queue()
            raise
        finally:
            # Behind the last result; the reader's own error is raised where it is awaited.
            await self.responses.put(None)

    def _problem(self, items: Sequence[Item]) -> str:
        for index, item in enumerate(items):
            if item.id in self._ids:
                return f"items[{index}].id: {item.id!r} is also the id of an item without a result so far"
        return ""

    async def _answer(self, items: Sequence[Item]) -> None:
        # Where a single call is refused, a stream waits, and with it soon its reading.
        await self._scorer.room_for(items)
        async for indices, scored in self._scorer.score_as_ready(items):
            ids = [items[index].id for index in indices]
            await self.responses.put(_written(ids, scored))
            async with self._room:
                self._ids.difference_update(ids)
                self._room.notify_all()


def make_server(scorer: Scorer, security: Security) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """A server that listens nowhere so far, and the health that it reports."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    interceptors = [_TokenCheck(security)] if security.tokens else []
    server = grpc.aio.server(options=OPTIONS, interceptors=interceptors)
    servicer = RewardServicer(scorer)
    methods = {
        "Score": grpc.unary_unary_rpc_method_handler(servicer.score, _decoder(reward_pb2.ScoreRequest)),
        "ScoreStream": grpc.stream_stream_rpc_method_handler(
            servicer.score_stream, _decoder(reward_pb2.ScoreStreamRequest)
        ),
        "ListCheckers": grpc.unary_unary_rpc_method_handler(
            servicer.list_checkers,
            _decoder(reward_pb2.ListCheckersRequest),
            reward_pb2.ListCheckersResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server, health_servicer


def _is_news(record: logging.LogRecord) -> bool:
    """Not the traceback that grpc logs for each result that a client has not waited for."""
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


def bind(server: grpc.aio.Server, host: str, port: int, security: Security) -> str:
    """Listen; port 0 lets the system choose. Returns the address. Raises ConfigError if that cannot be."""
    address = address_of(host, port)
    try:
        if security.tls is None:
            bound = server.add_insecure_port(address)
        else:
            credentials = grpc.ssl_server_credentials(
                [(security.tls.key, security.tls.certificate)],
                root_certificates=security.tls.client_authority,
                require_client_auth=security.tls.client_authority is not None,
            )
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"the reward service cannot listen on {address}: the port is in use or the address is not of "
            f"this machine. Choose another --grpc-port or [reward].port (0: any free one), or another host. ({error})"
        ) from None
    return address_of(host, bound)


async def report_health(health_servicer: health.aio.HealthServicer) -> None:
    """Say that the service takes calls."""
    await health_servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)


class _TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """Lets through whoever shows a token; health may be asked by everybody."""

    def __init__(self, security: Security) -> None:
        self._security = security

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        shown = next((value for key, value in details.invocation_metadata if key == "authorization"), "")
        if details.method.startswith(f"/{health.SERVICE_NAME}/") or self._security.accepts(shown):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(_unauthenticated)


async def _unauthenticated(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "send a token of this service as metadata: authorization: Bearer TOKEN"
    )
    yield None


def _decoder(message: type[Message]) -> Callable[[bytes], Message | None]:
    """Parses a request; what is no such message becomes None, because grpc would report an exception as INTERNAL."""

    def decode(data: bytes) -> Message | None:
        try:
            return message.FromString(data)
        except DecodeError:
            return None

    return decode


def _read(request: Any) -> tuple[Sequence[Item], str]:
    """The items of a request, and what is malformed in it, beginning with the field; empty if nothing is."""
    if request is None:
        return (), "the request is no message of proto/reward/v1/reward.proto, or a text in it is not UTF-8"
    items: list[Item] = []
    problem = ""
    for message in request.items:
        checker, metadata, options = message.checker, message.metadata, message.options
        if (metadata or options or len(checker) > LONGEST_NAME) and not problem:
            too_much = too_large(checker, metadata, options)
            problem = too_much and f"items[{len(items)}].{too_much}"
        if options:
            items.append(Item(message.id, checker, message.completion, message.answer, dict(options)))
        else:
            items.append(Item(message.id, checker, message.completion, message.answer))
    return items, malformed(items) or problem


async def _refuse(error: FullError, context: Context) -> NoReturn:
    """RESOURCE_EXHAUSTED, with the time to wait in the two forms that clients know."""
    nanos = int(error.retry_after_s * 1e9)
    hint = RetryInfo(retry_delay=Duration(seconds=nanos // 10**9, nanos=nanos % 10**9))
    status = Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message=str(error))
    status.details.add().Pack(hint)
    context.set_trailing_metadata(
        (
            ("grpc-status-details-bin", status.SerializeToString()),
            ("grpc-retry-pushback-ms", str(nanos // 10**6)),
        )
    )
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    raise AssertionError("abort raises")


def _written(ids: Sequence[str], results: Sequence[Scored]) -> bytes:
    """A response with these results and their ids, serialised faster than from a message object for each.

    Concatenated protobuf messages merge into one, so what results have in common is serialised once, and the id is
    appended. Results are known by identity: items with the same verdict share one.
    """
    heads: dict[tuple[int, int], bytes] = {}
    parts: list[bytes] = []
    for item_id, scored in zip(ids, results, strict=True):
        name = item_id.encode()
        key = (identity(scored), len(name))
        head = heads.get(key)
        if head is None:
            head = heads[key] = _head(scored, len(name))
        parts += (head, name)
    return b"".join(parts)


def _head(scored: Scored, name_bytes: int) -> bytes:
    """The field `results` with one result, up to its id, which has so many bytes."""
    common: bytes = _result(scored).SerializeToString() + ID_TAG + _varint(name_bytes)
    return RESULTS_TAG + _varint(len(common) + name_bytes) + common


def _result(scored: Scored) -> reward_pb2.Result:
    """The result without its id."""
    verdict = scored.verdict
    if isinstance(verdict, Unscorable):
        unscorable = reward_pb2.Unscorable(reason=verdict.reason)
        return reward_pb2.Result(unscorable=unscorable, checker=scored.checker, seconds=scored.seconds)
    reward = reward_pb2.Reward(
        value=verdict.value,
        correct=verdict.correct,
        parsed=verdict.parsed,
        format_ok=verdict.format_ok,
        rule=verdict.rule,
        explanation=verdict.explanation,
    )
    return reward_pb2.Result(reward=reward, checker=scored.checker, seconds=scored.seconds)


def _varint(number: int) -> bytes:
    written = bytearray()
    while number >= 128:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)
