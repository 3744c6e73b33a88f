"""Whatever a checker does, its item gets a verdict."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest

from services.reward.checkers import Checker, Reward, Unscorable, Verdict
from services.reward.scoring import MAX_ERROR_CHARACTERS, check


class Custom(Checker):
    """A checker whose code is given."""

    name, version, description = "custom", "3", ""
    options: ClassVar[Mapping[str, str]] = {"scale": "a number"}

    def __init__(self, body: Callable[[str], Any]) -> None:
        self.body = body

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        return self.body(completion)


def a_reward(**changes: Any) -> Reward:
    values = {
        "value": 0.5,
        "correct": True,
        "parsed": "x",
        "format_ok": True,
        "rule": "r",
        "explanation": "e",
    }
    return Reward(**values | changes)


def verdict_of(body: Callable[[str], Any], **options: str) -> Verdict:
    return check(Custom(body), "text", "", options)


def unscorable_reason(body: Callable[[str], Any], **options: str) -> str:
    verdict = verdict_of(body, **options)
    assert isinstance(verdict, Unscorable)
    return verdict.reason


def test_an_unknown_option_is_unscorable_and_a_known_one_is_not() -> None:
    assert verdict_of(lambda _: a_reward(), scale="2") == a_reward()
    assert unscorable_reason(lambda _: a_reward(), scael="2") == "custom has no option scael; known: scale"


def test_an_exception_is_unscorable_and_described() -> None:
    assert unscorable_reason(lambda _: 1 / 0) == "custom raised ZeroDivisionError: division by zero"


def test_an_exception_that_cannot_be_sent_or_is_too_long_is_described_all_the_same() -> None:
    def raise_(text: str) -> None:
        raise ValueError(text)

    assert unscorable_reason(lambda _: raise_("\ud800")) == "custom raised ValueError: \\ud800"
    assert len(unscorable_reason(lambda _: raise_("x" * 10**6))) <= MAX_ERROR_CHARACTERS + len("custom raised ")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_what_would_end_the_service_costs_its_item_only(error: type[BaseException]) -> None:
    def raise_(_: str) -> None:
        raise error

    assert unscorable_reason(raise_).startswith("custom raised ")


def test_an_integer_as_a_reward_is_sent_as_a_number() -> None:
    verdict = verdict_of(lambda _: a_reward(value=2**70))
    assert isinstance(verdict, Reward)
    assert (verdict.value, type(verdict.value)) == (2.0**70, float)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 10**400, "1", None, True])
def test_a_reward_that_is_not_a_finite_number_is_unscorable(value: float) -> None:
    assert "not a finite number" in unscorable_reason(lambda _: a_reward(value=value))


def test_a_lone_surrogate_in_the_parsed_answer_is_unscorable() -> None:
    assert "parsed" in unscorable_reason(lambda _: a_reward(parsed="\udfff"))


def test_a_bare_number_is_no_verdict() -> None:
    assert unscorable_reason(lambda _: 1.0) == "custom returned float, neither Reward nor Unscorable"
