"""Validation: mean@n, best@k, worst@k, maj@k as verl computes and names them, and the unbiased pass@k.

best@k is a bootstrap with replacement and tends to 1 - (1 - c/n)^k for c of n correct; pass@k is the unbiased
estimate (arXiv 2107.03374). They are different numbers: with 1 of 16 correct, best@16 is about 0.644 and
pass@16 is 1.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def validation_metrics(
    data_source: str,
    scores_by_prompt: Sequence[Sequence[float]],
    predictions_by_prompt: Sequence[Sequence[str]],
) -> dict[str, float]:
    """All validation metrics of one data source, under the reference names.

    Scores are the rewards of each prompt's samples (correct from 0.5 on), predictions what the checker read as
    the answer. `acc` and its twin `reward` are the same numbers; mean, best and maj of all samples' `acc` are
    val-core, the rest is val-aux.
    """
    values = bootstrap_metrics(scores_by_prompt, predictions_by_prompt, with_std=True)
    n = max(len(scores) for scores in scores_by_prompt)
    for k in ladder(n):
        values[f"pass@{k}"] = pass_at_k(scores_by_prompt, k)
        values[f"best@{k}/limit"] = best_at_k_limit(scores_by_prompt, k)
    core = {f"mean@{n}", f"best@{n}/mean", f"best@{n}/std", f"maj@{n}/mean", f"maj@{n}/std"}
    metrics: dict[str, float] = {}
    for name, value in values.items():
        metrics[f"{'val-core' if name in core else 'val-aux'}/{data_source}/acc/{name}"] = value
        metrics[f"val-aux/{data_source}/reward/{name}"] = value
    return metrics


def bootstrap_metrics(
    scores_by_prompt: Sequence[Sequence[float]],
    predictions_by_prompt: Sequence[Sequence[str]],
    *,
    draws: int = 1000,
    seed: int = 42,
    with_std: bool = False,
) -> dict[str, float]:
    """mean@n, std@n and best@k/mean, worst@k/mean, maj@k/mean for k on the ladder, averaged over prompts.

    k samples are drawn `draws` times with replacement. The generator is seeded anew for every prompt and k, so
    prompts with the same number of samples share their draws. `with_std` adds best@k/std and so on: the
    deviation over the draws.
    """
    prompts_by_count: dict[int, list[int]] = defaultdict(list)
    for prompt, scores in enumerate(scores_by_prompt):
        prompts_by_count[len(scores)].append(prompt)
    per_prompt: dict[str, list[float]] = defaultdict(list)
    for n, prompts in prompts_by_count.items():
        table = np.array([scores_by_prompt[prompt] for prompt in prompts], dtype=np.float64)
        votes = [_labels(predictions_by_prompt[prompt]) for prompt in prompts]
        per_prompt[f"mean@{n}"] += table.mean(axis=1).tolist()
        if n > 1:
            per_prompt[f"std@{n}"] += table.std(axis=1).tolist()
        for k in ladder(n):
            picks = np.random.RandomState(seed).choice(n, (draws, k))
            for name, outcomes in _outcomes(table, votes, picks):
                per_prompt[f"{name}@{k}/mean"].append(float(outcomes.mean()))
                if with_std:
                    per_prompt[f"{name}@{k}/std"].append(float(outcomes.std()))
    return {name: float(np.mean(values)) for name, values in per_prompt.items()}


def ladder(n: int) -> list[int]:
    """The k that are reported for n samples: powers of two below n, then n; none for a single sample."""
    return [2**power for power in range(1, n.bit_length()) if 2**power < n] + ([n] if n > 1 else [])


def pass_at_k(scores_by_prompt: Sequence[Sequence[float]], k: int) -> float:
    """Unbiased probability that one of k samples is correct, 1 - C(n-c, k) / C(n, k), averaged over prompts.

    Prompts with fewer than k samples do not count.
    """
    counts = [(len(scores), _correct(scores)) for scores in scores_by_prompt if len(scores) >= k]
    return float(np.mean([1 - comb(n - c, k) / comb(n, k) for n, c in counts]))


def best_at_k_limit(scores_by_prompt: Sequence[Sequence[float]], k: int) -> float:
    """What best@k/mean tends to with ever more draws, 1 - (1 - c/n)^k, averaged over prompts."""
    return float(np.mean([1 - (1 - _correct(scores) / len(scores)) ** k for scores in scores_by_prompt]))


def _outcomes(table: Floats, votes: list[Integers], picks: Integers) -> Iterator[tuple[str, Floats]]:
    """Per prompt the best, the worst and the majority's score of each draw [D]. table [P, n], picks [D, k]."""
    # How often each sample was drawn [D, n], so that one small product per prompt counts its votes.
    multiplicity = (picks[:, :, None] == np.arange(table.shape[1])).sum(axis=1, dtype=np.float32)
    draws = np.arange(len(picks))
    for scores, labels in zip(table, votes, strict=True):
        drawn = scores[picks]
        yield "best", drawn.max(axis=1)
        yield "worst", drawn.min(axis=1)
        same_vote = (labels[:, None] == labels).astype(np.float32)
        support = np.take_along_axis(multiplicity @ same_vote, picks, axis=1)
        # argmax takes the first of equals: the answer seen first in a draw wins a tie, at its first occurrence.
        yield "maj", drawn[draws, support.argmax(axis=1)]


def _labels(predictions: Sequence[str]) -> Integers:
    """Equal predictions get equal numbers."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prediction, len(numbers)) for prediction in predictions])


def _correct(scores: Sequence[float]) -> int:
    return sum(score >= 0.5 for score in scores)
