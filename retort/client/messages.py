"""What is sent and what comes back, as plain Python. Only this file of the client knows the protobuf types."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from retort.proto.reward.v1 import reward_pb2


class RewardServiceError(Exception):
    """The service gave no results: it was not reached in time, or it refused the request."""


class UnscorableError(Exception):
    """An item has no reward, and a missing reward is never 0."""

    def __init__(self, item_id: str, reason: str) -> None:
        super().__init__(f"item {item_id} is unscorable: {reason}")
        self.item_id = item_id
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Item:
    """One completion to be scored."""

    checker: str
    completion: str
    answer: str
    options: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    id: str = ""
    """Comes back in the result. Empty: its position among the items of the call."""


@dataclass(frozen=True, slots=True)
class Result:
    """A reward, or the reason why there is none."""

    id: str
    checker: str
    """The checker that answered, as name@version; empty if it was not found."""
    seconds: float
    """Time in the checker."""
    reward: float | None = None
    """None if and only if there is a reason in `unscorable`."""
    unscorable: str = ""
    correct: bool = False
    parsed: str = ""
    format_ok: bool = False
    rule: str = ""
    explanation: str = ""

    def value(self) -> float:
        """The reward. Raises UnscorableError if there is none."""
        if self.reward is None:
            raise UnscorableError(self.id, self.unscorable)
        return self.reward


def to_messages(items: Iterable[Item], first: int = 0) -> list[reward_pb2.Item]:
    """Raises ValueError for a text that cannot be sent, TypeError for what is no text."""
    messages = []
    for position, item in enumerate(items, start=first):
        item_id = item.id or str(position)
        try:
            message = reward_pb2.Item(
                id=item_id,
                checker=item.checker,
                completion=item.completion,
                answer=item.answer,
                options=item.options,
                metadata=item.metadata,
            )
        except UnicodeEncodeError as error:
            raise ValueError(f"item {item_id} has a text with a lone surrogate, which cannot be sent") from error
        except TypeError as error:
            raise TypeError(
                f"item {item_id}: checker, completion, answer and id are texts (str), options and metadata have texts "
                f"as keys and values ({error})"
            ) from error
        messages.append(message)
    return messages


def to_request(items: Iterable[Item]) -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(items=to_messages(items))


def to_stream_request(items: Iterable[Item], first: int) -> reward_pb2.ScoreStreamRequest:
    return reward_pb2.ScoreStreamRequest(items=to_messages(items, first))


def from_results(results: Sequence[reward_pb2.Result]) -> list[Result]:
    """Raises RewardServiceError for an outcome that this version does not know."""
    return [_from_result(result) for result in results]


def _from_result(result: reward_pb2.Result) -> Result:
    match result.WhichOneof("outcome"):
        case "reward":
            reward = result.reward
            return Result(
                id=result.id,
                checker=result.checker,
                seconds=result.seconds,
                reward=reward.value,
                correct=reward.correct,
                parsed=reward.parsed,
                format_ok=reward.format_ok,
                rule=reward.rule,
                explanation=reward.explanation,
            )
        case "unscorable":
            return Result(result.id, result.checker, result.seconds, unscorable=result.unscorable.reason)
    raise RewardServiceError(f"result {result.id} has an outcome that this version does not know; update retort")
