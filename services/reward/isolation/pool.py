"""The service's end of the worker processes: who runs what, and who is killed when."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from retort.telemetry import log_event
from services.reward.checkers import Checker, Unscorable, Verdict
from services.reward.discovery import BUILT_IN
from services.reward.isolation.sandbox import can_confine, landlock_abi
from services.reward.isolation.worker import LARGEST_FRAME_BYTES, LENGTH, Question, decode_verdict, frame
from services.reward.metrics import KILLS, WAITING

SHORT_S = 0.1
"""An item that runs longer moves to the slow lane."""
LONG_S = 1.0
"""So much longer it keeps its place if the slow lane is full. Then it is stopped, and runs again from its start when
there is room: checkers are pure functions."""
QUICK_PER_CORE = 4
"""Items of a core that may run and are not known to be slow. Several, so that a few that run for ever do not keep
all others waiting until they are known."""
IDLE_PER_CORE = 2
"""Idle workers of each checker that are kept for the next items."""
SLOW_LANE = 32
"""Items that may be in the slow lane."""
SLOW_NICENESS = 19
"""The lowest priority: they share what the quick ones leave."""
ITEMS_PER_WORKER = 500
"""Then a worker is replaced, so that what leaks in a library cannot add up."""
LONGEST_TEXT = 1 << 20
"""Characters of a completion or an answer that a worker takes."""
START_S = 30.0
"""Longest wait for a nursery to import a checker, or to fork."""
BUILT_IN_NAMES = {point.name for point in BUILT_IN}


class WorkerDiedError(Exception):
    """The worker's socket closed, or what came out of it is no verdict."""


@dataclass(slots=True)
class Worker:
    """A worker process and the connection to it."""

    pid: int
    handle: int
    """Its pidfd: unlike the pid, never another process."""
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    items: int = 0

    async def ask(self, question: Question) -> Verdict:
        try:
            self.writer.write(frame(question))
            await self.writer.drain()
            (size,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
            if size > LARGEST_FRAME_BYTES:
                raise WorkerDiedError(f"a verdict of {size} bytes")
            verdict = decode_verdict(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise WorkerDiedError("its process ended") from error
        except msgspec.DecodeError as error:
            raise WorkerDiedError(f"no verdict: {error}") from error
        self.items += 1
        return verdict

    def demote(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PGRP, self.pid, SLOW_NICENESS)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        os.close(self.handle)
        self.writer.close()


class Turns:
    """A batch's places in the two queues. One of its items waits in each at a time: so batches take turns, however many
    items they have."""

    def __init__(self) -> None:
        self.quick = asyncio.Lock()
        self.slow = asyncio.Lock()


class Lanes:
    """Which items run now: QUICK_PER_CORE for each core, and beside them up to SLOW_LANE that take long.

    So a few items that run to their time limit delay no others.
    """

    def __init__(self, cores: int) -> None:
        self._quick = asyncio.Semaphore(QUICK_PER_CORE * cores)
        self._slow = asyncio.Semaphore(SLOW_LANE)

    @contextlib.asynccontextmanager
    async def enter(self, checker: str, turns: Turns, *, slow: bool = False) -> AsyncIterator["Place"]:
        place = Place(self._slow if slow else self._quick)
        waiting = WAITING.labels(checker)
        waiting.inc()
        try:
            async with turns.slow if slow else turns.quick:
                await place.lane.acquire()
        finally:
            waiting.dec()
        try:
            yield place
        finally:
            place.lane.release()

    async def move(self, place: "Place") -> bool:
        """Into the slow lane, unless that is full."""
        if place.lane is self._slow:
            return True
        if self._slow.locked():
            return False
        await self._slow.acquire()
        place.lane.release()
        place.lane = self._slow
        return True


@dataclass(slots=True)
class Place:
    """What an item holds while it runs."""

    lane: asyncio.Semaphore


class Nursery:
    """The service's end of a process from which workers are forked, which starts when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._preparing: dict[str, asyncio.Task[tuple[int, int]]] = {}
        self._prepared: set[str] = set()
        self._one_question = asyncio.Lock()
        # A thread of its own: quick checkers that hang may hold all those of the event loop.
        self._thread = ThreadPoolExecutor(1)

    async def prepare(self, name: str) -> None:
        """Import what the checker needs, unless that has been done. Raises WorkerDiedError."""
        if name in self._prepared:
            return
        if name not in self._preparing:
            self._preparing[name] = asyncio.create_task(self._ask(name, None))
            self._preparing[name].add_done_callback(lambda done: self._end_preparing(name, done))
        await asyncio.shield(self._preparing[name])

    async def fork(self, name: str, channel: socket.socket) -> tuple[int, int]:
        """A new worker's process id and pidfd. Raises WorkerDiedError."""
        return await self._ask(name, channel)

    def close(self) -> None:
        self._end()
        self._thread.shutdown(wait=False)

    async def _ask(self, name: str, channel: socket.socket | None) -> tuple[int, int]:
        async with self._one_question:
            for attempt in (1, 2):
                try:
                    control = self._control or self._start()
                    loop = asyncio.get_running_loop()
                    return await loop.run_in_executor(self._thread, _ask_nursery, control, name, channel)
                except (OSError, WorkerDiedError) as error:
                    log_event("nursery_lost", checker=name, error=str(error), attempt=attempt)
                    self._end()
                    if isinstance(error, TimeoutError):
                        raise WorkerDiedError(f"its modules were not imported within {START_S:g} s") from error
        raise WorkerDiedError("its process could not be started; the service's log says why")

    def _end_preparing(self, name: str, done: asyncio.Task[tuple[int, int]]) -> None:
        del self._preparing[name]
        if not done.cancelled() and done.exception() is None:
            self._prepared.add(name)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(START_S)
        with theirs:
            command = [sys.executable, "-m", "services.reward.isolation.nursery"]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)
        self._control = ours
        log_event("nursery_started", pid=self._process.pid, landlock=landlock_abi())
        return ours

    def _end(self) -> None:
        if self._process is not None and self._control is not None:
            self._process.kill()
            self._process.wait()
            self._control.close()
        self._process = self._control = None
        self._prepared.clear()


class WorkerPool:
    """Runs checkers that are not quick. To be used within the event loop, and closed there."""

    def __init__(self, cores: int | None = None) -> None:
        self._cores = cores or len(os.sched_getaffinity(0))
        self._lanes = Lanes(self._cores)
        self._idle: Mapping[str, list[Worker]] = defaultdict(list)
        self._nurseries: Mapping[str, Nursery] = defaultdict(Nursery)

    async def check(self, checker: Checker, question: Question, turns: Turns) -> Verdict:
        """The checker's verdict, or Unscorable after `question.seconds` of running. Cancelling kills the worker."""
        for name, text in (("completion", question.completion), ("answer", question.answer)):
            if len(text) > LONGEST_TEXT:
                return Unscorable(reason=f"{name} has {len(text)} characters; {checker.name} takes {LONGEST_TEXT}")
        if problem := can_confine():
            return Unscorable(reason=f"{checker.name} cannot run here: {problem}")
        death: WorkerDiedError | None = None
        # Twice: it may have died of something else than this item, an operator for example.
        for _ in range(2):
            try:
                # Before the item has a place: a checker that hangs or dies here must delay no other.
                await self._nursery_of(checker).prepare(checker.name)
                async with self._lanes.enter(checker.name, turns) as place:
                    verdict = await self._run(checker, question, place)
                if verdict is None:
                    async with self._lanes.enter(checker.name, turns, slow=True) as place:
                        verdict = await self._run(checker, question, place)
                assert verdict is not None, "the slow lane has room for what is in it"
                return verdict
            except WorkerDiedError as error:
                KILLS.labels(checker.name, "died").inc()
                death = error
        return Unscorable(
            reason=f"{checker.name} ended its worker process twice ({death}): it crashed, or it used more than "
            f"{checker.limits.memory_mib} MiB or {question.seconds:g} s of CPU time"
        )

    def close(self) -> None:
        for workers in self._idle.values():
            while workers:
                workers.pop().kill()
        for nursery in self._nurseries.values():
            nursery.close()

    def _nursery_of(self, checker: Checker) -> Nursery:
        """One for all that are built in, and one for each other checker, whose code may break what it runs in."""
        return self._nurseries["" if checker.name in BUILT_IN_NAMES else checker.name]

    async def _run(self, checker: Checker, question: Question, place: Place) -> Verdict | None:
        """None if the item takes long and there is no room for such: it is to run again where there is."""
        worker = await self._take(checker)
        asking = asyncio.create_task(worker.ask(question))
        reusable = False
        try:
            done, _ = await asyncio.wait([asking], timeout=min(SHORT_S, question.seconds))
            reusable = bool(done) and asking.exception() is None and worker.items < ITEMS_PER_WORKER
            rest = question.seconds - SHORT_S
            if not done and rest > LONG_S and not await self._lanes.move(place):
                done, _ = await asyncio.wait([asking], timeout=LONG_S)
                rest -= LONG_S
                if not done and not await self._lanes.move(place):
                    KILLS.labels(checker.name, "no_room").inc()
                    return None
            if not done and rest > 0:
                if await self._lanes.move(place):
                    worker.demote()
                done, _ = await asyncio.wait([asking], timeout=rest)
            if not done:
                KILLS.labels(checker.name, "time_limit").inc()
                return Unscorable(
                    reason=f"{checker.name} took more than {question.seconds:g} s and was stopped; simplify the item "
                    "or raise the option time_limit_s"
                )
            return asking.result()
        except asyncio.CancelledError:
            KILLS.labels(checker.name, "cancelled").inc()
            raise
        finally:
            asking.cancel()
            if reusable and len(self._idle[checker.name]) < IDLE_PER_CORE * self._cores:
                self._idle[checker.name].append(worker)
            else:
                worker.kill()

    async def _take(self, checker: Checker) -> Worker:
        idle = self._idle[checker.name]
        while idle:
            worker = idle.pop()
            if not worker.reader.at_eof():
                return worker
            worker.kill()
        starting = asyncio.create_task(self._start(checker))
        try:
            # To its end even if the item is cancelled: the nursery's reply must be read by who asked for it.
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_discard)
            raise

    async def _start(self, checker: Checker) -> Worker:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise WorkerDiedError(f"its process could not be started: {error}") from error
        with theirs:
            try:
                pid, handle = await self._nursery_of(checker).fork(checker.name, theirs)
            except WorkerDiedError:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        return Worker(pid, handle, reader, writer)


def _discard(starting: asyncio.Task[Worker]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().kill()


def _ask_nursery(control: socket.socket, name: str, channel: socket.socket | None) -> tuple[int, int]:
    """The process id and the pidfd of a new worker; without a channel for one, two numbers that mean nothing."""
    socket.send_fds(control, [name.encode()], [channel.fileno()] if channel else [])
    pid, handles, _, _ = socket.recv_fds(control, 64, 1)
    if not pid or bool(handles) != bool(channel):
        raise WorkerDiedError("the nursery ended")
    return int(pid), handles[0] if handles else -1
