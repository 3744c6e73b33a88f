from services.reward.cache import LONGEST_TEXT, VerdictCache, content_key
from services.reward.checkers import Reward, Unscorable
from services.reward.checkers.mcq import MultipleChoice
from services.reward.checkers.mcq_lenient import LenientMultipleChoice

MCQ = MultipleChoice()


def reward(parsed: str = "B") -> Reward:
    return Reward(value=1.0, correct=True, parsed=parsed, format_ok=True, rule="r", explanation="")


def test_equal_items_have_one_key_and_different_ones_do_not() -> None:
    key = content_key(MCQ, "ab", "c", {"x": "1", "y": "2"})
    assert key == content_key(MCQ, "ab", "c", {"y": "2", "x": "1"})
    others = {
        content_key(MCQ, "a", "bc", {"x": "1", "y": "2"}),
        content_key(MCQ, "ab", "c", {"x": "1"}),
        content_key(MCQ, "ab", "c", {"x": "12", "y": ""}),
        content_key(LenientMultipleChoice(), "ab", "c", {"x": "1", "y": "2"}),
    }
    assert len(others | {key}) == 5


def test_a_reward_is_remembered_and_an_unscorable_or_a_long_one_is_not() -> None:
    cache = VerdictCache()
    cache.put(b"1", reward())
    cache.put(b"2", Unscorable(reason="took too long"))
    cache.put(b"3", reward("x" * (LONGEST_TEXT + 1)))
    assert [cache.find(key) for key in (b"1", b"2", b"3")] == [reward(), None, None]
