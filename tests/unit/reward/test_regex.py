import time

import pytest

from services.reward.checkers import Reward, Unscorable
from services.reward.checkers.regex import Regex
from services.reward.scoring import check


@pytest.mark.parametrize(
    ("pattern", "options", "value"),
    [
        ("hel", {}, 1.0),
        ("hel", {"mode": "fullmatch"}, 0.0),
        ("HELIUM", {"mode": "fullmatch", "ignore_case": "true"}, 1.0),
        ("neon", {}, 0.0),
    ],
)
def test_the_completion_has_to_match(pattern: str, options: dict[str, str], value: float) -> None:
    verdict = Regex().check("helium", pattern, options)
    assert isinstance(verdict, Reward)
    assert verdict.value == value


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(.*)*x", "a{1,100}{1,9}$"])
def test_a_pattern_that_backtracks_elsewhere_takes_no_time(pattern: str) -> None:
    started = time.process_time()
    Regex().check("a" * 100_000 + "!", pattern, {})
    assert time.process_time() - started < 1


@pytest.mark.parametrize("pattern", ["", "(", "(?=a)", r"(a)\1", "a" * 2001, "a{1000}{1000}", "\ud800"])
def test_what_is_no_pattern_is_unscorable(pattern: str) -> None:
    assert isinstance(check(Regex(), "a", pattern, {}), Unscorable)
