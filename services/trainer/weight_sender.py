"""The trainer's side of a weight sync: prepare, transfer, probe, commit, for every replica that is behind.

Rank 0 only. The number of calls is four a replica, however many tensors there are. Nothing is trusted: a replica serves
a version only after its digests equalled the sender's and its log-probs of the probe prompt the trainer's own.

A sync has a thread of its own, so that training can go on beside it. All that it changes is read when it has ended.
"""

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import msgspec
from redis.exceptions import RedisError
from torch import Tensor

from retort.config import WeightSyncConfig
from retort.identity import Identity
from retort.queues import Fenced, Member, TrainerQueue
from retort.rollouts import Message
from retort.telemetry import log_event
from retort.weight_sync import (
    CommitRequest,
    PrepareReply,
    PrepareRequest,
    ProbeReply,
    ProbeRequest,
    Snapshot,
    TransferReply,
    TransferRequest,
)
from services.trainer.broadcast import Broadcast
from services.trainer.gauges import EVICTIONS

HEARD_OF_WITHIN_S = 10.0
LOOK_S = 1.0
"""So often who waits for a sync says whom it waits for."""
Reply = TypeVar("Reply", bound=Message)


class ReplicaError(Exception):
    """A replica did not do its part of a weight sync. Its text says why."""


class RefusalError(ReplicaError):
    """It answered, and the answer was an error."""


@dataclass(frozen=True)
class Probe:
    """A prompt, and the trainer's log-probs of all its tokens but the first under the snapshot's weights."""

    prompt_ids: list[int]
    logprobs: list[float]


@dataclass
class SyncReport:
    """What bringing the replicas to the published version took so far."""

    replicas: int = 0
    seconds: float = 0.0
    probe_gap: float = 0.0
    """Largest |engine - trainer| log-probability on the probe prompt, over all replicas."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """What of `seconds` went into prepare, transfer, probe and commit."""
    snapshot_seconds: float = 0.0
    """For how long the newest snapshot kept the trainer: its weights, their digests and the probe's log-probs."""


class WeightSender:
    """Holds the published snapshot and brings replicas to it."""

    def __init__(
        self,
        queue: TrainerQueue,
        config: WeightSyncConfig,
        *,
        epoch: int,
        backend: str,
        authorization: str,
        identity: Identity,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`tell` is called every second of waiting for a sync, with whom it waits for."""
        self._queue = queue
        self._config = config
        self._epoch = epoch
        self._identity = identity
        # Made once: reading the certificate authorities takes longer than a whole sync of a small model.
        self._tls = httpx.create_ssl_context()
        self._headers = {"Authorization": authorization}
        self._broadcast = Broadcast(config, epoch=epoch, backend=backend)
        self._tell = tell
        self.snapshot: Snapshot | None = None
        self._probe = Probe([], [])
        self._verified: dict[str, int] = {}
        """Version that each incarnation has shown to hold."""
        self._evicted: list[Member] = []
        """And not yet in Redis, which hears of it when nobody is paused any more: it may be slow."""
        self._unanswered = ""
        self.report = SyncReport()
        self._thread = ThreadPoolExecutor(1, "weight-sync")
        self._going_on: Future[None] | None = None

    def take_back(self) -> list[Tensor]:
        """Wait for a sync that goes on, and hand over the memory of the published snapshot, which nobody gets any more.

        Empty before the first.
        """
        self._finish()
        snapshot, self.snapshot = self.snapshot, None
        return snapshot.buckets if snapshot else []

    def publish(self, snapshot: Snapshot, probe: Probe) -> SyncReport:
        """Make this the version to serve. `sync` brings the replicas to it, those that join later included.

        Waits for a sync that goes on; answers what that of the version before has taken.
        """
        self._finish()
        before, self.report = self.report, SyncReport()
        self.snapshot, self._probe = snapshot, probe
        self._queue.publish(snapshot.version, snapshot.digest)
        return before

    def sync(self) -> int:
        """Bring every replica that is alive and behind to the published version; says how many serve it now.

        A replica that fails is evicted, so that its supervisor restarts it, and left out.
        """
        assert self.snapshot is not None, "sync before publish"
        self._finish()
        self.start_sync()
        self._finish()
        return self._serving(self.snapshot.version)

    def start_sync(self, oldest: int = 0) -> int:
        """Begin what `sync` does beside the caller, unless it goes on already or nobody is behind.

        Says how many replicas serve version `oldest` or a newer one, which this trainer has verified.
        """
        if self._going_on and self._going_on.done():
            self._finish()
        if not self._going_on and (behind := self._behind()):
            self._going_on = self._start(self._bring(behind))
        return self._serving(oldest)

    def close(self) -> None:
        """Let a sync that goes on come to its end: a replica that has been paused would stay so."""
        try:
            self._finish()
        except (Fenced, RedisError) as error:
            log_event("sync_given_up", logging.WARNING, reason=error)
        self._thread.shutdown()

    def _finish(self) -> None:
        """Wait for the sync that goes on. Raises what it raised."""
        if self._going_on:
            self._wait(self._going_on)
            going_on, self._going_on = self._going_on, None
            going_on.result()

    def _start(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        # With what is logged of this thread: run, step and version.
        return self._thread.submit(contextvars.copy_context().run, asyncio.run, work)

    def _wait(self, work: Future[None]) -> None:
        """Until it is done, whatever has become of it."""
        while not work.done():
            _, unfinished = wait([work], LOOK_S)
            self._tell(self._unanswered if unfinished else "")

    async def _bring(self, behind: Sequence[Member]) -> None:
        """A broadcast that fails for one fails for all: who was in it and answered is in the next, then alone."""
        start = time.perf_counter()
        try:
            for _ in range(2):
                await self._sync(self._left(behind))
            for member in self._left(behind):
                await self._sync([member])
        finally:
            while self._evicted:
                self._queue.evict(self._evicted[0])
                del self._evicted[0]
        self.report.seconds += time.perf_counter() - start

    def _left(self, members: Sequence[Member]) -> list[Member]:
        """Those that neither serve the version by now nor have failed."""
        return [member for member in members if self._is_behind(member) and member not in self._evicted]

    def _serving(self, oldest: int) -> int:
        evicted = {member.incarnation for member in self._evicted}
        alive = [member.incarnation for member in self._alive()]
        return sum(self._verified.get(one, -1) >= oldest for one in alive if one not in evicted)

    def _behind(self) -> list[Member]:
        return [member for member in self._alive() if self._is_behind(member)]

    def _is_behind(self, member: Member) -> bool:
        # What this trainer has verified counts, not what the replica says: an earlier trainer may have sent it.
        return self.snapshot is not None and self._verified.get(member.incarnation) != self.snapshot.version

    def _alive(self) -> list[Member]:
        now = time.time()
        return [
            member
            for member in self._queue.members().values()
            if member.state not in ("loading", "draining") and member.alive(now, HEARD_OF_WITHIN_S)
        ]

    async def _sync(self, members: Sequence[Member]) -> None:
        snapshot = self.snapshot
        if not members:
            return
        assert snapshot is not None, "sync before publish"
        version, epoch = snapshot.version, self._epoch
        async with self._client() as http:
            prepare = PrepareRequest(epoch=epoch, version=version, manifest=snapshot.manifest, identity=self._identity)
            with self._timed("prepare"):
                ready = await self._ask(http, "prepare", [(member, prepare) for member in members], PrepareReply)

            transfers = self._broadcast.requests(ready)
            with self._timed("transfer"):
                asking = self._ask(http, "transfer", transfers, TransferReply)
                received, _ = await asyncio.gather(asking, self._send(snapshot, transfers))
            if len(received) != len(transfers):
                self._broadcast.abandon()
            workers = {member.incarnation: reply.num_workers for member, reply in ready}
            same = self._keep(
                received,
                "transfer",
                lambda member, reply: _digest_problem(reply, snapshot, workers[member.incarnation]),
            )

            probe = ProbeRequest(epoch=epoch, prompt_ids=self._probe.prompt_ids)
            with self._timed("probe"):
                probed = await self._ask(http, "probe", [(member, probe) for member in same], ProbeReply)
            verified = self._keep(probed, "probe", lambda _, reply: self._probe_problem(reply))

            commit = CommitRequest(epoch=epoch, version=version)
            with self._timed("commit"):
                serving = await self._ask(http, "commit", [(member, commit) for member in verified], CommitRequest)
        for member, _ in serving:
            self._verified[member.incarnation] = version
            log_event("replica_serves", replica=member.name, version=version)
        self.report.replicas += len(serving)

    def _client(self) -> httpx.AsyncClient:
        # `_ask` has a deadline for a whole call; httpx' own is for each operation on the socket. And it would let 100
        # calls be under way, while in a transfer nobody answers before all have joined.
        # Nor through a proxy that the environment names: replicas are where they say, and the calls carry a token.
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(timeout=None, limits=limits, verify=self._tls, headers=self._headers, trust_env=False)

    async def _send(self, snapshot: Snapshot, transfers: Sequence[tuple[Member, TransferRequest]]) -> None:
        await self._broadcast.send(snapshot, transfers)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = self.report.phase_seconds
        spent[phase] = spent.get(phase, 0.0) + time.perf_counter() - start

    async def _ask(
        self,
        http: httpx.AsyncClient,
        phase: str,
        requests: Sequence[tuple[Member, Message]],
        reply_type: type[Reply],
    ) -> list[tuple[Member, Reply]]:
        """One call to every replica at once; those that fail are missing from the answer, and evicted if to blame."""

        unanswered = [member.name for member, _ in requests]

        async def call(member: Member, request: Message) -> Reply:
            url = f"{member.control_url}/weights/{phase}"
            try:
                async with asyncio.timeout(self._config.deadline_s):
                    response = await http.post(url, content=request.to_bytes())
            except TimeoutError:
                raise ReplicaError(
                    f"{url} did not answer within {self._config.deadline_s:g} s (weight_sync.deadline_s)"
                ) from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ReplicaError(f"{url}: {type(error).__name__}: {error}") from None
            finally:
                unanswered.remove(member.name)
                self._unanswered = _to_answer(phase, unanswered)
            if response.status_code != httpx.codes.OK:
                raise RefusalError(f"{url}: {response.text}")
            try:
                return reply_type.from_bytes(response.content)
            except msgspec.DecodeError as error:
                raise ReplicaError(f"{url} answered with no {reply_type.__name__}: {error}") from None

        self._unanswered = _to_answer(phase, unanswered)
        answers = await asyncio.gather(*(call(*request) for request in requests), return_exceptions=True)
        succeeded = []
        for (member, _), answer in zip(requests, answers, strict=True):
            if isinstance(answer, RefusalError) and phase == "transfer" and len(requests) > 1:
                log_event("transfer_failed", logging.WARNING, replica=member.name, reason=answer)
            elif isinstance(answer, ReplicaError):
                self._evict(member, phase, str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                succeeded.append((member, answer))
        return succeeded

    def _keep(
        self, replies: Sequence[tuple[Member, Reply]], phase: str, problem: Callable[[Member, Reply], str]
    ) -> list[Member]:
        kept = []
        for member, reply in replies:
            if found := problem(member, reply):
                self._evict(member, phase, found)
            else:
                kept.append(member)
        return kept

    def _probe_problem(self, reply: ProbeReply) -> str:
        if len(reply.logprobs) != len(self._probe.logprobs):
            return f"it answered {len(reply.logprobs)} log-probs of the probe prompt's {len(self._probe.logprobs)}"
        gaps = [abs(ours - theirs) for ours, theirs in zip(self._probe.logprobs, reply.logprobs, strict=True)]
        # NaN is larger than any limit, wherever it stands; max() alone would lose it.
        gap = max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)
        if gap > self._config.max_probe_gap:
            return (
                f"its log-probs of the probe prompt differ from the trainer's by up to {gap:.3g}, and "
                f"weight_sync.max_probe_gap is {self._config.max_probe_gap:g}: it does not hold what was sent"
            )
        self.report.probe_gap = max(self.report.probe_gap, gap)
        return ""

    def _evict(self, member: Member, phase: str, reason: str) -> None:
        EVICTIONS.labels(phase).inc()
        log_event("replica_evicted", logging.ERROR, replica=member.name, phase=phase, reason=reason)
        self._evicted.append(member)


def _to_answer(phase: str, names: Sequence[str]) -> str:
    return f"{', '.join(names)} to answer {phase}" if names else ""


def _digest_problem(reply: TransferReply, snapshot: Snapshot, num_workers: int) -> str:
    buckets = len(snapshot.buckets)
    if len(reply.digests) != num_workers:
        return f"{len(reply.digests)} of its {num_workers} workers said what they received"
    for worker, digests in enumerate(reply.digests):
        if digests[:buckets] != snapshot.digests[:buckets]:
            pairs = zip(digests[:buckets], snapshot.digests, strict=False)
            wrong = [number for number, (theirs, ours) in enumerate(pairs) if theirs != ours]
            return (
                f"worker {worker} received {min(len(digests), buckets)} of {buckets} buckets, "
                f"with other bytes than were sent in buckets {wrong}"
            )
        if digests != snapshot.digests:
            return (
                f"worker {worker} received the adapters, but added them to another base than the trainer's: its "
                "model.path does not hold the same weights"
            )
    return ""
