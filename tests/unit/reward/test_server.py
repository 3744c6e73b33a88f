"""The responses that the gRPC face writes by hand are the protobuf messages that they stand for."""

from hypothesis import given
from hypothesis import strategies as st

from retort.proto.reward.v1 import reward_pb2
from services.reward.checkers import Reward, Unscorable
from services.reward.scoring import Scored
from services.reward.server import _decoder, _written

TEXT = st.text(max_size=300)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
REWARDS = st.builds(
    Reward, value=FINITE, correct=st.booleans(), parsed=TEXT, format_ok=st.booleans(), rule=TEXT, explanation=TEXT
)
SCORED = st.builds(Scored, REWARDS | st.builds(Unscorable, reason=TEXT), TEXT, st.floats(0, 1e6))


@given(st.lists(st.tuples(TEXT, SCORED), max_size=5))
def test_what_is_written_is_read_as_the_same_results(pairs: list[tuple[str, Scored]]) -> None:
    # Twice each, so that what the writer remembers is used.
    twice = [*pairs, *pairs]
    written = _written([item_id for item_id, _ in twice], [scored for _, scored in twice])
    response = reward_pb2.ScoreResponse.FromString(written)
    assert len(response.results) == 2 * len(pairs)
    for result, (item_id, scored) in zip(response.results, twice, strict=True):
        verdict = scored.verdict
        assert (result.id, result.checker, result.seconds) == (item_id, scored.checker, scored.seconds)
        if isinstance(verdict, Reward):
            reward = result.reward
            assert (reward.value, reward.correct, reward.parsed) == (verdict.value, verdict.correct, verdict.parsed)
            assert (reward.format_ok, reward.rule) == (verdict.format_ok, verdict.rule)
            assert (result.WhichOneof("outcome"), reward.explanation) == ("reward", verdict.explanation)
        else:
            assert (result.WhichOneof("outcome"), result.unscorable.reason) == ("unscorable", verdict.reason)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_none(data: bytes) -> None:
    assert isinstance(_decoder(reward_pb2.ScoreRequest)(data), reward_pb2.ScoreRequest | None)
