"""vLLM's scheduler with a way in for the probe: while generation is paused, the probe is scheduled and nothing else.

vLLM schedules nothing at all then, so that weights could be tried only by letting every request go on with them.
"""

import time

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

PROBE = -1
"""The priority of the probe, and of no other request."""


class ProbeScheduler(Scheduler):
    """For an engine that begins a step when the one before has ended."""

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
