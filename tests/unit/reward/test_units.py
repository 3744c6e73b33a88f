import pytest

from services.reward.checkers.units import NO_UNIT, parse_unit


@pytest.mark.parametrize(
    ("one", "same"),
    [("N", "kg m s^-2"), ("L", "dm³"), ("J", "N·m"), ("Pa", "N/m^2"), ("mM", "mol/m³"), ("Ω", "V/A"), ("µm", "um")],
)
def test_one_unit_can_be_written_in_several_ways(one: str, same: str) -> None:
    left, right = parse_unit(one), parse_unit(same)
    assert left is not None
    assert right is not None
    assert left.dimension == right.dimension
    assert left.factor == pytest.approx(right.factor)


def test_no_text_is_no_unit_and_what_is_unknown_or_too_long_is_none() -> None:
    assert parse_unit(" ") is NO_UNIT
    assert parse_unit("m^99") is None
    assert parse_unit("m " * 100) is None
