import pytest

from services.reward.checkers import Reward, Unscorable
from services.reward.checkers.numeric import Numeric
from services.reward.checkers.units import parse_unit


@pytest.mark.parametrize(
    ("completion", "answer", "options", "value"),
    [
        ("6.02×10^23", "6.02e23", {}, 1.0),
        ("36 km/h", "10 m/s", {}, 1.0),
        ("25 °C", "298.15 K", {}, 1.0),
        ("0.5 kg m^-3", "500 g/m³", {}, 1.0),
        ("50 %", "0.5", {}, 1.0),
        ("1,234.5", "1234.5", {}, 1.0),
        ("pages 2-3", "3", {}, 1.0),
        ("4 apples", "4", {}, 1.0),
        ("<answer>3</answer> or 4", "3", {}, 1.0),
        ("3.15", "3.14", {"relative": "0.01"}, 1.0),  # 0.01 is within 0.0314
        ("3.18", "3.14", {"relative": "0.01"}, 0.0),  # 0.04 is not
        ("20 °C", "21 °C", {"absolute": "1.5"}, 1.0),
        ("5", "5 mol", {}, 1.0),
        ("5", "5 mol", {"require_unit": "true"}, 0.0),
        ("5 s", "5 m", {}, 0.0),
        ("1e999", "5", {}, 0.0),
        ("nan", "5", {}, 0.0),
    ],
)
def test_the_last_number_counts_with_its_unit(
    completion: str, answer: str, options: dict[str, str], value: float
) -> None:
    verdict = Numeric().check(completion, answer, options)
    assert isinstance(verdict, Reward)
    assert verdict.value == value, verdict.explanation


@pytest.mark.parametrize("answer", ["", "nan", "inf", "-inf", "1e999", "five", "5 parsecs", "5 6"])
def test_an_answer_that_is_no_finite_number_with_a_known_unit_is_unscorable(answer: str) -> None:
    assert isinstance(Numeric().check("5", answer, {}), Unscorable)


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf", "much"])
def test_a_tolerance_that_is_none_is_unscorable(tolerance: str) -> None:
    assert isinstance(Numeric().check("5", "5", {"relative": tolerance}), Unscorable)


def test_a_unit_is_a_factor_and_exponents_of_the_base_units() -> None:
    unit = parse_unit("kJ/mol")
    assert unit is not None
    assert (unit.factor, unit.dimension) == (1000.0, (2, 1, -2, 0, 0, -1, 0))
    assert parse_unit("furlong") is None
