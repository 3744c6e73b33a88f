"""What a rollout server asks of the library that generates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from retort.rollouts import SamplingParameters
from retort.weight_sync import TransferRequest, WeightManifest


@dataclass(frozen=True)
class Sampled:
    """One completion as the engine made it, before anybody scored it."""

    completion_ids: list[int]
    logprobs: list[float]
    policy_versions: list[int]
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Token ids in, token ids and log-probabilities out; and the steps of a weight update.

    `prepare` freezes generation with all requests kept, `receive` returns one list of bucket digests per worker,
    `load` makes the received weights the ones in use under a version, `probe` scores a prompt with them, `resume` lets
    generation go on, `abandon` leaves a failed update. Between `prepare` and `resume` no token is sampled.
    `wait_until_dead` returns the reason why the engine will sample no more.
    """

    num_workers: int
    """Processes that hold weights."""

    async def sample(
        self, prompt_ids: Sequence[int], sampling: SamplingParameters, seed: int, *, urgent: bool
    ) -> Sampled: ...

    async def prepare(self) -> None: ...

    async def receive(self, request: TransferRequest, manifest: WeightManifest) -> list[list[int]]: ...

    async def load(self, version: int) -> None: ...

    async def probe(self, prompt_ids: Sequence[int]) -> list[float]: ...

    async def resume(self) -> None: ...

    async def abandon(self) -> None: ...

    async def wait_until_dead(self) -> str: ...

    def shutdown(self) -> None: ...
