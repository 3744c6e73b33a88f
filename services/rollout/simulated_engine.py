"""A simulated engine, for simulations of scale: it has a model's speed, no weights, and completions without meaning.

`simulated_model` gives it weights. See `services.rollout.engine.Engine`.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from retort.rollouts import SamplingParameters
from retort.weight_sync import TransferRequest, WeightManifest
from services.rollout.engine import Sampled
from services.rollout.engine_steps import EngineSteps, TokenTime

TOKEN, LOGPROB = 100_000, -0.5
"""What every completion consists of: as many bytes in a message as a token of a large vocabulary and its log-prob."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of completions: log-normal, cut at the longest allowed."""

    mean: float
    """Of the distribution before the cut, in tokens."""
    sigma: float
    """Standard deviation of the logarithm; 0: all have the mean."""

    def of(self, seed: int, longest: int) -> int:
        """The length that a completion's seed stands for: its quantile is seed / 2**63."""
        # 52 of its bits, so that the quantile of the largest seed is not rounded to 1.
        deviation = self.sigma * NormalDist().inv_cdf(((seed >> 11) + 0.5) / 2**52) if self.sigma else 0.0
        return max(1, min(longest, round(self.mean * math.exp(deviation - self.sigma**2 / 2))))


class SimulatedEngine:
    """See `services.rollout.engine.Engine`. Time is the event loop's."""

    num_workers = 1

    def __init__(self, time: TokenTime, limit: int, lengths: Lengths, transfer_s: float) -> None:
        """`limit`: how many completions are live at a time. `transfer_s`: what receiving weights takes, in seconds."""
        self._steps = EngineSteps(time, limit)
        self._lengths = lengths
        self._transfer_s = transfer_s
        self._loads: list[tuple[float, int]] = []
        """After how many steps which version was loaded."""

    async def sample(
        self, prompt_ids: Sequence[int], sampling: SamplingParameters, seed: int, *, urgent: bool
    ) -> Sampled:
        longest = sampling.max_completion_tokens
        tokens = self._lengths.of(seed, longest)
        began = await self._steps.run(tokens)
        versions, end = [-1] * tokens, tokens
        for loaded, version in reversed(self._loads):
            first = min(end, max(0, math.ceil(loaded - began)))
            versions[first:end] = [version] * (end - first)
            end = first
            if not end:
                break
        return Sampled([TOKEN] * tokens, [LOGPROB] * tokens, versions, "length" if tokens == longest else "stop")

    async def prepare(self) -> None:
        self._steps.pause()

    async def receive(self, request: TransferRequest, manifest: WeightManifest) -> list[list[int]]:
        await asyncio.sleep(self._transfer_s)
        return [[]]

    async def load(self, version: int) -> None:
        self._loads.append((self._steps.done, version))

    async def probe(self, prompt_ids: Sequence[int]) -> list[float]:
        return [LOGPROB] * (len(prompt_ids) - 1)

    async def resume(self) -> None:
        self._steps.resume()

    async def abandon(self) -> None:
        """Nothing was received."""

    async def wait_until_dead(self) -> str:
        """It lives in this process, and cannot die alone."""
        await asyncio.Event().wait()
        return "never"

    def shutdown(self) -> None:
        """Nothing was started."""
