"""Which rank computes which sequences together: packed micro-batches, balanced by what they cost.

Every rank knows the whole step and works out the same plan, so nothing has to be communicated, and all ranks make the
same number of passes: FSDP's collectives would otherwise wait for ever.

Completions of one prompt that are in a micro-batch together share it: it is computed once for all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from services.trainer.segments import NO_PREFIX, Segments


class RowSize(NamedTuple):
    prompt: int
    """Number of its prompt; rows with the same number share it."""
    prompt_tokens: int
    completion_tokens: int


class Span(NamedTuple):
    """Tokens that are computed, and how many before them they see besides."""

    tokens: int
    before: int

    @property
    def squares(self) -> int:
        """How attention counts: of a whole sequence it is the square of its tokens."""
        return (self.before + self.tokens) ** 2 - self.before**2


@dataclass(frozen=True)
class MicroBatch:
    """S segments with T tokens, of which N completion tokens are predicted.

    A segment is a sequence, a prompt that the segments after it share, or a completion of such a prompt.
    """

    rows: list[int]
    """Which completions of the step these are; empty for a pass that only keeps other ranks company."""
    sequence_lengths: list[int]
    """Tokens of each completion and its prompt, shared or not."""
    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T] counted from 0 within each sequence."""
    spans: list[Span]
    """[S]"""
    segments: Segments
    predicting: Tensor
    """[N] position whose output predicts the completion token; for the first that is the last token of the prompt."""
    targets: Tensor
    """[N] the completion tokens."""


def number_prompts(prompts: Iterable[Sequence[int] | None], *, share: bool) -> list[int]:
    """A number for each row's prompt; with `share`, the same for the same prompt."""
    numbers: dict[int | tuple[int, ...], int] = {}
    keys = (tuple(prompt) if share and prompt else row for row, prompt in enumerate(prompts))
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def plan(rows: Sequence[RowSize], *, ranks: int, token_budget: int, parity: float) -> list[list[list[int]]]:
    """Deal rows to ranks and micro-batches: [ranks][passes][...] indices into `rows`.

    A sequence of n tokens costs n + n^2 / `parity` (`ModelCost`); behind a shared prompt of p tokens, n others cost
    n + ((p + n)^2 - p^2) / `parity`. Rows are dealt one by one, which balances the ranks, or prompt by prompt, which
    spares tokens: whichever is done sooner. Dearest first to the rank with the least to do, then first-fit into
    micro-batches whose sequences have at most `token_budget` tokens; a longer one gets one of its own. Prompts count
    for each completion, shared or not, since on a GPU attention has a copy for each. Every rank has the same number of
    micro-batches, some of them empty. They go dearest first, since in a pass all ranks wait for the slowest.
    """
    planner = _Planner(rows, ranks, token_budget, parity)
    one_by_one = planner.deal([[index] for index in range(len(rows))])
    if len({row.prompt for row in rows}) == len(rows):
        return one_by_one
    return min(planner.deal(planner.by_prompt()), one_by_one, key=planner.duration)


@dataclass(frozen=True)
class _Planner:
    rows: Sequence[RowSize]
    ranks: int
    token_budget: int
    parity: float

    def deal(self, units: list[list[int]]) -> list[list[list[int]]]:
        """[ranks][passes][...] from rows of one prompt that stay together."""
        costs = [self.cost(unit) for unit in units]
        loads = [0.0] * self.ranks
        shares: list[list[list[int]]] = [[] for _ in range(self.ranks)]
        for number in sorted(range(len(units)), key=lambda number: (-costs[number], number)):
            rank = loads.index(min(loads))
            shares[rank].append(units[number])
            loads[rank] += costs[number]
        packed = [self._first_fit(share) for share in shares]
        for micro_batches in packed:
            micro_batches.sort(key=lambda indices: -self.cost(indices))
        passes = max(len(micro_batches) for micro_batches in packed)
        return [micro_batches + [[] for _ in range(passes - len(micro_batches))] for micro_batches in packed]

    def by_prompt(self) -> list[list[int]]:
        """Rows of one prompt together, longest first, as far as the token budget lets them."""
        of_prompt: dict[int, list[int]] = {}
        for index in sorted(range(len(self.rows)), key=lambda index: (-self.rows[index].completion_tokens, index)):
            of_prompt.setdefault(self.rows[index].prompt, []).append(index)
        return [unit for indices in of_prompt.values() for unit in self._first_fit([[index] for index in indices])]

    def duration(self, shares: list[list[list[int]]]) -> float:
        return sum(max(map(self.cost, micro_batches)) for micro_batches in zip(*shares, strict=True))

    def cost(self, indices: Sequence[int]) -> float:
        """Of a micro-batch of these rows."""
        prompts = {self.rows[index].prompt: Span(self.rows[index].prompt_tokens, 0) for index in indices}
        completions = [Span(self.rows[index].completion_tokens, self.rows[index].prompt_tokens) for index in indices]
        return sum(span.tokens + span.squares / self.parity for span in [*prompts.values(), *completions])

    def _first_fit(self, units: Sequence[list[int]]) -> list[list[int]]:
        micro_batches: list[list[int]] = []
        room: list[int] = []
        for unit in units:
            tokens = sum(self.rows[index].prompt_tokens + self.rows[index].completion_tokens for index in unit)
            fitting = next((i for i, free in enumerate(room) if free >= tokens), None)
            if fitting is None:
                fitting = len(micro_batches)
                micro_batches.append([])
                room.append(self.token_budget)
            micro_batches[fitting] += unit
            room[fitting] -= tokens
        return micro_batches


def pack(
    rows: Sequence[int],
    prompts: Sequence[Sequence[int] | None],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    *,
    share: bool = True,
) -> MicroBatch:
    """Pack the given completions behind their prompts. `prompts` and `completions` are those of the whole step.

    With `share`, rows of the same prompt stand together behind one.
    """
    packed = _Packed()
    families: dict[int, list[int]] = {}
    for number, row in zip(number_prompts([prompts[row] for row in rows], share=share), rows, strict=True):
        families.setdefault(number, []).append(row)
    for family in families.values():
        packed.add(prompts[family[0]] or (), [completions[row] for row in family])
    if not packed.spans:
        # Two tokens, because a compiled block has code of its own for a single one.
        packed.add_segment([0, 0])
    in_order = [row for family in families.values() for row in family]
    return MicroBatch(
        rows=in_order,
        sequence_lengths=[len(prompts[row] or ()) + len(completions[row]) for row in in_order],
        input_ids=torch.tensor([packed.tokens], device=device),
        position_ids=torch.tensor([packed.positions], device=device),
        spans=packed.spans,
        segments=Segments.of([span.tokens for span in packed.spans], packed.prefixes, device),
        predicting=torch.tensor(packed.predicting, dtype=torch.long, device=device),
        targets=torch.tensor([t for row in in_order for t in completions[row]], dtype=torch.long, device=device),
    )


class _Packed:
    """The parts of a micro-batch while it grows."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.predicting: list[int] = []
        self.spans: list[Span] = []
        self.prefixes: list[int] = []

    def add(self, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> None:
        """A prompt and the completions that share it. With one it is a sequence like any other."""
        if len(completions) == 1:
            self.add_segment([*prompt, *completions[0]])
            end = len(self.tokens)
            self.predicting += range(end - len(completions[0]) - 1, end - 1)
            return
        prefix = len(self.spans)
        self.add_segment(prompt)
        last = len(self.tokens) - 1
        for completion in completions:
            start = len(self.tokens)
            self.predicting += [last, *range(start, start + len(completion) - 1)][: len(completion)]
            self.add_segment(completion, before=len(prompt), prefix=prefix)

    def add_segment(self, tokens: Sequence[int], before: int = 0, prefix: int = NO_PREFIX) -> None:
        if tokens:  # attention on a CPU divides by their number
            self.tokens += tokens
            self.positions += range(before, before + len(tokens))
            self.spans.append(Span(len(tokens), before))
            self.prefixes.append(prefix)
