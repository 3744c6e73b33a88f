"""The gRPC face of the reward service. Only this file of the service knows the protobuf types."""

import asyncio
from collections.abc import Mapping

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from retort.config import ConfigError
from retort.proto.reward.v1 import reward_pb2, reward_pb2_grpc
from retort.telemetry import log_event
from services.reward.checkers import Checker, Reward
from services.reward.scoring import score

SERVICE = "reward.v1.RewardService"
MAX_ITEMS = 4096
MAX_REQUEST_BYTES = 16 << 20
DRAIN_S = 10.0

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # With the default a second server would bind the same port without a word and take half of the calls.
    ("grpc.so_reuseport", 0),
)


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Scores items with the checkers it was given."""

    def __init__(self, checkers: Mapping[str, Checker]) -> None:
        self._checkers = checkers

    async def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        problem = _malformed(request)
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        # In a thread, so that a slow checker holds up neither health checks nor the drain.
        return await asyncio.to_thread(self._score_batch, request)

    async def ListCheckers(
        self, request: reward_pb2.ListCheckersRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ListCheckersResponse:
        return reward_pb2.ListCheckersResponse(
            checkers=[
                reward_pb2.CheckerInfo(
                    name=checker.name,
                    version=checker.version,
                    description=checker.description,
                    options=checker.options,
                )
                for checker in self._checkers.values()
            ]
        )

    def _score_batch(self, request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        return reward_pb2.ScoreResponse(results=[self._score_item(item) for item in request.items])

    def _score_item(self, item: reward_pb2.Item) -> reward_pb2.Result:
        scored = score(
            self._checkers,
            name=item.checker,
            completion=item.completion,
            answer=item.answer,
            options=dict(item.options),
        )
        result = reward_pb2.Result(id=item.id, checker=scored.checker, seconds=scored.seconds)
        if isinstance(scored.verdict, Reward):
            result.reward.CopyFrom(reward_pb2.Reward(**scored.verdict.model_dump()))
        else:
            result.unscorable.reason = scored.verdict.reason
        return result


async def serve(checkers: Mapping[str, Checker], host: str, port: int, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain: NOT_SERVING, no new calls, up to DRAIN_S for those in flight.

    Port 0 lets the system choose; the event "ready" in the log names the address. Raises ConfigError if the
    address cannot be bound.
    """
    server = grpc.aio.server(options=OPTIONS)
    health_servicer = health.aio.HealthServicer()
    reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardServicer(checkers), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    address = _bind(server, host, port)

    await server.start()
    await health_servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    log_event("ready", address=address, checkers=",".join(checkers))
    await stop.wait()

    log_event("draining", at_most_s=DRAIN_S)
    # Before the port closes: a load balancer that watches must hear it from us, not from failing calls.
    await health_servicer.enter_graceful_shutdown()
    await server.stop(grace=DRAIN_S)
    log_event("stopped")


def _bind(server: grpc.aio.Server, host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{name}:{port}")
    except RuntimeError as error:
        raise ConfigError(
            f"the reward service cannot listen on {name}:{port}: the port is in use or the address is not of "
            f"this machine. Choose another [reward].port (0: any free one) or [reward].host. ({error})"
        ) from None
    return f"{name}:{bound}"


def _malformed(request: reward_pb2.ScoreRequest) -> str:
    """The field of the request that is wrong and why; empty if none is."""
    if not request.items:
        return "items: empty; send at least one item"
    if len(request.items) > MAX_ITEMS:
        return f"items: {len(request.items)} are more than {MAX_ITEMS}; send several batches"
    first: dict[str, int] = {}
    for index, item in enumerate(request.items):
        if not item.id:
            return f"items[{index}].id: empty; give every item an id"
        if first.setdefault(item.id, index) != index:
            return f"items[{index}].id: {item.id!r} is also the id of items[{first[item.id]}]"
    return ""
