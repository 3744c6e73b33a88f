"""An engine whose completions are a function of the seed, for tests of what stands around the engine."""

import asyncio
from collections.abc import Sequence

from retort.rollouts import SamplingParameters
from retort.weight_sync import TransferRequest, WeightManifest
from services.rollout.engine import Sampled

LETTERS = "ABCD"


def text_of(ids: Sequence[int]) -> str:
    """One character a token."""
    return "".join(map(chr, ids))


class ScriptedEngine:
    """Answers `<answer>X</answer>` with the letter that the seed stands for, one character a token.

    `calls` names what was asked of it. An exception in `failures` is raised by the call of that name, once. While
    `gate` is closed, completions do not end. `died` is set when a test wants its process to be gone.
    """

    num_workers = 1

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.version = -1
        self.digests = [[11, 22]]
        self.died = asyncio.Event()

    async def sample(
        self, prompt_ids: Sequence[int], sampling: SamplingParameters, seed: int, *, urgent: bool
    ) -> Sampled:
        self._note("sample")
        await self.gate.wait()
        ids = [ord(character) for character in f"<answer>{LETTERS[seed % 4]}</answer>"]
        return Sampled(ids, [-0.5] * len(ids), [self.version] * len(ids), "stop")

    async def prepare(self) -> None:
        self._note("prepare")

    async def receive(self, request: TransferRequest, manifest: WeightManifest) -> list[list[int]]:
        self._note("receive")
        return self.digests

    async def load(self, version: int) -> None:
        self._note(f"load {version}")
        self.version = version

    async def probe(self, prompt_ids: Sequence[int]) -> list[float]:
        self._note("probe")
        return [-1.0] * (len(prompt_ids) - 1)

    async def resume(self) -> None:
        self._note("resume")

    async def abandon(self) -> None:
        self._note("abandon")

    async def wait_until_dead(self) -> str:
        await self.died.wait()
        return "the script says that it died"

    def shutdown(self) -> None:
        self._note("shutdown")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if failure := self.failures.pop(call, None):
            raise failure
