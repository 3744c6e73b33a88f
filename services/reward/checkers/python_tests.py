"""Runs the program in the completion."""

from collections.abc import Mapping
from typing import ClassVar

import msgspec

from services.reward.checkers import Checker, Example, Limits, Reward, Unscorable, Verdict, quoted
from services.reward.isolation.program import Ended, run_program

LANGUAGES = ("", "python", "python3", "py")
MAX_CASES = 100
PROGRAM = Limits(seconds=5.0, memory_mib=256)


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run of the program: what it reads and what it has to print."""

    input: str
    output: str


class PythonTests(Checker):
    """Runs the last fenced block of the completion (the whole text without one), confined, against the answer.

    mode `asserts`: the answer is Python that runs after the program in the same namespace; any exception is a
    failure. The tests share their process with the program, which can therefore lie about them.
    mode `stdin`: the answer is JSON, a list of {"input", "output"}; what the program prints is compared outside of
    its process, blanks at line ends and the end aside.

    A program that fails, crashes, or runs out of time or memory has reward 0: that is what it was tested for.
    """

    name: ClassVar[str] = "python_tests"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = "Runs the program in the completion, confined, and tests what it does."
    accepts: ClassVar[str] = 'Python with asserts, or with mode=stdin JSON: [{"input": "2\\n", "output": "4\\n"}]'
    options: ClassVar[Mapping[str, str]] = {
        "mode": "asserts (the default) or stdin",
        "partial": "true or false (the default): with mode=stdin, the reward is the share of cases that pass",
        "case_limit_s": "seconds that the program, or each case of mode=stdin, may take; 5 by default",
    }
    examples = (
        Example("```python\ndef double(x):\n    return 2 * x\n```", "assert double(2) == 4", 1.0),
        Example("print(2 * int(input()))", '[{"input": "2", "output": "4"}]', 1.0, {"mode": "stdin"}),
        Example("while True: pass", "assert True", 0.0, {"case_limit_s": "0.2"}),
    )
    limits: ClassVar[Limits] = Limits(seconds=20.0, starts_processes=True)

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        mode, partial = options.get("mode", "asserts"), options.get("partial", "false")
        if mode not in ("asserts", "stdin") or partial not in ("true", "false"):
            return Unscorable(
                reason=f"options mode = {quoted(mode)}, partial = {quoted(partial)}; python_tests takes asserts or "
                "stdin, and true or false"
            )
        limits = _limits(options.get("case_limit_s", f"{PROGRAM.seconds}"))
        if limits is None:
            return Unscorable(
                reason=f"option case_limit_s = {quoted(options['case_limit_s'])}; give 0.01 to 60 seconds"
            )
        program, rule = _program(completion)
        if mode == "asserts":
            if not answer.strip():
                return Unscorable(reason="answer is empty; python_tests needs the code that tests the program")
            ended = run_program([program, answer], b"", limits, may_exit=False)
            passed = ended.how == "passed"
            return _reward(float(passed), program, rule, ended.detail or "all tests pass")
        return _run_cases(program, rule, answer, limits, partial == "true")


def _limits(text: str) -> Limits | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return Limits(seconds=seconds, memory_mib=PROGRAM.memory_mib) if 0.01 <= seconds <= 60 else None


def _program(completion: str) -> tuple[str, str]:
    blocks = [block for block in completion.split("```")[1::2] if block.strip()]
    if not blocks:
        return completion, "whole_text"
    language, newline, program = blocks[-1].partition("\n")
    named = newline and language.strip() in LANGUAGES
    return (program if named else blocks[-1]), "last_fenced_block"


def _run_cases(program: str, rule: str, answer: str, limits: Limits, partial: bool) -> Verdict:
    try:
        cases = msgspec.json.decode(answer, type=list[Case])
    except (msgspec.DecodeError, RecursionError) as error:
        return Unscorable(reason=f"answer = {quoted(answer)} is no list of input and output: {error}")
    if not 1 <= len(cases) <= MAX_CASES:
        return Unscorable(reason=f"answer has {len(cases)} cases; python_tests takes 1 to {MAX_CASES}")
    passed, problem = 0, ""
    for index, case in enumerate(cases):
        ended = run_program([program], case.input.encode(), limits, may_exit=True)
        wrong = _mismatch(ended, case)
        passed += not wrong
        problem = problem or (wrong and f"case {index}: {wrong}")
        if wrong and not partial:
            break
    value = passed / len(cases) if partial else float(passed == len(cases))
    return _reward(value, program, rule, problem or f"all {len(cases)} cases pass")


def _mismatch(ended: Ended, case: Case) -> str:
    if ended.how not in ("passed", "ended_early"):
        return ended.detail
    printed = ended.stdout.decode(errors="replace")
    return (
        "" if _lines(printed) == _lines(case.output) else f"printed {quoted(printed)}, expected {quoted(case.output)}"
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _reward(value: float, program: str, rule: str, explanation: str) -> Reward:
    return Reward(
        value=value,
        correct=value == 1.0,
        parsed=program,
        format_ok=rule == "last_fenced_block",
        rule=rule,
        explanation=explanation.encode(errors="backslashreplace").decode(),
    )
