"""Checkpoints that are whole or absent: every file synced, then a manifest with digests, then one rename.

    checkpoints/step-000040/  rank-0.safetensors rank-1.safetensors ...  state.json  MANIFEST.json

Each rank writes the rows of every tensor that it holds; reading takes the rows that a rank needs from whichever files
have them, so a run may go on with another number of ranks. safetensors and JSON only.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retort.config import ConfigError
from retort.disk import writing
from retort.telemetry import log_event
from services.trainer.fence import Fence
from services.trainer.host_memory import MOMENTS, zero_moment
from services.trainer.policy import Policy
from services.trainer.ranks import broadcast_bytes
from services.trainer.teacher import Teacher
from services.trainer.weight_copy import local

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says about itself."""

    version: int
    ranks: int
    optimizer_steps: int
    adapters: str = ""
    """Of which adapters on which base the policy consists; empty: of all weights."""


class Checkpoints:
    """The directory `checkpoints/` of a run. `save` and `load` are collectives."""

    def __init__(
        self,
        directory: Path,
        keep_last: int,
        fence: Fence | None = None,
        *,
        keep_best: int = 0,
        scores: Callable[[], Mapping[int, float]] = dict,
    ) -> None:
        """`fence` is rank 0's: only the newest trainer commits. `scores`: what validation has given each version."""
        self._directory = directory
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._scores = scores
        self._fence = fence

    def save(self, policy: Policy, teacher: Teacher) -> None:
        """Write policy, teacher and optimizer; once that is durable, delete what no `keep_` covers any more.

        Raises Fenced if a newer trainer has taken over; then nothing has changed.
        """
        name = f"step-{policy.version:06d}"
        epoch = self._fence.epoch if self._fence else 0
        # Named after its writer: a trainer that was replaced while it wrote must not write into its successor's.
        writer = broadcast_bytes(str(epoch).encode()).decode()
        unfinished = self._directory / f"{name}.{writer}.unfinished"
        if policy.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            with writing(unfinished):
                unfinished.mkdir(parents=True)
        dist.barrier()
        file = unfinished / f"rank-{policy.rank}.safetensors"
        with writing(file, draft=file):
            save_file(dict(_named_shards(policy, teacher)), file)
            _sync(file)
        dist.barrier()
        if policy.rank == 0:
            state = Saved(policy.version, policy.ranks, _optimizer_steps(policy), _adapters(policy))
            _write(unfinished / "state.json", json.dumps(state.__dict__))
            digests = {file.name: _digest(file) for file in sorted(unfinished.iterdir())}
            _write(unfinished / MANIFEST, json.dumps(digests, indent=1))
            with writing(unfinished):
                _sync(unfinished)
            with self._fence.held() if self._fence else contextlib.nullcontext():
                self._commit(unfinished, policy.version)
        dist.barrier()

    def _commit(self, unfinished: Path, version: int) -> None:
        final = self._directory / f"step-{version:06d}"
        shutil.rmtree(final, ignore_errors=True)
        with writing(final):
            unfinished.rename(final)
            _sync(self._directory)
        self._tidy(version)

    def load(self, policy: Policy, teacher: Teacher, before: float = math.inf) -> bool:
        """Continue from the newest whole checkpoint of a version below `before`; False when there is none of that kind.

        A damaged one is passed over loudly. Raises ConfigError when there are checkpoints and none is whole: a run
        never starts from zero by itself.
        """
        choice = str(self._newest_whole(before) or "") if policy.rank == 0 else ""
        name = broadcast_bytes(choice.encode()).decode()
        if not name:
            return False
        if name == "damaged":
            raise ConfigError(
                f"{self._directory}: no checkpoint is whole (see the log for each). Restore one from a backup, or "
                "start again under another name."
            )
        directory = Path(name)
        state = Saved(**json.loads((directory / "state.json").read_text()))
        if state.adapters != _adapters(policy):
            raise ConfigError(
                f"{directory} holds {state.adapters or 'all weights'}, and this run trains "
                f"{_adapters(policy) or 'all weights'}. Set [lora] and model.path as they were, or start under "
                "another name."
            )
        _restore(policy, teacher, directory, state)
        policy.version = state.version
        return True

    def _tidy(self, version: int) -> None:
        """Delete what this version has made unnecessary: older ones that are not among the last or the best, later ones
        of a lost timeline.

        A run that resumed from an earlier checkpoint leaves later ones behind, damaged or of a future that is not
        this run's any more.
        """
        mine = [path for path in self._all() if _version_of(path) <= version]
        scores = self._scores()
        # Of equal scores the newer. One that is validated beside the next step has its score before that is saved.
        ranked = sorted(
            ((scores[_version_of(path)], path) for path in mine if _version_of(path) in scores), reverse=True
        )
        kept = {*mine[-self._keep_last :], *(path for _, path in ranked[: self._keep_best])}
        for path in set(self._all()) - kept:
            shutil.rmtree(path)
        for path in self._directory.glob("*.unfinished"):
            shutil.rmtree(path)

    def _all(self) -> list[Path]:
        found = self._directory.glob("step-*") if self._directory.exists() else ()
        return sorted(path for path in found if re.fullmatch(r"step-\d{6,}", path.name))

    def _newest_whole(self, before: float) -> Path | str | None:
        candidates = [path for path in self._all()[::-1] if _version_of(path) < before]
        for path in candidates:
            problem = _problem(path)
            if not problem:
                return path
            log_event("checkpoint_damaged", logging.ERROR, path=path, problem=problem, action="trying the one before")
        return "damaged" if candidates else None


def _version_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _named_shards(policy: Policy, teacher: Teacher) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the training state under a name: this rank's rows, on the CPU."""
    parameters = policy.parameters()
    for name, shard, average in zip(policy.names, policy.local_shards(), teacher.shards, strict=True):
        yield f"policy.{name}", shard.cpu().contiguous()
        yield f"teacher.{name}", average.cpu().contiguous()
    for name, parameter in zip(policy.names, parameters, strict=True):
        for moment in MOMENTS if parameter in policy.optimizer.state else ():
            yield f"{moment}.{name}", local(policy.optimizer.state[parameter][moment]).cpu().contiguous()


def _adapters(policy: Policy) -> str:
    return policy.adapters.description if policy.adapters else ""


def _optimizer_steps(policy: Policy) -> int:
    states = policy.optimizer.state.values()
    return next((int(state["step"]) for state in states), 0)


@torch.no_grad()
def _restore(policy: Policy, teacher: Teacher, directory: Path, state: Saved) -> None:
    shards = [safe_open(directory / f"rank-{rank}.safetensors", "pt") for rank in range(state.ranks)]
    for (name, shape), parameter, own, average in zip(
        policy.specs, policy.parameters(), policy.local_shards(), teacher.shards, strict=True
    ):
        start, stop = _rows(shape, policy.rank, policy.ranks)

        def read(kind: str, name: str = name, shape: list[int] = shape, start: int = start, stop: int = stop) -> Tensor:
            return _read_rows(shards, f"{kind}.{name}", shape, start, stop)

        own.copy_(read("policy"))
        average.copy_(read("teacher"))
        if state.optimizer_steps:
            moments = {moment: zero_moment(policy.optimizer, parameter) for moment in MOMENTS}
            for moment, tensor in moments.items():
                local(tensor).copy_(read(moment))
            # On the device: fused Adam reads it there.
            steps = torch.tensor(float(state.optimizer_steps), device=own.device)
            policy.optimizer.state[parameter] = {"step": steps, **moments}


def _rows(shape: list[int], rank: int, ranks: int) -> tuple[int, int]:
    """FSDP2 gives rank r the r-th chunk of the first dimension, as torch.chunk cuts it."""
    size = -(-shape[0] // ranks)
    return min(rank * size, shape[0]), min((rank + 1) * size, shape[0])


def _read_rows(shards: list[safe_open], name: str, shape: list[int], start: int, stop: int) -> Tensor:
    parts = []
    for rank, shard in enumerate(shards):
        first, last = _rows(shape, rank, len(shards))
        low, high = max(start, first), min(stop, last)
        if low < high:
            parts.append(shard.get_slice(name)[low - first : high - first])
    return torch.cat(parts) if parts else torch.empty(0, *shape[1:])


def _problem(directory: Path) -> str:
    try:
        digests = json.loads((directory / MANIFEST).read_text())
        if "state.json" not in digests:
            return f"{MANIFEST} does not name every file"
        for name, digest in digests.items():
            if _digest(directory / name) != digest:
                return f"{name} does not have the digest that the manifest gives"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _write(file: Path, text: str) -> None:
    with writing(file):
        file.write_text(text)
        _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
