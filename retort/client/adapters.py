"""What other trainers call, in the shape in which each calls it. An item without a reward raises UnscorableError,
unless the trainer has a value for "no reward" or would make a 0 of whatever is raised."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from retort.client.calls import AsyncRewardClient, RewardClient
from retort.client.messages import Item, RewardServiceError, UnscorableError

ADDRESS = "RETORT_REWARD_SERVICE"
"""Environment variable with the address that `compute_score` calls, for example 127.0.0.1:50051."""
_logger = logging.getLogger(__name__)


def trl_reward(client: RewardClient, checker: str, answer_column: str = "answer") -> Callable[..., list[float | None]]:
    """A reward function for TRL's GRPOTrainer(reward_funcs=...).

    It is called with the batch's columns as keyword arguments; `completions` are texts or lists of messages. TRL
    leaves a reward of None out of its means, so that is what an unscorable completion has.
    """

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = columns[answer_column]
        items = [
            Item(checker, _text(completion), str(answer))
            for completion, answer in zip(completions, answers, strict=True)
        ]
        return [result.reward for result in client.score(items)]

    # TRL names its metrics after it.
    reward.__name__ = f"retort_{checker}"
    return reward


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    checker: str = "mcq",
    address: str = "",
    **ignored: Any,
) -> dict[str, Any]:
    """For verl: `reward.custom_reward_function.path=.../retort/client/adapters.py`, `.name=compute_score`,
    `+reward.custom_reward_function.reward_kwargs.checker=math`.

    Raises UnscorableError: verl has no value for "no reward".
    """
    client = _client(address or os.environ[ADDRESS])
    (result,) = client.score([Item(checker, solution_str, str(ground_truth))])
    return {
        "score": result.value(),
        "acc": float(result.correct),
        "pred": result.parsed,
        "format_ok": float(result.format_ok),
    }


def verifiers_reward(client: AsyncRewardClient, checker: str) -> Callable[..., Any]:
    """A function for the `funcs` of a verifiers Rubric, which calls it with `completion`, `answer` and more.

    A completion without a reward has NaN: a Rubric logs whatever is raised and goes on with 0.
    """

    async def reward(completion: Any, answer: Any, **ignored: Any) -> float:
        try:
            (result,) = await client.score([Item(checker, _text(completion), str(answer))])
            return result.value()
        except (RewardServiceError, UnscorableError) as error:
            _logger.error("no reward for a completion: %s", error)
            return math.nan

    reward.__name__ = f"retort_{checker}"
    return reward


@lru_cache(maxsize=16)
def _client(address: str) -> RewardClient:
    """One connection a process and address: verl calls a plain function, once for each sample."""
    return RewardClient(address)


def _text(completion: Any) -> str:
    """The text of a completion, or of its last message if it is a conversation."""
    if isinstance(completion, str):
        return completion
    last = completion[-1]
    return str(last["content"] if isinstance(last, Mapping) else last.content)
