"""A rollout replica around a plain transformers model: the service's own receiver and routes, on a real HTTP server.

It can be made to go wrong: in what it receives, in what it loads, or by not answering.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import httpx
import torch
import uvicorn
from torch import Tensor

from retort.queues import Member, RolloutQueue
from retort.weight_sync import TransferRequest, WeightManifest, bucket_digest, join, receive
from services.rollout.app import make_app
from services.rollout.weight_receiver import WeightReceiver
from tests.integration.queue_run import Run
from tests.training import a_language_model

Weights = dict[str, Tensor]


class TorchEngine:
    """`services.rollout.engine.Engine` without sampling. Its weights are not the trainer's until they were sent."""

    num_workers = 1

    def __init__(self, corrupt: Callable[[int, Tensor], None], load_as: Callable[[Weights], Weights]) -> None:
        self.model = a_language_model(99, dtype=torch.float32, attention="sdpa")
        self._corrupt = corrupt
        self._load_as = load_as
        self._received: Weights = {}

    async def prepare(self) -> None:
        self._received = {}

    async def receive(self, request: TransferRequest, manifest: WeightManifest) -> list[list[int]]:
        return [await asyncio.to_thread(self._receive, request, manifest)]

    def _receive(self, request: TransferRequest, manifest: WeightManifest) -> list[int]:
        digests = []
        arriving = receive(join(request), manifest, torch.device("cpu"), request.deadline_s)
        for number, (tensors, _) in enumerate(arriving):
            storage = tensors[0][1].untyped_storage()
            bucket = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._corrupt(number, bucket)
            digests.append(bucket_digest(bucket))
            self._received |= dict(tensors)
        return digests

    async def load(self, version: int) -> None:
        with torch.no_grad():
            for name, tensor in self._load_as(self._received).items():
                self.model.get_parameter(name).copy_(tensor)

    async def probe(self, prompt_ids: list[int]) -> list[float]:
        return prompt_logprobs(self.model, prompt_ids)

    async def abandon(self) -> None:
        self._received = {}


@torch.no_grad()
def prompt_logprobs(model: torch.nn.Module, ids: list[int]) -> list[float]:
    logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs[range(len(ids) - 1), ids[1:]].tolist()


def untouched(_: int, __: Tensor) -> None:
    """A wire that changes nothing."""


class TorchReplica:
    """Use as a context: inside, it answers HTTP and is a member of the run."""

    def __init__(
        self,
        run: Run,
        name: str = "rollout-0",
        *,
        corrupt: Callable[[int, Tensor], None] = untouched,
        load_as: Callable[[Weights], Weights] = lambda weights: weights,
        silent_at: str = "",
    ) -> None:
        self.name = name
        self.calls: list[str] = []
        self.engine = TorchEngine(corrupt, load_as)
        self.receiver = WeightReceiver(self.engine)  # type: ignore[arg-type]
        self._run = run
        self._queue: RolloutQueue = run.replica(name)
        self._silent_at = silent_at
        self._app = make_app(self.receiver)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self._asgi, interface="asgi3", log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    async def _asgi(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        call = scope["path"].rpartition("/")[2]
        if scope["method"] == "POST":
            self.calls.append(call)
        if call == self._silent_at:
            await asyncio.Event().wait()
        await self._app(scope, receive, send)

    def announce(self) -> None:
        """Say that it is there. Raises Evicted when the trainer went on without it."""
        member = Member(
            name=self.name,
            pid=1,
            host="localhost",
            control_url=self.url,
            http_url=self.url,
            policy_version=self.receiver.served_version,
            state=self.receiver.state,  # type: ignore[arg-type]
            incarnation=f"{self.name} {self.url}",
            groups_in_hand=0,
            tokens_generated=0,
            waiting_for="",
            updated=time.time(),
        )
        self._run.wait(self._queue.announce(member))

    def says_it_serves(self, version: int) -> bool:
        answer = httpx.get(f"{self.url}/readyz")
        return answer.status_code == 200 and answer.text == f"serving policy version {version}\n"

    def __enter__(self) -> "TorchReplica":
        self._thread.start()
        self.announce()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
