"""A worker process: answers one question after another until its socket closes or somebody kills it."""

import contextlib
import os
import signal
import socket
import struct

import msgspec

from services.reward.checkers import Checker, Reward, Unscorable, Verdict
from services.reward.isolation.sandbox import confine, limit_cpu
from services.reward.scoring import check

LENGTH = struct.Struct(">I")
LARGEST_FRAME_BYTES = 64 << 20


class Question(msgspec.Struct, frozen=True, array_like=True):
    """One item for a checker that the worker knows already."""

    completion: str
    answer: str
    options: dict[str, str]
    seconds: float


_questions = msgspec.msgpack.Decoder(Question)
_verdicts = msgspec.msgpack.Decoder(Reward | Unscorable)


def frame(message: Question | Verdict) -> bytes:
    """A message as it travels: its length in four bytes, then msgpack."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def decode_verdict(body: bytes) -> Verdict:
    """Raises msgspec.DecodeError (also its ValidationError) for what is no verdict."""
    verdict: Verdict = _verdicts.decode(body)
    return verdict


def work(checker: Checker, channel: socket.socket) -> None:
    """Answer questions with the checker. Returns when the service has closed its end."""
    os.setpgid(0, 0)  # the service lowers the priority of worker and program together
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the service
    if not checker.limits.starts_processes:
        confine(checker.limits)
    while body := _receive(channel):
        question = _questions.decode(body)
        limit_cpu(question.seconds)
        verdict = check(checker, question.completion, question.answer, question.options)
        with contextlib.suppress(BrokenPipeError):
            channel.sendall(frame(verdict))


def _receive(channel: socket.socket) -> bytes:
    head = _receive_exactly(channel, LENGTH.size)
    return _receive_exactly(channel, LENGTH.unpack(head)[0]) if head else b""


def _receive_exactly(channel: socket.socket, size: int) -> bytes:
    """So many bytes; none if the other end was closed."""
    received = bytearray()
    while len(received) < size:
        part = channel.recv(size - len(received))
        if not part:
            return b""
        received += part
    return bytes(received)
