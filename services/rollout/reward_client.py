"""Asks the reward service to score a group. Only this file of the service knows the protobuf types."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from retort.proto.reward.v1 import reward_pb2, reward_pb2_grpc

REPEATED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0

OPTIONS = (
    # A response may repeat the completions as what was parsed, and the default limit is 4 MiB.
    ("grpc.max_receive_message_length", -1),
    # The default waits up to two minutes before it looks again for a service that has restarted.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


class RewardServiceError(Exception):
    """The reward service gave no scores. The group is not lost: its work item is delivered again."""


class RewardServiceDownError(RewardServiceError):
    """Nobody answered for the whole budget."""


class UnscorableError(Exception):
    """The checker can give no reward for one completion, and a missing reward is never 0."""

    def __init__(self, reason: str, index: int) -> None:
        super().__init__(f"completion {index} is unscorable: {reason}")
        self.reason = reason
        self.index = index


@dataclass(frozen=True, slots=True)
class Scored:
    """What a rollout keeps of a verdict."""

    reward: float
    parsed: str
    """What the checker read as the answer."""
    format_ok: bool


class RewardClient:
    """One connection to a reward service, which may start later than this or restart meanwhile.

    To be created where the event loop runs, and closed there.
    """

    def __init__(self, address: str, *, deadline_s: float, budget_s: float = 60.0, token: str = "") -> None:
        """`deadline_s` bounds one call, `budget_s` all repetitions of it together; both in seconds.

        `token`: what the service asks for; empty: nothing.
        """
        self._address = address
        self._deadline_s = deadline_s
        self._budget_s = budget_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._service = reward_pb2_grpc.RewardServiceStub(self._channel)

    async def score(self, checker: str, completions: Sequence[str], answer: str) -> list[Scored]:
        """Score the completions of one group, in their order. Checkers are pure, so a repeated call is safe.

        Raises UnscorableError for the first completion without a reward, RewardServiceDownError if no scores came
        within `budget_s`, RewardServiceError if the service refused the request.
        """
        request = reward_pb2.ScoreRequest(
            items=[
                reward_pb2.Item(id=str(index), checker=checker, completion=completion, answer=answer)
                for index, completion in enumerate(completions)
            ]
        )
        response = await self._call_until_answered(request)
        if len(response.results) != len(completions):
            raise RewardServiceError(
                f"reward service at {self._address}: {len(completions)} completions but "
                f"{len(response.results)} results. It is not a service of this version; update both sides."
            )
        return [self._scored(index, result) for index, result in enumerate(response.results)]

    async def close(self) -> None:
        await self._channel.close()

    async def _call_until_answered(self, request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        give_up = time.monotonic() + self._budget_s
        pause_s, calls = FIRST_PAUSE_S, 0
        while True:
            calls += 1
            timeout_s = min(self._deadline_s, give_up - time.monotonic())
            try:
                response: reward_pb2.ScoreResponse = await self._service.Score(
                    request, timeout=timeout_s, wait_for_ready=True, metadata=self._metadata
                )
                return response
            except grpc.aio.AioRpcError as error:
                happened = f"{error.code().name}: {error.details()}"
                if error.code() not in REPEATED:
                    raise RewardServiceError(
                        f"reward service at {self._address} refused {len(request.items)} items: {happened}. "
                        "Its log says more; its limits are in services/reward/README.md."
                    ) from error
                if time.monotonic() + pause_s >= give_up:
                    raise RewardServiceDownError(
                        f"reward service at {self._address}: no scores within {self._budget_s:g} s "
                        f"({calls} calls, the last one {happened}). Check that it runs (its log is "
                        "logs/reward.log) and that [reward].address is right; if its "
                        "checker is slow, raise [reward].deadline_s."
                    ) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _scored(self, index: int, result: reward_pb2.Result) -> Scored:
        match result.WhichOneof("outcome"):
            case "reward":
                return Scored(result.reward.value, result.reward.parsed, result.reward.format_ok)
            case "unscorable":
                raise UnscorableError(result.unscorable.reason, index)
        raise RewardServiceError(
            f"reward service at {self._address}: result {index} has an outcome unknown here. "
            "It is not a service of this version; update both sides."
        )
