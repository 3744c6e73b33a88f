"""Where items are scored, and in which order they come back; worker processes are in the integration tests."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import ClassVar

import pytest

from services.reward import scorer
from services.reward.admission import Admission, FullError
from services.reward.checkers import Checker, Reward, Unscorable, Verdict
from services.reward.discovery import load_checkers
from services.reward.isolation.pool import WorkerPool
from services.reward.scorer import IMMEDIATE_ITEMS, Scorer
from services.reward.scoring import Item, Scored
from tests.reward_service import ROOT


def score(*items: Item) -> list[Scored]:
    async def run() -> list[Scored]:
        return await Scorer(load_checkers([]), WorkerPool(), Admission()).score(items)

    return asyncio.run(run())


def test_verdicts_come_in_the_order_of_the_items_wherever_they_were_scored() -> None:
    parts = json.dumps([{"checker": "mcq", "answer": "B"}, {"checker": "exact_match", "answer": "C"}])
    items = [Item("1", "composite", "B", parts), Item("2", "mcq", "B", "B"), Item("3", "mqc", "B", "B")]
    first, second, third = score(*items)
    assert isinstance(first.verdict, Reward)
    assert (first.verdict.value, first.checker) == (0.5, "composite@1")
    assert isinstance(second.verdict, Reward)
    assert (second.verdict.value, second.checker) == (1.0, "mcq@1")
    assert (type(third.verdict), third.checker) == (Unscorable, "")


def test_a_batch_calls_no_audit_hook_for_each_item() -> None:
    """id() does, and so cost a sixth of the rate: retort/unpickling.py has a hook."""
    program = """
import asyncio, sys
from services.reward.admission import Admission
from services.reward.checkers.mcq import MultipleChoice
from services.reward.isolation.pool import WorkerPool
from services.reward.scorer import Scorer
from services.reward.scoring import Item
from services.reward.server import _written

events = []
sys.addaudithook(lambda event, arguments: events.append(event))

async def score():
    items = [Item(str(n), "mcq", "<answer>B</answer>", "ABCD"[n % 4]) for n in range(256)]
    scorer = Scorer({"mcq": MultipleChoice()}, WorkerPool(), Admission())
    await scorer.score(items)  # also makes what the first batch makes
    before = len(events)
    _written([item.id for item in items], await scorer.score(items))
    print(len(events) - before)

asyncio.run(score())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(ran.stdout) < 50


@pytest.mark.parametrize("limit", ["0", "-1", "61", "nan", "soon"])
def test_a_time_limit_that_is_none_is_unscorable(limit: str) -> None:
    (scored,) = score(Item("1", "math", "5", "5", {"time_limit_s": limit}))
    assert scored.verdict == Unscorable(reason=f"option time_limit_s = {limit!r}; give seconds, at most 60")


def test_a_text_that_no_worker_could_read_is_unscorable() -> None:
    long, broken = score(Item("1", "math", "5" * (2 << 20), "5"), Item("2", "math", "\ud800", "5"))
    assert isinstance(long.verdict, Unscorable)
    assert long.verdict.reason == "completion has 2097152 characters; math takes 1048576"
    assert isinstance(broken.verdict, Unscorable)
    assert broken.verdict.reason.startswith("completion has a lone surrogate")


class Huge(Checker):
    name, version, description, quick = "huge", "1", "", True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        return Reward(value=1e308, correct=True, parsed="", format_ok=True, rule="", explanation="")


class Hangs(Huge):
    name = "hangs"

    def __init__(self) -> None:
        self.go = threading.Event()

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        self.go.wait(30)
        return super().check(completion, answer, options)


def test_every_batch_has_its_line_whatever_became_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[tuple[object, object]] = []
    monkeypatch.setattr(scorer, "log_event", lambda _, outcome, items, **__: outcomes.append((outcome, items)))

    async def run() -> None:
        hangs = Hangs()
        service = Scorer({"hangs": hangs, "huge": Huge()}, WorkerPool(), Admission(max_items=2))
        await service.score([Item("1", "huge", "", "")])
        leaves = asyncio.create_task(service.score([Item("1", "hangs", "", ""), Item("2", "hangs", "", "")]))
        await asyncio.sleep(0)
        with pytest.raises(FullError):
            await service.score([Item("1", "huge", "", "")])
        leaves.cancel()
        await asyncio.wait([leaves])
        hangs.go.set()

    asyncio.run(run())
    assert outcomes == [("scored", 1), ("refused", 1), ("cancelled", 2)]


def test_a_composite_that_is_not_finite_is_unscorable() -> None:
    parts = json.dumps([{"checker": "huge", "answer": "", "weight": 1000}])

    async def run() -> list[Scored]:
        checkers = {**load_checkers([]), "huge": Huge()}
        return await Scorer(checkers, WorkerPool(), Admission()).score([Item("1", "composite", "", parts)])

    (scored,) = asyncio.run(run())
    assert scored.verdict == Unscorable(reason="composite returned a reward that is not a finite number")


class Where(Checker):
    """Says in which thread it was called."""

    name, version, description, quick = "where", "1", "", True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        where = "loop" if threading.current_thread() is threading.main_thread() else "thread"
        return Reward(value=1.0, correct=True, parsed=where, format_ok=True, rule="", explanation="")


class WhereAtOnce(Where):
    name: ClassVar[str] = "where_at_once"
    immediate: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("checker", "items", "characters", "where"),
    [
        ("where_at_once", 1, 1, "loop"),
        ("where_at_once", IMMEDIATE_ITEMS, 1, "loop"),
        ("where_at_once", IMMEDIATE_ITEMS + 1, 1, "thread"),
        ("where_at_once", 2, 1_000_001, "thread"),
        ("where", 1, 1, "thread"),
    ],
)
def test_only_small_batches_of_immediate_checkers_hold_up_the_event_loop(
    checker: str, items: int, characters: int, where: str
) -> None:
    async def run() -> list[Scored]:
        scorer = Scorer({"where": Where(), "where_at_once": WhereAtOnce()}, WorkerPool(), Admission())
        return await scorer.score([Item(str(n), checker, "x" * characters, "") for n in range(items)])

    verdicts = [one.verdict for one in asyncio.run(run())]
    assert {verdict.parsed for verdict in verdicts if isinstance(verdict, Reward)} == {where}
