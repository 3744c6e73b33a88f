"""Remembers verdicts of checkers that give equal items equal verdicts."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

from services.reward.checkers import Checker, Reward, Verdict

LONGEST_TEXT = 2000
"""Characters of a verdict that is remembered; with ENTRIES this bounds the memory."""
ENTRIES = 20_000


class VerdictCache:
    """The verdicts that were used last, by a digest of checker, version, completion, answer and options."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[bytes, Reward] = OrderedDict()

    def find(self, key: bytes) -> Verdict | None:
        verdict = self._verdicts.get(key)
        if verdict is not None:
            self._verdicts.move_to_end(key)
        return verdict

    def put(self, key: bytes, verdict: Verdict) -> None:
        # Never an Unscorable: what went wrong once, a time limit for example, may go right the next time.
        if not isinstance(verdict, Reward) or len(verdict.parsed) + len(verdict.explanation) > LONGEST_TEXT:
            return
        self._verdicts[key] = verdict
        if len(self._verdicts) > ENTRIES:
            self._verdicts.popitem(last=False)


def content_key(checker: Checker, completion: str, answer: str, options: Mapping[str, str]) -> bytes:
    """Equal for equal items of one version of a checker; each part is hashed with its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (
        checker.name,
        checker.version,
        completion,
        answer,
        *(t for pair in sorted(options.items()) for t in pair),
    ):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()
