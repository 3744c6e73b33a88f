"""The broadcast of a weight transfer as rank 0 makes it: its store, and the process group that outlives a transfer."""

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed import TCPStore

from retort.config import WeightSyncConfig
from retort.network import family_of
from retort.queues import Member
from retort.telemetry import log_event
from retort.weight_sync import PrepareReply, ProcessGroup, Snapshot, TransferRequest, open_process_group, send

BROADCAST_SHARE = 0.75
"""Part of a phase's deadline after which a broadcast is given up, so that those who waited in it can still say so."""


@dataclass
class _Going:
    """A process group, and who is in it: (incarnation, workers) in the order of their ranks."""

    name: str
    members: list[tuple[str, int]]
    group: ProcessGroup | None = None
    """None before the first transfer."""


class Broadcast:
    """Sends snapshots. Its process group goes on while its members are the same and nothing fails."""

    def __init__(self, config: WeightSyncConfig, *, epoch: int, backend: str) -> None:
        self._config = config
        self._epoch = epoch
        self._backend = backend
        # Bound to one address: whoever reaches the store could join a transfer.
        listening = socket.create_server((config.host, 0), family=family_of(config.host))
        self._port = listening.getsockname()[1]
        self._store = TCPStore(
            config.host, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self._going: _Going | None = None

    def requests(self, ready: Sequence[tuple[Member, PrepareReply]]) -> list[tuple[Member, TransferRequest]]:
        """A process group of exactly the members that are prepared: ranks in the order given, the sender is 0."""
        if not ready:
            return []
        members = [(member.incarnation, reply.num_workers) for member, reply in ready]
        if self._going is None or self._going.members != members:
            self._going = _Going(uuid.uuid4().hex, members)
        world_size = 1 + sum(reply.num_workers for _, reply in ready)
        requests = []
        rank = 1
        for member, reply in ready:
            request = TransferRequest(
                epoch=self._epoch,
                group=self._going.name,
                backend=self._backend,
                store_host=self._config.host,
                store_port=self._port,
                broadcast_rank=rank,
                world_size=world_size,
                deadline_s=BROADCAST_SHARE * self._config.deadline_s,
            )
            requests.append((member, request))
            rank += reply.num_workers
        return requests

    async def send(self, snapshot: Snapshot, transfers: Sequence[tuple[Member, TransferRequest]]) -> None:
        """Broadcast to those whom `requests` named last."""
        if transfers:
            await asyncio.to_thread(self._send, snapshot, transfers[0][1])

    def abandon(self) -> None:
        """Open another process group next time: to whom the last transfer failed has left this one."""
        self._going = None

    def _send(self, snapshot: Snapshot, request: TransferRequest) -> None:
        deadline = time.monotonic() + request.deadline_s
        going, self._going = self._going, None
        assert going and going.name == request.group, "another broadcast was asked for than is sent"
        try:
            going.group = going.group or open_process_group(
                request.backend,
                self._store,
                request.group,
                rank=0,
                world_size=request.world_size,
                timeout_s=request.deadline_s,
            )
            send(going.group, snapshot, deadline - time.monotonic())
            self._going = going
        except RuntimeError as error:
            # Which replica is to blame, its own answer tells; one that died has none, and is evicted for that.
            log_event("broadcast_failed", logging.WARNING, version=snapshot.version, message=error)
