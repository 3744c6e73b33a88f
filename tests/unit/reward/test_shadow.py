import asyncio

from prometheus_client import REGISTRY

from services.reward.checkers import Reward, Unscorable, Verdict
from services.reward.scoring import Item, Scored
from services.reward.shadow import WAITING_ITEMS, Shadow


def reward(value: float) -> Reward:
    return Reward(value=value, correct=True, parsed="", format_ok=True, rule="", explanation="")


def counted(outcome: str) -> float:
    labels = {"checker": "old", "shadow": "new", "outcome": outcome}
    return REGISTRY.get_sample_value("reward_shadow_verdicts_total", labels) or 0.0


def test_agreement_is_counted_and_a_missing_reward_agrees_with_a_missing_one_only() -> None:
    seconds: dict[str, Verdict] = {"a": reward(1.0), "b": reward(0.0), "c": Unscorable(reason=""), "d": reward(0.0)}
    firsts: dict[str, Verdict] = {
        "a": reward(1.0),
        "b": reward(1.0),
        "c": Unscorable(reason="x"),
        "d": Unscorable(reason=""),
    }

    async def run() -> None:
        shadow = Shadow({"old": "new"})
        assert shadow.follows("old")
        assert not shadow.follows("new")
        done = asyncio.Semaphore(0)

        async def score(item: Item, name: str) -> Scored:
            assert name == "new"
            done.release()
            return Scored(seconds[item.id], "new@1", 0.0)

        for name, verdict in firsts.items():
            shadow.offer(Item(name, "old", "", ""), verdict)
        following = asyncio.create_task(shadow.run(score))
        for _ in firsts:
            await done.acquire()
        await asyncio.sleep(0)
        following.cancel()

    before = counted("agree"), counted("disagree")
    asyncio.run(run())
    assert (counted("agree") - before[0], counted("disagree") - before[1]) == (2, 2)


def test_a_shadow_that_fails_is_counted_and_the_next_item_is_scored() -> None:
    async def run() -> None:
        shadow = Shadow({"old": "new"})
        last = asyncio.Event()

        async def score(item: Item, name: str) -> Scored:
            if item.id == "bad":
                raise RuntimeError("no processes left")
            last.set()
            return Scored(reward(1.0), "new@1", 0.0)

        for item_id in ("bad", "good"):
            shadow.offer(Item(item_id, "old", "", ""), reward(1.0))
        following = asyncio.create_task(shadow.run(score))
        await asyncio.wait_for(last.wait(), 10)
        await asyncio.sleep(0)
        following.cancel()

    before = counted("failed"), counted("agree")
    asyncio.run(run())
    assert (counted("failed") - before[0], counted("agree") - before[1]) == (1, 1)


def test_what_does_not_fit_is_skipped_and_counted() -> None:
    before = counted("skipped")
    shadow = Shadow({"old": "new"})
    for _ in range(WAITING_ITEMS + 3):
        shadow.offer(Item("a", "old", "", ""), reward(1.0))
    assert counted("skipped") - before == 3
