"""Units of measurement as factors to SI and exponents of the base units."""

import re
from dataclasses import dataclass

LONGEST_UNIT = 60

Dimension = tuple[int, int, int, int, int, int, int]
"""Exponents of m, kg, s, A, K, mol, cd."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A quantity in this unit is `value * factor + offset` in SI units."""

    factor: float
    dimension: Dimension
    offset: float = 0.0


NO_UNIT = Unit(1.0, (0, 0, 0, 0, 0, 0, 0))

_BASE: dict[str, Unit] = {
    "m": Unit(1.0, (1, 0, 0, 0, 0, 0, 0)),
    "g": Unit(1e-3, (0, 1, 0, 0, 0, 0, 0)),
    "s": Unit(1.0, (0, 0, 1, 0, 0, 0, 0)),
    "A": Unit(1.0, (0, 0, 0, 1, 0, 0, 0)),
    "K": Unit(1.0, (0, 0, 0, 0, 1, 0, 0)),
    "mol": Unit(1.0, (0, 0, 0, 0, 0, 1, 0)),
    "cd": Unit(1.0, (0, 0, 0, 0, 0, 0, 1)),
    "Hz": Unit(1.0, (0, 0, -1, 0, 0, 0, 0)),
    "N": Unit(1.0, (1, 1, -2, 0, 0, 0, 0)),
    "Pa": Unit(1.0, (-1, 1, -2, 0, 0, 0, 0)),
    "J": Unit(1.0, (2, 1, -2, 0, 0, 0, 0)),
    "W": Unit(1.0, (2, 1, -3, 0, 0, 0, 0)),
    "C": Unit(1.0, (0, 0, 1, 1, 0, 0, 0)),
    "V": Unit(1.0, (2, 1, -3, -1, 0, 0, 0)),
    "F": Unit(1.0, (-2, -1, 4, 2, 0, 0, 0)),
    "Ω": Unit(1.0, (2, 1, -3, -2, 0, 0, 0)),
    "T": Unit(1.0, (0, 1, -2, -1, 0, 0, 0)),
    "L": Unit(1e-3, (3, 0, 0, 0, 0, 0, 0)),
    "M": Unit(1e3, (-3, 0, 0, 0, 0, 1, 0)),
    "eV": Unit(1.602176634e-19, (2, 1, -2, 0, 0, 0, 0)),
    "cal": Unit(4.184, (2, 1, -2, 0, 0, 0, 0)),
    "bar": Unit(1e5, (-1, 1, -2, 0, 0, 0, 0)),
    "Da": Unit(1.66053906892e-27, (0, 1, 0, 0, 0, 0, 0)),
}
_ALONE: dict[str, Unit] = {
    "min": Unit(60.0, (0, 0, 1, 0, 0, 0, 0)),
    "h": Unit(3600.0, (0, 0, 1, 0, 0, 0, 0)),
    "d": Unit(86400.0, (0, 0, 1, 0, 0, 0, 0)),
    "atm": Unit(101325.0, (-1, 1, -2, 0, 0, 0, 0)),
    "mmHg": Unit(133.322387415, (-1, 1, -2, 0, 0, 0, 0)),
    "Å": Unit(1e-10, (1, 0, 0, 0, 0, 0, 0)),
    "u": Unit(1.66053906892e-27, (0, 1, 0, 0, 0, 0, 0)),
    "°C": Unit(1.0, (0, 0, 0, 0, 1, 0, 0), 273.15),
    "°F": Unit(5 / 9, (0, 0, 0, 0, 1, 0, 0), 459.67 * 5 / 9),
    "%": Unit(0.01, NO_UNIT.dimension),
    "ohm": _BASE["Ω"],
    "l": _BASE["L"],
}
_PREFIXES = {
    "f": 1e-15, "p": 1e-12, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "μ": 1e-6, "m": 1e-3, "c": 1e-2, "d": 1e-1, "k": 1e3,
    "M": 1e6, "G": 1e9, "T": 1e12,
}  # fmt: skip
_FACTOR = re.compile(r"([A-Za-zµμΩÅ°%]{1,8})(?:\^|\*\*)?(-?[0-9]|)")
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def parse_unit(text: str) -> Unit | None:
    """The unit that the text names, such as `kJ/mol`, `m s^-2` or `°C`; None if it names none that is known here.

    Factors are separated by blanks, `*`, `·` or `/`; a `/` divides by the one factor after it.
    """
    text = text.strip().translate(_SUPERSCRIPTS)
    if not text:
        return NO_UNIT
    if len(text) > LONGEST_UNIT:
        return None
    if text in _ALONE:
        return _ALONE[text]
    factor, dimension, sign = 1.0, [0] * 7, 1
    for token in re.split(r"(/)|(?<!\*)[\s·⋅*]+(?!\*)", text):
        if token == "/":
            sign = -1
        elif token:
            found = _power(token, sign)
            if found is None:
                return None
            factor *= found.factor
            dimension = [old + new for old, new in zip(dimension, found.dimension, strict=True)]
            sign = 1
    return Unit(factor, tuple(dimension))  # type: ignore[arg-type]  # seven of them


def _power(token: str, sign: int) -> Unit | None:
    match = _FACTOR.fullmatch(token)
    unit = _simple(match.group(1)) if match else None
    if match is None or unit is None or unit.offset:
        return None
    exponent = sign * int(match.group(2) or 1)
    dimension = tuple(exponent * one for one in unit.dimension)
    return Unit(unit.factor**exponent, dimension)  # type: ignore[arg-type]  # seven of them


def _simple(symbol: str) -> Unit | None:
    if known := _BASE.get(symbol) or _ALONE.get(symbol):
        return known
    base = _BASE.get(symbol[1:])
    if base is None or symbol[0] not in _PREFIXES:
        return None
    return Unit(base.factor * _PREFIXES[symbol[0]], base.dimension)
