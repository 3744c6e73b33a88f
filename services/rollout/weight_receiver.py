"""A replica's side of a weight sync: which policy version it serves, and how it gets to the next.

    joining -> prepared -> received -> verifying -> serving          every failure: back to joining
       ^___________|___________|___________|

The trainer drives it with four calls (`retort.weight_sync`). Work is taken and tokens are sampled only while serving. A
group that ends during an update leaves the replica after the commit.
"""

import asyncio
import contextlib

from retort.identity import NOBODY, Identity
from retort.telemetry import log_event
from retort.weight_sync import (
    CommitRequest,
    PrepareReply,
    PrepareRequest,
    ProbeReply,
    ProbeRequest,
    TransferReply,
    TransferRequest,
)
from services.rollout.engine import Engine


class RefusedError(Exception):
    """The trainer asked for something that this replica must not do: it is old, or it skips a phase."""


class WeightReceiver:
    """Which version the replica serves. Only `commit` of a verified version makes it serve."""

    def __init__(self, engine: Engine, identity: Identity = NOBODY) -> None:
        """`identity`: of this replica; a trainer of another is refused."""
        self._engine = engine
        self._identity = identity
        self.epoch = 0
        """Of the newest trainer that has asked for anything. A version means something only within it."""
        self._phase = "joining"
        self._pending: PrepareRequest | None = None
        self._changed = asyncio.Condition()
        self._one_at_a_time = asyncio.Lock()
        self.served_version: int | None = None
        self.last_served_version: int | None = None
        """The same, but for an update, during which nothing is served and no token sampled."""
        self._committed_epoch = -1
        """Of the trainer that committed that."""

    @property
    def state(self) -> str:
        """joining, updating or serving, for the members list. Joining is who has not served yet."""
        if self._phase == "serving":
            return "serving"
        return "joining" if self._phase == "joining" and self.last_served_version is None else "updating"

    async def prepare(self, request: PrepareRequest) -> PrepareReply:
        """Freeze generation and expect `request.version`. Repeating it after a failure is allowed."""
        async with self._one_at_a_time:
            if contradiction := self._identity.contradiction(request.identity):
                raise RefusedError(f"this replica does not belong to this trainer: {contradiction}")
            # Before anything is awaited: two trainers may be calling, and the older one must find the newer epoch.
            self._refuse_older(request.epoch)
            was_updating = self._phase in ("prepared", "received")
            self.epoch, self._pending = request.epoch, request
            await self._move("joining")
            if was_updating:
                await self._engine.abandon()
            await self._engine.prepare()
            await self._move("prepared")
            return PrepareReply(num_workers=self._engine.num_workers)

    async def transfer(self, request: TransferRequest) -> TransferReply:
        """Receive the broadcast; answers with the digests of what arrived."""
        async with self._one_at_a_time:
            pending = self._expect("prepared", request.epoch)
            digests = await self._engine.receive(request, pending.manifest)
            await self._move("received")
            return TransferReply(digests=digests)

    async def probe(self, request: ProbeRequest) -> ProbeReply:
        """Load what was received and answer the log-probs of the probe prompt under it. All else stays frozen."""
        async with self._one_at_a_time:
            pending = self._expect("received", request.epoch)
            # From here on a failure needs a whole new update: the old weights are gone.
            await self._engine.load(pending.version)
            await self._move("verifying")
            return ProbeReply(logprobs=await self._engine.probe(request.prompt_ids))

    async def commit(self, request: CommitRequest) -> CommitRequest:
        """Serve the verified version. A repeated commit (its answer was lost) changes nothing."""
        async with self._one_at_a_time:
            self._refuse_older(request.epoch)
            if self.served_version == request.version and self.epoch == request.epoch:
                return request
            pending = self._expect("verifying", request.epoch)
            if pending.version != request.version:
                raise RefusedError(f"version {request.version} is not the one being verified, {pending.version} is")
            await self._engine.resume()
            await self._move("serving")
            log_event("policy_committed", version=request.version)
            return request

    async def wait_until_serving(self, min_version: int, timeout_s: float, max_version: int | None = None) -> bool:
        """Wait until a version of at least `min_version`, at most `max_version`, is being served.

        False after `timeout_s`.
        """

        def serving() -> bool:
            version = self.served_version
            if self._phase != "serving" or version is None:
                return False
            return min_version <= version and (max_version is None or version <= max_version)

        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(serving)
        except TimeoutError:
            return False
        return True

    async def wait_until_committed(self, version: int, epoch: int, timeout_s: float) -> bool:
        """Whether what `version` of this trainer's epoch sampled may leave: wait until it or a newer one is committed.

        What was committed before the update that goes on does not wait for its end.
        Versions of another epoch say nothing: after a restart of the trainer the same number may be other weights.
        """
        committed = self.last_served_version
        if committed is not None and version <= committed and self._committed_epoch == epoch == self.epoch:
            return True
        return await self.wait_until_serving(version, timeout_s) and self.epoch == epoch

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until the phase changes, `timeout_s` at most."""
        phase = self._phase
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._phase != phase)

    def _refuse_older(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise RefusedError(f"trainer epoch {epoch} is over: epoch {self.epoch} has taken over")

    def _expect(self, phase: str, epoch: int) -> PrepareRequest:
        if epoch != self.epoch or phase != self._phase or self._pending is None:
            raise RefusedError(
                f"expected phase {phase} of epoch {epoch}, but this replica is in {self._phase} of epoch {self.epoch}"
            )
        return self._pending

    async def _move(self, phase: str) -> None:
        async with self._changed:
            self._phase = phase
            self.served_version = self._pending.version if phase == "serving" and self._pending else None
            if self.served_version is not None:
                self.last_served_version, self._committed_epoch = self.served_version, self.epoch
            self._changed.notify_all()
