"""What holds for every built-in checker: its examples, and that any input gets a verdict."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward.checkers import Checker, Example, Reward, Unscorable, defect
from services.reward.discovery import load_checkers
from services.reward.scoring import check
from tests.hostile_texts import TEXT

CHECKERS = load_checkers([])
EXAMPLES = [(checker, example) for checker in CHECKERS.values() for example in checker.examples]
IN_PROCESS = [checker for checker in CHECKERS.values() if checker.quick or checker.name in ("json_schema", "regex")]


@pytest.mark.parametrize(("checker", "example"), EXAMPLES, ids=[f"{c.name}-{c.examples.index(e)}" for c, e in EXAMPLES])
def test_every_example_has_the_reward_that_it_promises(checker: Checker, example: Example) -> None:
    if checker.name == "composite":
        pytest.skip("runs in the service only; see test_composite")
    verdict = check(checker, example.completion, example.answer, example.options or {})
    assert isinstance(verdict, Reward), verdict
    assert verdict.value == example.reward


@pytest.mark.parametrize("checker", IN_PROCESS, ids=lambda checker: checker.name)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_input_gets_a_verdict(checker: Checker, data: st.DataObject) -> None:
    options = data.draw(
        st.dictionaries(st.sampled_from(sorted(checker.options)), TEXT) if checker.options else st.just({})
    )
    verdict = check(checker, data.draw(TEXT), data.draw(TEXT), options)
    assert isinstance(verdict, Reward | Unscorable)
    assert defect(verdict) == ""


@pytest.mark.parametrize("checker", IN_PROCESS, ids=lambda checker: checker.name)
def test_an_unknown_option_is_unscorable(checker: Checker) -> None:
    verdict = check(checker, "a", "b", {"colour": "red"})
    assert isinstance(verdict, Unscorable)
    assert verdict.reason.startswith(f"{checker.name} has no option colour") or "option" in verdict.reason
