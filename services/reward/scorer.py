"""Scores batches: quick checkers in a thread, the others in worker processes, parts of a composite each in its own."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from operator import attrgetter

from retort.telemetry import log_event
from services.reward.admission import Admission, FullError
from services.reward.cache import VerdictCache, content_key
from services.reward.checkers import Checker, Reward, Unscorable, Verdict, is_encodable
from services.reward.checkers.composite import Composite, Part
from services.reward.isolation.pool import Turns, WorkerPool
from services.reward.isolation.worker import Question
from services.reward.metrics import BATCH_SECONDS, CACHED, SECONDS, VERDICTS, WORKER_SECONDS
from services.reward.scoring import Item, Scored, check_run, identity, sound
from services.reward.shadow import Shadow

TIME_LIMIT = "time_limit_s"
"""Option that every checker in a worker process has: seconds, at most LONGEST_S."""
LONGEST_S = 60.0
IMMEDIATE_ITEMS, IMMEDIATE_CHARACTERS = 512, 2_000_000
"""The largest batch that is scored in the event loop, which it holds up for about a millisecond."""


class Scorer:
    """What both faces of the service call. To be used within the event loop."""

    def __init__(
        self, checkers: Mapping[str, Checker], pool: WorkerPool, admission: Admission, shadow: Shadow | None = None
    ) -> None:
        self.checkers = checkers
        self._pool = pool
        self._admission = admission
        self._shadow = shadow
        self._cache = VerdictCache()
        self._in_workers = {name for name, checker in checkers.items() if not checker.quick}
        self._immediate = {name for name, checker in checkers.items() if checker.quick and checker.immediate}

    async def score(self, items: Sequence[Item]) -> list[Scored]:
        """A verdict for every item, in their order. Raises FullError. Cancelling stops what has not finished."""
        scored: dict[int, Scored] = {}
        async for ready in self.score_as_ready(items):
            scored.update(zip(*ready, strict=True))
        return [scored[index] for index in range(len(items))]

    async def room_for(self, items: Sequence[Item]) -> None:
        """Wait until the service takes these items; it does, if nothing else is awaited in between."""
        await self._admission.room(len(items), _characters(items))

    async def score_as_ready(self, items: Sequence[Item]) -> AsyncIterator[tuple[Sequence[int], Sequence[Scored]]]:
        """Verdicts as they come: indices of items, and a result for each. Raises FullError."""
        started = time.perf_counter()
        quick, slow = self._split(items)
        characters = _characters(items)
        outcome = "failed"
        try:
            with self._admission.admit(len(items), characters):
                turns = Turns()
                tasks = [asyncio.create_task(self._indexed(index, items[index], turns)) for index in slow]
                try:
                    if quick:
                        together = [items[index] for index in quick] if slow else items
                        yield quick, await self._score_together(together, characters)
                    for task in asyncio.as_completed(tasks) if tasks else ():
                        index, result = await task
                        self._record([items[index]], [result])
                        yield [index], [result]
                finally:
                    for unfinished in tasks:
                        unfinished.cancel()
            outcome = "scored"
        except FullError:
            outcome = "refused"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            # The caller left, or its deadline passed, which looks the same from here.
            outcome = "cancelled"
            raise
        finally:
            seconds = time.perf_counter() - started
            if outcome == "scored":
                BATCH_SECONDS.observe(seconds)
            log_event("batch", outcome=outcome, items=len(items), in_workers=len(slow), seconds=seconds)

    async def score_with(self, item: Item, name: str, turns: Turns | None = None) -> Scored:
        """The verdict of another checker than the item's own."""
        other = Item(item.id, name, item.completion, item.answer, item.options)
        checker = self.checkers.get(name)
        if checker is None or (checker.quick and not isinstance(checker, Composite)):
            return (await asyncio.to_thread(self._score_quick, [other]))[0]
        return await self._score_slow(other, turns or Turns())

    def _split(self, items: Sequence[Item]) -> tuple[Sequence[int], Sequence[int]]:
        """Indices of the items that a thread scores, and of those that need more."""
        if self._in_workers.isdisjoint({item.checker for item in items}):
            return range(len(items)), ()
        slow = [index for index, item in enumerate(items) if item.checker in self._in_workers]
        return sorted(set(range(len(items))) - set(slow)), slow

    async def _score_together(self, items: Sequence[Item], characters: int) -> list[Scored]:
        """Results of items for quick checkers, and for none that is known. `characters`: of their whole batch."""
        small = len(items) <= IMMEDIATE_ITEMS and characters <= IMMEDIATE_CHARACTERS
        if small and {item.checker for item in items} <= self._immediate:
            scored = self._score_quick(items)
        else:
            # In a thread, so that a big batch holds up neither health checks nor other calls.
            scored = await asyncio.to_thread(self._score_quick, items)
        self._record(items, scored)
        return scored

    def _score_quick(self, items: Iterable[Item]) -> list[Scored]:
        scored: list[Scored] = []
        for name, run in itertools.groupby(items, key=attrgetter("checker")):
            checker = self.checkers.get(name)
            if checker is None:
                reason = f"no checker {name[:200]!r}; known: {', '.join(self.checkers)}"
                scored += [Scored(Unscorable(reason=reason), "", 0.0) for _ in run]
            else:
                scored += check_run(checker, list(run))
        return scored

    async def _indexed(self, index: int, item: Item, turns: Turns) -> tuple[int, Scored]:
        return index, await self._score_slow(item, turns)

    async def _score_slow(self, item: Item, turns: Turns) -> Scored:
        checker = self.checkers[item.checker]
        before = time.perf_counter()
        if isinstance(checker, Composite):
            verdict = await self._check_parts(checker, item, turns)
        else:
            verdict = await self._check_in_worker(checker, item, turns)
        seconds = time.perf_counter() - before
        WORKER_SECONDS.labels(checker.label).observe(seconds)
        return Scored(verdict, checker.label, seconds)

    async def _check_in_worker(self, checker: Checker, item: Item, turns: Turns) -> Verdict:
        for name, text in (("completion", item.completion), ("answer", item.answer)):
            if not is_encodable(text):
                return Unscorable(reason=f"{name} has a lone surrogate, which cannot be sent to a worker process")
        options = dict(item.options)
        try:
            seconds = float(options.pop(TIME_LIMIT, checker.limits.seconds))
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= LONGEST_S:
            given = item.options[TIME_LIMIT][:40]
            return Unscorable(reason=f"option {TIME_LIMIT} = {given!r}; give seconds, at most {LONGEST_S:g}")
        key = content_key(checker, item.completion, item.answer, options) if checker.deterministic else b""
        if key and (known := self._cache.find(key)):
            CACHED.labels(checker.label).inc()
            return known
        question = Question(item.completion, item.answer, options, seconds)
        verdict = await self._pool.check(checker, question, turns)
        if key:
            self._cache.put(key, verdict)
        return verdict

    async def _check_parts(self, composite: Composite, item: Item, turns: Turns) -> Verdict:
        parts = composite.parts(item.answer, item.options)
        if isinstance(parts, Unscorable):
            return parts
        scored = await asyncio.gather(*(self._score_part(item, part, turns) for part in parts))
        return sound(composite, composite.combine(parts, [one.verdict for one in scored]))

    async def _score_part(self, item: Item, part: Part, turns: Turns) -> Scored:
        whole = Item(item.id, part.checker, item.completion, part.answer, part.options)
        return await self.score_with(whole, part.checker, turns)

    def _record(self, items: Sequence[Item], scored: Sequence[Scored]) -> None:
        keys = list(map(identity, scored))
        different = dict(zip(keys, scored, strict=True))
        counts: dict[tuple[str, str], tuple[int, float]] = {}
        for key, times in Counter(keys).items():
            one = different[key]
            outcome = ("correct" if one.verdict.correct else "wrong") if type(one.verdict) is Reward else "unscorable"
            count, seconds = counts.get((one.checker, outcome), (0, 0.0))
            counts[one.checker, outcome] = (count + times, seconds + times * one.seconds)
        for (checker, outcome), (count, seconds) in counts.items():
            VERDICTS.labels(checker, outcome).inc(count)
            SECONDS.labels(checker).inc(seconds)
        if self._shadow is not None:
            for item, one in zip(items, scored, strict=True):
                if self._shadow.follows(item.checker):
                    self._shadow.offer(item, one.verdict)


def _characters(items: Sequence[Item]) -> int:
    return sum([len(item.completion) + len(item.answer) for item in items])


@contextlib.asynccontextmanager
async def open_scorer(checkers: Mapping[str, Checker], shadows: Mapping[str, str]) -> AsyncIterator[Scorer]:
    """A scorer with its worker processes and its shadows, which end with the context."""
    pool = WorkerPool()
    shadow = Shadow(shadows) if shadows else None
    scorer = Scorer(checkers, pool, Admission(), shadow)
    following = asyncio.create_task(shadow.run(scorer.score_with)) if shadow else None
    try:
        yield scorer
    finally:
        if following:
            following.cancel()
        pool.close()
