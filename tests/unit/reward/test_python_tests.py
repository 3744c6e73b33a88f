import json

import pytest

from services.reward.checkers import Reward, Unscorable, Verdict
from services.reward.checkers.python_tests import PythonTests

CASES = json.dumps([{"input": "1\n", "output": "2\n"}, {"input": "2\n", "output": "4"}])


def check(completion: str, answer: str, **options: str) -> Verdict:
    return PythonTests().check(completion, answer, {"case_limit_s": "1", **options})


def value(completion: str, answer: str, **options: str) -> float:
    verdict = check(completion, answer, **options)
    assert isinstance(verdict, Reward), verdict
    return verdict.value


def test_the_last_fenced_block_is_the_program() -> None:
    completion = "First\n```python\nraise SystemExit\n```\nthen\n```python\ndef f(): return 1\n```\ndone"
    assert value(completion, "assert f() == 1") == 1.0
    assert value("def f(): return 1", "assert f() == 1") == 1.0


@pytest.mark.parametrize("program", ["def f(): return 2", "def f(:", "import os; os._exit(0)", "exit()", "1 / 0", ""])
def test_a_program_that_fails_its_tests_has_reward_0(program: str) -> None:
    assert value(program, "assert f() == 1") == 0.0


def test_with_stdin_every_case_has_to_print_its_output() -> None:
    assert value("print(2 * int(input()))", CASES, mode="stdin") == 1.0
    assert value("print(2)", CASES, mode="stdin") == 0.0
    assert value("print(2)", CASES, mode="stdin", partial="true") == 0.5


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ("", {}),
        ("[]", {"mode": "stdin"}),
        ("x", {"mode": "stdin"}),
        ("assert 1", {"mode": "shell"}),
        ("assert 1", {"case_limit_s": "nan"}),
    ],
)
def test_what_cannot_be_tested_is_unscorable(answer: str, options: dict[str, str]) -> None:
    assert isinstance(check("x = 1", answer, **options), Unscorable)
