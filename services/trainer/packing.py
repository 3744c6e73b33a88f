"""Which rank computes which sequences together: packed micro-batches, balanced by what they cost.

Every rank knows the whole step and works out the same plan, so nothing has to be communicated, and all ranks make the
same number of passes: FSDP's collectives would otherwise wait for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """S packed sequences with T tokens, of which N completion tokens are predicted."""

    rows: list[int]
    """[S] which completions of the step these are; empty for a pass that only keeps other ranks company."""
    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T] counted from 0 within each sequence."""
    sequence_lengths: list[int]
    """[S] tokens of each sequence; they add up to T."""
    sequence_bounds: Tensor
    """[S + 1] int32: where each sequence starts, and T."""
    predicting: Tensor
    """[N] position whose output predicts the completion token; for the first that is the last token of the prompt."""
    targets: Tensor
    """[N] the completion tokens."""


def plan(lengths: Sequence[int], *, ranks: int, token_budget: int, parity: float) -> list[list[list[int]]]:
    """Deal sequences to ranks and micro-batches: [ranks][passes][...] indices into `lengths`.

    A sequence of n tokens costs n + n^2 / `parity` (`ModelCost`). Dearest first to the rank with the least to do, then
    first-fit into micro-batches of at most `token_budget` tokens; a longer sequence gets one of its own. Every rank has
    the same number of micro-batches, some of them empty. They go dearest first, since in a pass all ranks wait for the
    slowest.
    """
    costs = [length + length**2 / parity for length in lengths]
    loads = [0.0] * ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        dealt[rank].append(index)
        loads[rank] += costs[index]
    packed = [_first_fit(indices, lengths, token_budget) for indices in dealt]
    for bins in packed:
        bins.sort(key=lambda indices: -sum(costs[index] for index in indices))
    passes = max(len(bins) for bins in packed)
    return [bins + [[] for _ in range(passes - len(bins))] for bins in packed]


def _first_fit(indices: Sequence[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in indices:
        fitting = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if fitting is None:
            fitting = len(bins)
            bins.append([])
            room.append(token_budget)
        bins[fitting].append(index)
        room[fitting] -= lengths[index]
    return bins


def pack(
    rows: list[int],
    prompts: Sequence[Sequence[int] | None],
    completions: Sequence[Sequence[int]],
    device: torch.device,
) -> MicroBatch:
    """Pack the given completions, each behind its prompt. `prompts` and `completions` are those of the whole step."""
    # Without rows two tokens, because a compiled block has code of its own for a single one.
    sequences = [[*(prompts[row] or ()), *completions[row]] for row in rows] or [[0, 0]]
    lengths = [len(sequence) for sequence in sequences]
    predicting: list[int] = []
    start = 0
    for row, length in zip(rows, lengths, strict=False):
        end = start + length
        predicting += range(end - len(completions[row]) - 1, end - 1)
        start = end
    return MicroBatch(
        rows=rows,
        input_ids=torch.tensor([[token for sequence in sequences for token in sequence]], device=device),
        position_ids=torch.tensor([[position for length in lengths for position in range(length)]], device=device),
        sequence_lengths=lengths,
        sequence_bounds=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        predicting=torch.tensor(predicting, dtype=torch.long, device=device),
        targets=torch.tensor([token for row in rows for token in completions[row]], dtype=torch.long, device=device),
    )
