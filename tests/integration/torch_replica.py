"""A rollout replica around a plain transformers model, which can be made to go wrong in what it receives or loads."""

import asyncio
from collections.abc import Callable

import torch
from torch import Tensor

from retort.lora import MergedWeights
from retort.weight_sync import Membership, TensorSpec, TransferRequest, WeightManifest, bucket_digest
from tests.integration.queue_run import Run
from tests.integration.replica import Replica
from tests.training import a_language_model

Weights = dict[str, Tensor]


class TorchEngine:
    """`services.rollout.engine.Engine` without sampling. Its weights are not the trainer's until they were sent."""

    def __init__(
        self,
        corrupt: Callable[[int, Tensor], None],
        load_as: Callable[[Weights], Weights],
        files: Callable[[], Weights],
        num_workers: int,
    ) -> None:
        self.num_workers = num_workers
        self.models = [a_language_model(99, dtype=torch.float32, attention="sdpa") for _ in range(num_workers)]
        """One for each worker; the first answers the probe."""
        self.model = self.models[0]
        self._files = files
        self._corrupt = corrupt
        self._load_as = load_as
        self._received: list[Weights] = [{} for _ in self.models]
        self.memberships = [Membership() for _ in self.models]

    async def prepare(self) -> None:
        self._received = [{} for _ in self.models]

    async def receive(self, request: TransferRequest, manifest: WeightManifest) -> list[list[int]]:
        workers = range(self.num_workers)
        return await asyncio.gather(
            *(asyncio.to_thread(self._receive, request, manifest, worker) for worker in workers)
        )

    def _receive(self, request: TransferRequest, manifest: WeightManifest, worker: int) -> list[int]:
        digests = []
        received: Weights = {}
        arriving = self.memberships[worker].receive(request, manifest, torch.device("cpu"), worker)
        for number, (tensors, _) in enumerate(arriving):
            bucket = bytes_of(manifest.buckets[number], tensors[0][1])
            if worker == self.num_workers - 1:
                self._corrupt(number, bucket)
            digests.append(bucket_digest(bucket))
            received |= dict(tensors)
        if manifest.lora_base:
            merged = MergedWeights(manifest.lora_base, self._files().items(), received, torch.device("cpu"))
            received = dict(merged)
            digests.append(merged.base_digest)
        self._received[worker] = received
        return digests

    async def load(self, version: int) -> None:
        with torch.no_grad():
            for model, received in zip(self.models, self._received, strict=True):
                for name, tensor in self._load_as(received).items():
                    model.get_parameter(name).copy_(tensor)

    async def probe(self, prompt_ids: list[int]) -> list[float]:
        return prompt_logprobs(self.model, prompt_ids)

    async def resume(self) -> None:
        """It samples nothing."""

    async def abandon(self) -> None:
        """What had arrived is forgotten by the next `prepare`."""


def bytes_of(specs: list[TensorSpec], first: Tensor) -> Tensor:
    """The bucket that arrived, whose `first` tensor lies at its start. Its memory may be longer."""
    memory = torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage())
    return memory[: sum(-(-spec.num_bytes // 16) * 16 for spec in specs)]


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
        num_workers: int = 1,
        host: str = "127.0.0.1",
    ) -> None:
        """`corrupt`: what happens to a bucket that the last worker received, while the others receive.

        `files`: what the model's files hold, to which adapters are added.
        """
        super().__init__(run, name, TorchEngine(corrupt, load_as, files, num_workers), silent_at=silent_at, host=host)
