import math
import time

import numpy as np
import pytest

from services.trainer.validation_metrics import (
    best_at_k_limit,
    bootstrap_metrics,
    ladder,
    pass_at_k,
    validation_metrics,
)


def test_the_ladder_doubles_and_ends_at_n() -> None:
    assert [ladder(n) for n in (1, 2, 3, 6, 16)] == [[], [2], [2, 3], [2, 4, 6], [2, 4, 8, 16]]


def test_one_sample_has_a_mean_only() -> None:
    assert bootstrap_metrics([[1.0], [0.0]], [["A"], ["B"]]) == {"mean@1": 0.5}


def test_the_draws_are_those_of_a_generator_seeded_for_every_prompt_and_k() -> None:
    scores = [0.0, 1.0, 0.0]
    metrics = bootstrap_metrics([scores, scores], [["A", "B", "C"]] * 2)
    picks = np.random.RandomState(42).choice(3, (1000, 2))
    assert metrics["best@2/mean"] == pytest.approx(np.mean([max(scores[i] for i in draw) for draw in picks]))


def test_a_tie_of_votes_goes_to_the_answer_seen_first_in_the_draw() -> None:
    scores, predictions = [1.0, 0.0, 0.0], ["A", "B", "C"]
    picks = np.random.RandomState(42).choice(3, (1000, 2))
    # Two votes are equal or tied, so the first of the draw decides.
    expected = np.mean([scores[draw[0]] for draw in picks])
    assert bootstrap_metrics([scores], [predictions])["maj@2/mean"] == pytest.approx(expected)


def test_equal_predictions_vote_together() -> None:
    # Three of four votes say A; a draw of 16 of them almost always does.
    scores, predictions = [1.0, 1.0, 1.0, 0.0] * 4, ["A", "A", "A", "B"] * 4
    assert bootstrap_metrics([scores], [predictions])["maj@16/mean"] > 0.95


def test_best_at_16_is_not_pass_at_16() -> None:
    scores = [[1.0] + [0.0] * 15]
    assert pass_at_k(scores, 16) == 1.0
    assert best_at_k_limit(scores, 16) == pytest.approx(1 - (15 / 16) ** 16)
    assert bootstrap_metrics(scores, [["A"] * 16])["best@16/mean"] == pytest.approx(0.644, abs=0.03)


def test_unbiased_pass_at_k_counts_subsets() -> None:
    # The one correct of 4 samples is in 3 of the 6 pairs.
    assert pass_at_k([[0.0, 1.0, 0.0, 0.0]], 2) == pytest.approx(0.5)


def test_names_and_places_are_those_of_the_reference_run() -> None:
    metrics = validation_metrics("sciknoweval", [[1.0, 0.0] * 8], [["A", "B"] * 8])
    core = {name for name in metrics if name.startswith("val-core/")}
    assert core == {
        f"val-core/sciknoweval/acc/{name}"
        for name in ("mean@16", "best@16/mean", "best@16/std", "maj@16/mean", "maj@16/std")
    }
    assert metrics["val-aux/sciknoweval/reward/mean@16"] == metrics["val-core/sciknoweval/acc/mean@16"] == 0.5
    assert {"std@16", "best@8/mean", "worst@16/mean", "worst@16/std", "maj@2/std", "pass@16"} <= {
        name.removeprefix("val-aux/sciknoweval/acc/") for name in metrics
    }
    assert all(math.isfinite(value) for value in metrics.values())


def test_prompts_with_different_numbers_of_samples_count_where_they_can() -> None:
    metrics = bootstrap_metrics([[1.0, 1.0], [0.0, 0.0, 0.0]], [["A"] * 2, ["B"] * 3])
    assert metrics["mean@2"] == 1.0
    assert metrics["mean@3"] == 0.0
    assert metrics["best@2/mean"] == 0.5


def test_a_validation_of_128_prompts_is_measured_in_well_under_a_second() -> None:
    scores = np.random.default_rng(0).integers(0, 2, (128, 16)).astype(float).tolist()
    start = time.process_time()
    validation_metrics("x", scores, [["A" if score else "B" for score in row] for row in scores])
    assert time.process_time() - start < 1.0
