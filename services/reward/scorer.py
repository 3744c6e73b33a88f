"""Scores batches: quick checkers in a thread, the others in worker processes, parts of a composite each in its own."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

from retort.telemetry import log_event
from services.reward.admission import Admission
from services.reward.cache import VerdictCache, content_key
from services.reward.checkers import Checker, Reward, Unscorable, Verdict, is_encodable
from services.reward.checkers.composite import Composite, Part
from services.reward.isolation.pool import WorkerPool
from services.reward.metrics import BATCH_SECONDS, CACHED, SECONDS, VERDICTS, WORKER_SECONDS
from services.reward.scoring import Item, Scored, check_unseen, sound
from services.reward.shadow import Shadow

TIME_LIMIT = "time_limit_s"
"""Option that every checker in a worker process has: seconds, at most LONGEST_S."""
LONGEST_S = 60.0


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

    async def score(self, items: Sequence[Item]) -> list[Scored]:
        """A verdict for every item, in their order. Raises FullError. Cancelling stops what has not finished."""
        scored: list[Scored | None] = [None] * len(items)
        async for ready in self.score_as_ready(items):
            for index, result in ready:
                scored[index] = result
        return [result for result in scored if result is not None]

    async def score_as_ready(self, items: Sequence[Item]) -> AsyncIterator[list[tuple[int, Scored]]]:
        """Verdicts as they come, each with the index of its item. Raises FullError."""
        started = time.perf_counter()
        quick, slow = self._split(items)
        with self._admission.admit(len(items), sum([len(item.completion) for item in items])):
            tasks = [asyncio.create_task(self._indexed(index, items[index])) for index in slow]
            try:
                if quick:
                    # In a thread, so that a big batch holds up neither health checks nor other calls.
                    ready = await asyncio.to_thread(self._score_quick, items, quick)
                    self._record(items, ready)
                    yield ready
                for task in asyncio.as_completed(tasks):
                    ready = [await task]
                    self._record(items, ready)
                    yield ready
            finally:
                for unfinished in tasks:
                    unfinished.cancel()
        seconds = time.perf_counter() - started
        BATCH_SECONDS.observe(seconds)
        log_event("scored", items=len(items), in_workers=len(slow), seconds=seconds)

    async def score_with(self, item: Item, name: str) -> Scored:
        """The verdict of another checker than the item's own."""
        other = Item(item.id, name, item.completion, item.answer, item.options)
        checker = self.checkers.get(name)
        if checker is None or (checker.quick and not isinstance(checker, Composite)):
            return (await asyncio.to_thread(self._score_quick, [other], [0]))[0][1]
        return await self._score_slow(other)

    def _split(self, items: Sequence[Item]) -> tuple[Sequence[int], Sequence[int]]:
        """Indices of the items that a thread scores, and of those that need more."""
        in_workers = {name for name, checker in self.checkers.items() if not checker.quick}
        slow = [index for index, item in enumerate(items) if item.checker in in_workers]
        if not slow:
            return range(len(items)), slow
        return sorted(set(range(len(items))) - set(slow)), slow

    def _score_quick(self, items: Sequence[Item], indices: Iterable[int]) -> list[tuple[int, Scored]]:
        checkers, clock = self.checkers, time.perf_counter
        scored = []
        seen: dict[int, Verdict] = {}
        before = clock()
        for index in indices:
            item = items[index]
            checker = checkers.get(item.checker)
            if checker is None:
                reason = f"no checker {item.checker[:200]!r}; known: {', '.join(checkers)}"
                scored.append((index, Scored(Unscorable(reason=reason), "", 0.0)))
                continue
            returned = check_unseen(checker, item.completion, item.answer, item.options)
            verdict = seen.get(id(returned))
            if verdict is None:
                # By identity: checkers may give the same verdict many times, and it lives as long as `scored`.
                verdict = sound(checker, returned)
                if verdict is returned:
                    seen[id(returned)] = verdict
            now = clock()
            scored.append((index, Scored(verdict, checker.label, now - before)))
            before = now
        return scored

    async def _indexed(self, index: int, item: Item) -> tuple[int, Scored]:
        return index, await self._score_slow(item)

    async def _score_slow(self, item: Item) -> Scored:
        checker = self.checkers[item.checker]
        before = time.perf_counter()
        if isinstance(checker, Composite):
            verdict = await self._check_parts(checker, item)
        else:
            verdict = await self._check_in_worker(checker, item)
        seconds = time.perf_counter() - before
        WORKER_SECONDS.labels(checker.name).observe(seconds)
        return Scored(verdict, checker.label, seconds)

    async def _check_in_worker(self, checker: Checker, item: Item) -> Verdict:
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
            CACHED.labels(checker.name).inc()
            return known
        verdict = await self._pool.check(checker, item.completion, item.answer, options, seconds)
        if key:
            self._cache.put(key, verdict)
        return verdict

    async def _check_parts(self, composite: Composite, item: Item) -> Verdict:
        parts = composite.parts(item.answer, item.options)
        if isinstance(parts, Unscorable):
            return parts
        scored = await asyncio.gather(*(self._score_part(item, part) for part in parts))
        return composite.combine(parts, [one.verdict for one in scored])

    async def _score_part(self, item: Item, part: Part) -> Scored:
        whole = Item(item.id, part.checker, item.completion, part.answer, part.options)
        return await self.score_with(whole, part.checker)

    def _record(self, items: Sequence[Item], ready: Sequence[tuple[int, Scored]]) -> None:
        counts: dict[tuple[str, str], tuple[int, float]] = {}
        for index, scored in ready:
            verdict = scored.verdict
            outcome = ("correct" if verdict.correct else "wrong") if type(verdict) is Reward else "unscorable"
            key = (scored.checker, outcome)
            count, seconds = counts.get(key, (0, 0.0))
            counts[key] = (count + 1, seconds + scored.seconds)
            if self._shadow is not None and self._shadow.follows(items[index].checker):
                self._shadow.offer(items[index], verdict)
        for (checker, outcome), (count, seconds) in counts.items():
            VERDICTS.labels(checker, outcome).inc(count)
            SECONDS.labels(checker).inc(seconds)


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
