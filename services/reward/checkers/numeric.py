"""A number, with or without a unit, within a tolerance."""

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import re2

from services.reward.answer_text import last_answer_tag
from services.reward.checkers import Checker, Example, Reward, Unscorable, Verdict, quoted
from services.reward.checkers.units import Unit, parse_unit

LAST_CHARACTERS = 2000
"""The number is looked for in the end of the text only."""
TOLERANCES = {"relative": 1e-4, "absolute": 0.0}
# A number, perhaps with thousands separators, a power of ten in one of two notations, and what may be a unit.
QUANTITY = re2.compile(
    r"([-+−]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+))"
    r"(?:[eE]([-+−]?[0-9]+)|\s?(?:×|x|\*|\\times)\s?10(?:\^|\*\*)?\{?([-+−]?[0-9]+|[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)\}?)?"
    r"[ ~ ]?((?:[A-Za-zµμΩÅ°%]+[-0-9⁻⁰¹²³⁴⁵⁶⁷⁸⁹^]*)(?:[ ·⋅*/](?:[A-Za-zµμΩÅ°%]+[-0-9⁻⁰¹²³⁴⁵⁶⁷⁸⁹^]*))*)?"
)
DIGITS = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")


class Quantity(NamedTuple):
    """A number as it was written, and the unit after it."""

    value: float
    unit: Unit | None
    """None if what follows the number is no unit known here."""
    text: str


class Numeric(Checker):
    """Compares the last number of the answer tag (of the whole text without one) with the answer.

    Right is |number - answer| <= absolute + relative * |answer|, both in SI units. If the answer has a unit, the
    number needs one of the same dimension; a number without any is taken to be in the answer's, unless the option
    require_unit is true. If the answer has no unit, one after the number is ignored, except for %.
    """

    name: ClassVar[str] = "numeric"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = "Compares the last number in the last <answer> tag, units converted, with a tolerance."
    accepts: ClassVar[str] = "a finite number with or without a unit, for example 42, 6.02e23 or 285.8 kJ/mol"
    options: ClassVar[Mapping[str, str]] = {
        "relative": "relative tolerance, 0.0001 by default",
        "absolute": "absolute tolerance in the answer's unit, 0 by default",
        "require_unit": "true or false (the default): whether a number without a unit is wrong if the answer has one",
    }
    examples = (
        Example("<answer>0.2858 MJ/mol</answer>", "285.8 kJ/mol", 1.0),
        Example("It is 3.14", "3.14159", 1.0, {"relative": "0.01"}),
        Example("It is 3", "3.14159", 0.0),
    )
    quick: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        expected = _answer(answer)
        if isinstance(expected, Unscorable):
            return expected
        tolerances: dict[str, float] = {}
        for name, default in TOLERANCES.items():
            tolerances[name] = _tolerance(options.get(name, ""), default)
            if math.isnan(tolerances[name]):
                return Unscorable(reason=f"option {name} = {quoted(options[name])}; numeric takes a number from 0")
        if options.get("require_unit", "false") not in ("true", "false"):
            return Unscorable(reason=f"option require_unit = {quoted(options['require_unit'])}; give true or false")

        text, rule = last_answer_tag(completion)
        found = _last_quantity(text[-LAST_CHARACTERS:])
        if found is None:
            return _reward(False, "", "no_number", f"no number in {quoted(text)}")
        problem = _compare(found, expected, tolerances, options.get("require_unit") == "true")
        return _reward(not problem, found.text, rule, problem or f"{found.text} is {expected.text}, within tolerance")


def _answer(answer: str) -> Quantity | Unscorable:
    match = QUANTITY.fullmatch(answer.strip()) if len(answer) <= LAST_CHARACTERS else None
    found = _quantity(match) if match else None
    if found is None or found.unit is None or not math.isfinite(found.value):
        return Unscorable(
            reason=f"answer = {quoted(answer)}; numeric needs a finite number with or without a known unit"
        )
    return found


def _last_quantity(text: str) -> Quantity | None:
    last = None
    for match in QUANTITY.finditer(text):
        # After a digit it is a hyphen, as in "pages 2-3".
        hyphen = text[max(0, match.start() - 1) : match.start()].isdecimal()
        last = _quantity(match, hyphen=hyphen) or last
    return last


def _quantity(match: "re2._Match", hyphen: bool = False) -> Quantity | None:
    number, plain, power, unit = match.groups()
    digits = number.translate(DIGITS).replace(",", "")
    digits = digits.lstrip("+-") if hyphen else digits
    exponent = (plain or power or "0").translate(DIGITS)
    try:
        value = float(f"{digits}e{exponent}")
    except ValueError:
        return None
    return Quantity(value, parse_unit(unit or ""), match.group().strip())


def _compare(found: Quantity, expected: Quantity, tolerances: Mapping[str, float], require_unit: bool) -> str:
    """Why the quantity is wrong; empty if it is right."""
    unit, wanted = found.unit, expected.unit
    assert wanted is not None, "an answer without a known unit was refused"
    bare = unit is not None and unit == parse_unit("")
    has_dimension = wanted != parse_unit("")
    if not has_dimension and (unit is None or any(unit.dimension)):
        unit = wanted
    elif bare and has_dimension:
        if require_unit:
            return f"{found.text} has no unit, {expected.text} has one"
        unit = wanted
    if unit is None or unit.dimension != wanted.dimension:
        return f"{found.text} is not of the dimension of {expected.text}"
    value = found.value * unit.factor + unit.offset
    right = expected.value * wanted.factor + wanted.offset
    # The tolerances are those of the answer as it stands: 1 % of 20 °C is 0.2 K.
    allowed = (tolerances["absolute"] + tolerances["relative"] * abs(expected.value)) * wanted.factor
    rounding = 1e-12 * max(abs(value), abs(right))
    if math.isfinite(value) and abs(value - right) <= allowed + rounding:
        return ""
    return f"{found.text} is not {expected.text}, within a tolerance of {allowed:.6g} in SI units"


def _tolerance(text: str, default: float) -> float:
    """NaN for what is no tolerance."""
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if 0 <= value < math.inf else math.nan


def _reward(correct: bool, parsed: str, rule: str, explanation: str) -> Reward:
    return Reward(
        value=1.0 if correct else 0.0,
        correct=correct,
        parsed=parsed,
        format_ok=rule == "last_answer_tag",
        rule=rule,
        explanation=explanation,
    )
