"""A simulated engine with a model's weights, for tests of failures: `python -m services.rollout --engine simulated`.

It samples nothing. A completion is a function of its seed alone: one of four letters in the format that checker `mcq`
reads. Its log-probabilities are real, computed by transformers from the weights that were broadcast, and so are its
digests and its answer to the probe: a version that did not arrive whole is found out as it would be with vLLM.
"""

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.config import RunConfig
from retort.lora import MergedWeights
from retort.rollouts import SamplingParameters
from retort.weight_sync import Membership, TransferRequest, WeightManifest
from services.rollout.engine import Sampled
from services.rollout.engine_steps import TokenTime
from services.rollout.simulated_engine import Lengths, SimulatedEngine

LETTERS = "ABCD"
STEP_S = 0.05 / 64
"""Completions take up to 64 steps, by their seed, and therefore end in an order of their own."""


class SimulatedModel(SimulatedEngine):
    """See `services.rollout.engine.Engine`."""

    def __init__(self, config: RunConfig) -> None:
        limit = config.rollout.concurrent_groups * config.trainer.group_size
        super().__init__(TokenTime(STEP_S, 0.0), limit, Lengths(0.0, 0.0), transfer_s=0.0)
        dtype = getattr(torch, config.model.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)
        self._base = {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        self._answers = [
            [*tokenizer.encode(f"<answer>{letter}</answer>", add_special_tokens=False), tokenizer.eos_token_id]
            for letter in LETTERS
        ]
        self._version = -1
        self._membership = Membership()
        self._received: dict[str, Tensor] = {}

    async def sample(
        self, prompt_ids: Sequence[int], sampling: SamplingParameters, seed: int, *, urgent: bool
    ) -> Sampled:
        await self._steps.run(seed % 64)
        ids = self._answers[seed // 64 % len(LETTERS)][: sampling.max_completion_tokens]
        # Nothing is awaited from here on, so all tokens are of one version.
        logprobs = self._logprobs([*prompt_ids, *ids], sampling.temperature)[-len(ids) :]
        return Sampled(ids, logprobs, [self._version] * len(ids), "stop")

    async def receive(self, request: TransferRequest, manifest: WeightManifest) -> list[list[int]]:
        return [await asyncio.to_thread(self._receive, request, manifest)]

    async def load(self, version: int) -> None:
        with torch.no_grad():
            for name, tensor in self._received.items():
                self._model.get_parameter(name).copy_(tensor)
        self._version, self._received = version, {}
        await super().load(version)

    async def probe(self, prompt_ids: Sequence[int]) -> list[float]:
        return self._logprobs(prompt_ids, 1.0)

    async def abandon(self) -> None:
        self._received = {}

    def _receive(self, request: TransferRequest, manifest: WeightManifest) -> list[int]:
        digests = []
        for tensors, digest in self._membership.receive(request, manifest, torch.device("cpu")):
            self._received |= dict(tensors)
            digests.append(digest)
        if manifest.lora_base:
            merged = MergedWeights(manifest.lora_base, self._base.items(), self._received, torch.device("cpu"))
            self._received = dict(merged)
            digests.append(merged.base_digest)
        return digests

    @torch.no_grad()
    def _logprobs(self, ids: Sequence[int], temperature: float) -> list[float]:
        """Of every token but the first."""
        logits = self._model(torch.tensor([list(ids)])).logits[0, :-1].float() / temperature
        logprobs: list[float] = logits.log_softmax(-1)[range(len(ids) - 1), list(ids[1:])].tolist()
        return logprobs
