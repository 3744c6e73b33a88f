import pytest

from retort.cli.compare.table import (
    Measured,
    Row,
    aligned,
    compared_metrics,
    difference_text,
    rows,
    value_text,
)

AVG = "val-core/letters/acc/mean@4"
OURS = Measured("ours", [{"step": 0, AVG: 0.5}, {"step": 2, AVG: 0.875}, {"step": 4, AVG: 0.75, "actor/entropy": 0.2}])
THEIRS = Measured("theirs", [{"step": 4, AVG: 0.8}])


def test_validation_is_compared_at_its_last_and_at_its_best_step() -> None:
    final, peak = rows(OURS, THEIRS, [AVG])
    assert final == Row(AVG, "final", (4, 0.75), (4, 0.8))
    assert peak == Row(AVG, "peak", (2, 0.875), (4, 0.8))
    assert peak.difference == pytest.approx(-0.075)


def test_a_metric_that_is_not_better_for_being_larger_has_no_peak() -> None:
    assert list(rows(OURS, THEIRS, ["actor/entropy"])) == [Row("actor/entropy", "final", (4, 0.2), None)]


def test_a_side_without_the_metric_gives_no_difference() -> None:
    assert Row("m", "final", (1, 0.5), None).difference is None
    assert (value_text(None), difference_text(None)) == ("-", "")


def test_metrics_of_either_side_are_compared_validation_first() -> None:
    other = Measured("other", [{"step": 1, "critic/score/mean": 0.5, "timing_s/step": 9.0}])
    assert compared_metrics(OURS, other) == [AVG, "critic/score/mean", "actor/entropy"]


def test_the_mean_comes_before_best_and_majority() -> None:
    names = [f"val-core/letters/acc/{name}" for name in ("best@4/mean", "maj@4/mean", "mean@4")]
    side = Measured("side", [{"step": 1, **dict.fromkeys(names, 0.5)}])
    assert compared_metrics(side) == [names[2], names[0], names[1]]


def test_values_carry_their_step_and_differences_their_sign() -> None:
    assert value_text((90, 0.804167)) == "0.8042 @90"
    assert value_text((1, 1234.5)) == "1,234 @1"
    assert [difference_text(d) for d in (0.0125, -0.0125, 0.0)] == ["+0.0125", "-0.0125", "+0.0000"]


def test_words_stand_left_and_numbers_right() -> None:
    assert aligned([["metric", "", "A"], ["m", "final", "0.5"]]) == ["metric           A", "m       final  0.5"]
