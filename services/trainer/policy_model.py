"""The network with the one output that training needs: log-probabilities of completion tokens.

There is never a [tokens, vocabulary] tensor of a whole micro-batch: the head runs over some hundred tokens at a time,
and again in the backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from services.trainer.packing import MicroBatch
from services.trainer.segments import take

LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}
"""Largest number of logits that exist at a time: 32 MiB in float32, the most that a host's allocator uses again, and
512 MiB. Each time costs a pass over the gradient of the head, which a GPU has to fetch from its memory: that takes
longer than what 220 tokens of Qwen3-4B, 128 MiB of logits, have to compute."""


class TokenScores(NamedTuple):
    logprobs: Tensor
    """[N] log-probability of every predicted token, at the sampling temperature."""
    entropies: Tensor
    """[N] entropy of the distribution it was taken from, in nats, detached; 0 where they were not asked for."""


class PolicyModel(nn.Module):
    """A causal language model that scores packed completions."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, batch: MicroBatch, temperature: float, *, entropies: bool = True) -> TokenScores:
        hidden = self.language_model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            use_cache=False,
        ).last_hidden_state[0]
        head = self.language_model.lm_head.weight
        if not batch.rows:
            # No token counts, but other ranks wait for this one's part of the collectives. The backward's need a
            # gradient of every parameter, an untied head included.
            return TokenScores((hidden.sum() + head.sum())[None] * 0, hidden.new_zeros(1))
        scores: tuple[Tensor, Tensor] = _Score.apply(  # type: ignore[no-untyped-call]  # torch gives `apply` no types
            take(hidden, batch.predicting, 0), head, batch.targets, temperature, entropies
        )
        return TokenScores(*scores)


class _Score(torch.autograd.Function):
    """hidden [N, d], head [V, d], targets [N] -> logprobs [N] and entropies [N], in float32 at least.

        z = hidden head' / temperature    L = logsumexp z    logprob = z[target] - L    entropy = L - sum softmax(z) z
        d logprob / d z = onehot(target) - softmax(z)

    Chunks add to the gradient of the head in float32 at least, which autograd by itself would do in the head's type.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, entropies: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, normalizers, found = (hidden.new_zeros(len(targets), dtype=wide) for _ in range(3))

        def score(chunk: slice) -> None:
            logits = _logits(hidden[chunk], head, temperature)
            normalizers[chunk] = logits.logsumexp(-1)
            logprobs[chunk] = logits.gather(-1, targets[chunk, None])[:, 0] - normalizers[chunk]
            if entropies:
                probabilities = (logits - normalizers[chunk, None]).exp_()
                found[chunk] = normalizers[chunk] - probabilities.mul_(logits).sum(-1)

        _in_chunks(score, hidden, head)
        ctx.save_for_backward(hidden, head, targets, normalizers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(found)
        return logprobs, found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, normalizers = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        # A frozen head, that of adapters, has none.
        of_head = torch.zeros_like(head, dtype=normalizers.dtype) if ctx.needs_input_grad[1] else None

        def differentiate(chunk: slice) -> None:
            rate = grad[chunk, None] / ctx.temperature
            logits = _logits(hidden[chunk], head, ctx.temperature)
            of_logits = logits.sub_(normalizers[chunk, None]).exp_().mul_(-rate)
            # Not scatter_add_, of which a GPU has no deterministic form.
            of_logits[torch.arange(len(rate), device=rate.device), targets[chunk]] += rate[:, 0]
            narrow = of_logits.to(head.dtype)
            of_hidden[chunk] = narrow @ head
            if of_head is not None and of_head.dtype == head.dtype:
                of_head.addmm_(narrow.T, hidden[chunk])
            elif of_head is not None:
                of_head.add_(narrow.T @ hidden[chunk])

        _in_chunks(differentiate, hidden, head)
        return of_hidden, None if of_head is None else of_head.to(head.dtype), None, None, None


def _in_chunks(work: Callable[[slice], None], hidden: Tensor, head: Tensor) -> None:
    """So many tokens at a time; what a call made is gone before the next."""
    tokens = max(1, LOGITS_AT_ONCE[hidden.device.type] // len(head))
    for start in range(0, len(hidden), tokens):
        work(slice(start, start + tokens))


def _logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    logits = F.linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
