"""What the ranks computed in a step, for the metrics that explain its time."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from services.trainer.packing import MicroBatch
from services.trainer.ranks import gather_all


@dataclass
class Work:
    """Of one rank, or of all ranks together."""

    tokens: float = 0.0
    """Of the sequences in all passes. Each has a prompt, which may have been computed once for several."""
    room: float = 0.0
    """What they could have been: the token budget of every pass, or what a longer sequence needed."""
    operations: float = 0.0
    optimizer_seconds: float = 0.0
    """Rank 0's."""
    peak_bytes: float = 0.0
    """The largest of any rank."""
    peak_rate: float = 0.0
    """Operations a second that the ranks could have done."""
    ranks: int = 1

    def add(self, batch: MicroBatch, operations: float, token_budget: int) -> None:
        """Count a pass. One without rows has room and no tokens."""
        tokens = sum(batch.sequence_lengths)
        self.tokens += tokens
        self.room += max(tokens, token_budget)
        self.operations += operations

    def of_all_ranks(self, device: torch.device, peak_rate: float) -> "Work":
        """Summed up, on every rank. A collective. `peak_rate`: of this rank's device."""
        numbers = [self.tokens, self.room, self.operations, self.optimizer_seconds, peak_bytes(device), peak_rate]
        ranks = gather_all(torch.tensor(numbers, dtype=torch.float64))
        tokens, room, operations, _, _, rate = ranks.sum(0).tolist()
        return Work(tokens, room, operations, float(ranks[0, 3]), float(ranks[:, 4].max()), rate, len(ranks))


def work_metrics(work: Work, seconds: Mapping[str, float]) -> dict[str, float]:
    """`seconds`: of the parts of the step.

        perf/mfu = operations / (seconds of old log-probs, teacher and updates) / peak rate of all ranks

    Operations are those that the mathematics needs: a forward pass for old log-probs and teacher, three for an update.
    """
    computing = sum(seconds.get(part, 0.0) for part in ("old_logprobs", "teacher", "update"))
    metrics = {
        "perf/trainer_ranks": work.ranks,
        "perf/max_memory_allocated_gb": work.peak_bytes / 1e9,
        "timing_s/optimizer": work.optimizer_seconds,
        "timing_s/forward_backward": max(0.0, seconds.get("update", 0.0) - work.optimizer_seconds),
    }
    if work.room:
        metrics["perf/packing_efficiency"] = work.tokens / work.room
    if work.operations:
        metrics["perf/mfu"] = work.operations / computing / work.peak_rate
    return metrics


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process had: of the GPU since the last call, of the host since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
