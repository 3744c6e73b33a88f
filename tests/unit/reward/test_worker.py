import socket
import threading

import pytest

from services.reward.checkers import Reward, Unscorable, Verdict
from services.reward.isolation.worker import LENGTH, Question, _receive, decode_verdict, frame


@pytest.mark.parametrize(
    "verdict",
    [
        Reward(value=0.5, correct=True, parsed="é\x00", format_ok=False, rule="r", explanation="e" * 100_000),
        Unscorable(reason="why"),
    ],
)
def test_a_verdict_travels_as_it_is(verdict: Verdict) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sending = threading.Thread(target=theirs.sendall, args=(frame(verdict),))
        sending.start()
        assert decode_verdict(_receive(ours)) == verdict
        sending.join()


def test_half_a_frame_and_a_closed_socket_are_the_end() -> None:
    whole = frame(Question("a", "b", {}, 1.0))
    assert LENGTH.unpack(whole[:4])[0] == len(whole) - 4
    for sent in (b"", whole[:2], whole[:-1]):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                theirs.sendall(sent)
            assert _receive(ours) == b""
