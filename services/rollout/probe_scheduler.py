"""vLLM's scheduler, with two things that weight updates need and it lacks.

A way in for the probe: while generation is paused, the probe is scheduled and nothing else. vLLM schedules nothing at
all then, so that weights could be tried only by letting every request go on with them.

A prefix cache that outlives an update beside requests that keep their KV: vLLM's cannot be emptied while any request
holds blocks of it.
"""

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

PROBE = -1
"""The priority of the probe, and of no other request."""


class ProbeScheduler(Scheduler):
    """For an engine that begins a step when the one before has ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loads = 0
        """Not the policy's version: one that a restarted trainer makes again need not be the same weights."""

    def add_request(self, request: Request) -> None:
        self._salt(request, request.cache_salt or "")
        super().add_request(request)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Called after every load of weights. Requests that run go on with the KV they have unless they are reset.

        Those that wait have none, and will find none that the old weights made.
        """
        if reset_running_requests:
            return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))
        self._loads += 1
        for request in self.waiting:
            self._salt(request, str(request.cache_salt).partition(":")[2])
        return True

    def _salt(self, request: Request, own: str) -> None:
        """`own`: the salt that came with the request."""
        request.cache_salt = f"{self._loads}:{own}"
        request.block_hashes = []
        request.update_block_hashes()

    def get_num_unfinished_requests(self) -> int:
        """What is left to do: paused, the probe alone."""
        if self.pause_state == PauseState.PAUSED_ALL:
            return sum(map(_is_probe, self.requests.values()))
        return int(super().get_num_unfinished_requests())

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.pause_state != PauseState.PAUSED_ALL or not self.get_num_unfinished_requests():
            return super().schedule(throttle_prefills)
        frozen = [request for request in self.running if not _is_probe(request)]
        waiting = [request for request in self.waiting if not _is_probe(request)]
        self.running = [request for request in self.running if _is_probe(request)]
        self.waiting.remove_requests(waiting)
        self._pause_state = PauseState.UNPAUSED
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self._pause_state = PauseState.PAUSED_ALL
            has_no_room = bool(self.waiting)
            self.running += frozen
            self.waiting.prepend_requests(waiting)
        if has_no_room and frozen:
            # What is frozen ends only after the probe, so it would wait for ever. The next step tries again.
            newest = max(frozen, key=lambda request: (request.priority, request.arrival_time))
            self.running.remove(newest)
            self._preempt_request(newest, time.monotonic())
        return output


class AsyncProbeScheduler(ProbeScheduler, AsyncScheduler):
    """For an engine that schedules the next step while one is computed."""


def _is_probe(request: Request) -> bool:
    return bool(request.priority == PROBE)
