"""Where items are scored, and in which order they come back; worker processes are in the integration tests."""

import asyncio
import json

import pytest

from services.reward.admission import Admission
from services.reward.checkers import Reward, Unscorable
from services.reward.discovery import load_checkers
from services.reward.isolation.pool import WorkerPool
from services.reward.scorer import Scorer
from services.reward.scoring import Item, Scored


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
