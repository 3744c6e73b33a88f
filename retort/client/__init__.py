"""A client of the reward service, for any Python program. Needs grpcio and protobuf, nothing else.

    from retort.client import Item, RewardClient

    with RewardClient("127.0.0.1:50051") as client:
        (result,) = client.score([Item(checker="mcq", completion="<answer>B</answer>", answer="B")])
    assert result.reward == 1.0

`AsyncRewardClient` has the same methods as coroutines, and its `stream` also takes items as they come.
`retort.client.adapters` has the functions that other trainers call.
"""

from retort.client.calls import AsyncRewardClient, RewardClient
from retort.client.messages import Item, Result, RewardServiceError, UnscorableError

__all__ = ["AsyncRewardClient", "Item", "Result", "RewardClient", "RewardServiceError", "UnscorableError"]
