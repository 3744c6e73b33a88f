import json
from pathlib import Path

from services.trainer.results import Results


def a_validation(source: str, avg: float, best: float, maj: float) -> dict[str, float]:
    prefix = f"val-core/{source}/acc"
    return {f"{prefix}/mean@4": avg, f"{prefix}/best@4/mean": best, f"{prefix}/maj@4/mean": maj}


def results_of(directory: Path, lines: list[dict[str, float]], questions: dict[str, int]) -> Results:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Results(directory / "metrics.jsonl", questions, samples=4)


def test_final_peak_and_untrained_values_stand_with_their_steps(tmp_path: Path) -> None:
    lines = [
        {"step": 0, **a_validation("toy", 0.5, 0.75, 0.5)},
        {"step": 1, "critic/score/mean": 0.125, "critic/rewards/mean": 0.125},
        {"step": 2, "critic/score/mean": 0.25, "critic/rewards/mean": 0.25, **a_validation("toy", 0.75, 0.875, 0.5)},
        {"step": 4, "critic/score/mean": 0.5, "critic/rewards/mean": 0.375, **a_validation("toy", 0.625, 1.0, 0.5)},
    ]
    results = results_of(tmp_path, lines, {"toy": 8})
    assert results.summary() == [
        ("Final critic/score/mean", 0.5, 4),
        ("Final critic/rewards/mean", 0.375, 4),
        ("Untrained validation avg@4", 0.5, 0),
        ("Final validation avg@4", 0.625, 4),
        ("Peak validation avg@4", 0.75, 2),
        ("Untrained validation best@4", 0.75, 0),
        ("Final validation best@4", 1.0, 4),
        ("Peak validation best@4", 1.0, 4),
        ("Untrained validation maj@4", 0.5, 0),
        ("Final validation maj@4", 0.5, 4),
        ("Peak validation maj@4", 0.5, 2),
    ]
    assert results.validations() == [
        (0, [0.5, 0.75, 0.5], None),
        (2, [0.75, 0.875, 0.5], 0.25),
        (4, [0.625, 1, 0.5], 0.5),
    ]
    assert (results.last_step, results.at(1)) == (4, [None, None, None])


def test_data_sources_count_by_their_questions(tmp_path: Path) -> None:
    line = {"step": 2, **a_validation("small", 1.0, 1.0, 1.0), **a_validation("large", 0.5, 0.75, 0.25)}
    # (1 x 1 + 3 x 0.5) / 4 and so on
    assert results_of(tmp_path, [line], {"small": 1, "large": 3}).at(2) == [0.625, 0.8125, 0.4375]


def test_a_run_without_metrics_has_no_results(tmp_path: Path) -> None:
    results = Results(tmp_path / "metrics.jsonl", {"toy": 8}, samples=4)
    assert (results.curves, results.summary(), results.validations(), results.last_step) == ({}, [], [], 0)


def test_one_sample_a_question_has_neither_best_nor_majority(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "val-core/toy/acc/mean@1": 0.5}\n')
    assert Results(tmp_path / "metrics.jsonl", {"toy": 8}, samples=1).at(2) == [0.5, None, None]
