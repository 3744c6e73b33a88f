from pathlib import Path

import pytest

from retort.cli.published import read_published
from retort.config import ConfigError

CARD = Path(__file__).parents[3] / "reference" / "qwen3-4b-sciknoweval.toml"
MINIMAL = 'title = "t"\nsource = "s"\nsteps = 2\n'


def test_the_model_cards_table_is_pinned() -> None:
    peak, final = read_published(CARD).metrics
    prefix = "val-core/sciknoweval/acc/"
    assert [peak["step"], *(peak[prefix + name] for name in ("mean@16", "best@16/mean", "maj@16/mean"))] == [
        90,
        0.804167,
        0.855981,
        0.806176,
    ]
    assert [final["step"], *(final[prefix + name] for name in ("mean@16", "best@16/mean", "maj@16/mean"))] == [
        100,
        0.789286,
        0.855124,
        0.795124,
    ]
    assert final["critic/score/mean"] == final["critic/rewards/mean"] == 0.905762


def test_the_published_shares_are_whole_numbers_of_completions() -> None:
    peak, final = (line["val-core/sciknoweval/acc/mean@16"] for line in read_published(CARD).metrics)
    assert (round(peak * 210 * 16), round(final * 210 * 16)) == (2702, 2652)
    assert (peak, final) == (round(2702 / 3360, 6), round(2652 / 3360, 6))
    assert read_published(CARD).metrics[-1]["critic/score/mean"] == round(1855 / 2048, 6)


def test_the_band_is_about_two_standard_errors_round_the_final_value() -> None:
    (band,) = read_published(CARD).bands
    final = read_published(CARD).metrics[-1][band.metric]
    assert (band.low, band.high) == (round(final - 2 * 0.026, 2), round(final + 2 * 0.026, 2))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("title = ", "Invalid value"),
        (MINIMAL, "measured: Field required"),
        (MINIMAL + "measured = []", "measured: List should have at least 1 item"),
        (MINIMAL + "[[measured]]\nloss = 1.0", "every .* needs a `step`"),
        (MINIMAL + "[[measured]]\nstep = 2\n[[measured]]\nstep = 1", r"steps ascend; found \[2.0, 1.0\]"),
        (MINIMAL + "colour = 1\n[[measured]]\nstep = 1", "colour: Extra inputs"),
    ],
)
def test_another_file_is_refused_in_words(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "card.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_published(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read the published run"):
        read_published(tmp_path / "none.toml")
