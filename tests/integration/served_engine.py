"""Real vLLM without a trainer: the engine, and a model whose weights it is sent."""

import asyncio
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM

from retort.config import load_config
from retort.lora import base_digest
from retort.rollouts import SamplingParameters
from retort.weight_sync import LoraBase, Snapshot, TensorSpec, TransferRequest, WeightManifest, open_process_group, send
from services.rollout.engine import Sampled

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0
PLAIN = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=24)
PROMPT = list(range(20, 44))
T = TypeVar("T")


class Served:
    """The engine, the transformers model whose weights it should hold, and the way from one to the other."""

    def __init__(self, model_path: Path) -> None:
        self.loop = asyncio.Runner()
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.shipped = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.version = 0
        self.engine = self.wait(self._start(model_path), timeout_s=280)

    async def _start(self, model_path: Path) -> Any:
        from services.rollout.vllm_engine import VLLMEngine

        config = load_config(ROOT / "configs" / "tiny-cpu.toml", [f"model.path={model_path}"], env={})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHDYNAMO_DISABLE", "1")  # the engine turns the compiler off: not for the tests that follow
            return VLLMEngine(config)

    def wait(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return self.loop.run(asyncio.wait_for(work, timeout_s))

    def reset(self) -> None:
        """Back to the shipped weights, in the model; `sync` sends them."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.shipped[name])

    def change(self, *kinds: str, seed: int = 0) -> None:
        """Add noise as large as the weights themselves to all parameters of these kinds."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if any(kind in name for kind in kinds):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise * parameter.std().clamp(min=0.05))

    async def sync(self) -> None:
        """What the trainer does, with the model's weights as the next version."""
        self.version += 1
        tensors = [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]
        specs = float_specs(dict(tensors))
        await self._send(Snapshot.take(self.version, WeightManifest.of(specs, bucket_bytes=2**19), tensors))

    async def sync_adapters(self, seed: int) -> None:
        """The same with random adapters of rank 2 for the shipped weights, of which the model gets the sum."""
        self.version += 1
        self.reset()
        generator = torch.Generator().manual_seed(seed)
        adapters = {}
        for name, weight in self.model.named_parameters():
            if "_proj" in name:
                a, b = (torch.randn(shape, generator=generator) for shape in ((2, weight.shape[1]), (len(weight), 2)))
                layer = name.removesuffix("weight")
                adapters |= {f"{layer}lora_A.weight": a, f"{layer}lora_B.weight": b}
                weight.data += 0.05 * (b @ a)
        base = LoraBase(tensors=float_specs(self.shipped), scale=0.05)
        manifest = WeightManifest.of(float_specs(adapters), 2**14, base)
        digest = base_digest(base.tensors, self.shipped)
        await self._send(Snapshot.take(self.version, manifest, adapters.items(), base_digest=digest))

    async def _send(self, snapshot: Snapshot) -> None:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        request = TransferRequest(
            epoch=1,
            group=uuid.uuid4().hex,
            backend="gloo",
            store_host="127.0.0.1",
            store_port=store.port,
            broadcast_rank=1,
            world_size=2,
            deadline_s=DEADLINE_S,
        )
        await self.engine.prepare()
        receiving = self.engine.receive(request, snapshot.manifest)
        digests, _ = await asyncio.gather(receiving, asyncio.to_thread(broadcast, store, request, snapshot))
        assert digests == [snapshot.digests]
        await self.engine.load(self.version)
        await self.engine.probe(PROMPT)
        await self.engine.resume()

    async def sample(
        self, prompt_ids: Sequence[int], seeds: Sequence[int], sampling: SamplingParameters = PLAIN
    ) -> list[Sampled]:
        samples = (self.engine.sample(prompt_ids, sampling, seed, urgent=True) for seed in seeds)
        return await asyncio.gather(*samples)

    def logits(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], model: Any = None) -> Tensor:
        """[completion, vocabulary], from transformers; of another model than the one that is served if one is given."""
        with torch.no_grad():
            logits = (model or self.model)(torch.tensor([[*prompt_ids, *completion_ids]])).logits[0]
        return logits[len(prompt_ids) - 1 : -1]

    def gap(self, sampled: Sampled, prompt_ids: Sequence[int] = PROMPT) -> float:
        """Largest |engine - transformers| log-probability of the sampled tokens at temperature 1."""
        ids = torch.tensor(sampled.completion_ids)
        reference = self.logits(prompt_ids, sampled.completion_ids).log_softmax(-1)[torch.arange(len(ids)), ids]
        return float((reference - torch.tensor(sampled.logprobs)).abs().max())


def float_specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name=name, shape=list(tensor.shape), dtype="float32") for name, tensor in tensors.items()]


def broadcast(store: TCPStore, request: TransferRequest, snapshot: Snapshot) -> None:
    group = open_process_group("gloo", store, request.group, rank=0, world_size=2, timeout_s=DEADLINE_S)
    send(group, snapshot, DEADLINE_S)
