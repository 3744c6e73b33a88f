"""A rollout replica around a plain transformers model, which can be made to go wrong in what it receives or loads."""

import asyncio
from collections.abc import Callable

import torch
from torch import Tensor

from retort.lora import MergedWeights
from retort.weight_sync import Membership, TransferRequest, WeightManifest, bucket_digest, receive
from tests.integration.queue_run import Run
from tests.integration.replica import Replica
from tests.training import a_language_model

Weights = dict[str, Tensor]


class TorchEngine:
    """`services.rollout.engine.Engine` without sampling. Its weights are not the trainer's until they were sent."""

    num_workers = 1

    def __init__(
        self,
        corrupt: Callable[[int, Tensor], None],
        load_as: Callable[[Weights], Weights],
        files: Callable[[], Weights],
    ) -> None:
        self.model = a_language_model(99, dtype=torch.float32, attention="sdpa")
        self._files = files
        self._corrupt = corrupt
        self._load_as = load_as
        self._received: Weights = {}
        self.membership = Membership()

    async def prepare(self) -> None:
        self._received = {}

    async def receive(self, request: TransferRequest, manifest: WeightManifest) -> list[list[int]]:
        return [await asyncio.to_thread(self._receive, request, manifest)]

    def _receive(self, request: TransferRequest, manifest: WeightManifest) -> list[int]:
        digests = []
        with self.membership.of(request) as group:
            arriving = receive(group, manifest, torch.device("cpu"), request.deadline_s)
            for number, (tensors, _) in enumerate(arriving):
                storage = tensors[0][1].untyped_storage()
                bucket = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._corrupt(number, bucket)
                digests.append(bucket_digest(bucket))
                self._received |= dict(tensors)
        if manifest.lora_base:
            merged = MergedWeights(manifest.lora_base, self._files().items(), self._received, torch.device("cpu"))
            self._received = dict(merged)
            digests.append(merged.base_digest)
        return digests

    async def load(self, version: int) -> None:
        with torch.no_grad():
            for name, tensor in self._load_as(self._received).items():
                self.model.get_parameter(name).copy_(tensor)

    async def probe(self, prompt_ids: list[int]) -> list[float]:
        return prompt_logprobs(self.model, prompt_ids)

    async def resume(self) -> None:
        """It samples nothing."""

    async def abandon(self) -> None:
        self._received = {}


@torch.no_grad()
def prompt_logprobs(model: torch.nn.Module, ids: list[int]) -> list[float]:
    logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs[range(len(ids) - 1), ids[1:]].tolist()


def untouched(_: int, __: Tensor) -> None:
    """A wire that changes nothing."""


class TorchReplica(Replica):
    """A replica that receives weights and does not sample."""

    engine: TorchEngine

    def __init__(
        self,
        run: Run,
        name: str = "rollout-0",
        *,
        corrupt: Callable[[int, Tensor], None] = untouched,
        load_as: Callable[[Weights], Weights] = lambda weights: weights,
        files: Callable[[], Weights] = dict,
        silent_at: str = "",
    ) -> None:
        """`files`: what the model's files hold, to which adapters are added."""
        super().__init__(run, name, TorchEngine(corrupt, load_as, files), silent_at=silent_at)
