"""A replica as the trainer sees it: the service's own receiver and routes around an engine, on a real HTTP server."""

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, MutableMapping
from typing import Any, Self, TypeVar

import httpx
import uvicorn
from starlette.types import ASGIApp

from retort.network import address_of
from retort.queues import Member, RolloutQueue
from retort.weight_sync import authorization
from services.rollout.__main__ import listen
from services.rollout.app import make_app
from services.rollout.control import make_control_app
from services.rollout.weight_receiver import WeightReceiver
from tests.integration.queue_run import Run

AUTHORIZATION = authorization({"CONTROL_TOKEN": "for-this-test-only"})
T = TypeVar("T")


class Replica:
    """Use as a context: inside, it answers HTTP and is a member of the run. It can be made not to answer one call.

    Unlike the service it has one port for both of its faces.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        engine: Any,
        *,
        silent_at: str = "",
        host: str = "127.0.0.1",
        inference: Callable[[WeightReceiver], ASGIApp] | None = None,
    ) -> None:
        self.name = name
        self.incarnation = uuid.uuid4().hex
        self.calls: list[str] = []
        self.engine = engine
        self.receiver = WeightReceiver(engine)
        self._run = run
        self._queue: RolloutQueue = run.replica(name)
        self._silent_at = silent_at
        self.public = make_app(self.receiver, inference(self.receiver) if inference else None)
        self.control = make_control_app(self.receiver, AUTHORIZATION)
        self._socket = listen(host, 0)
        self.url = f"http://{address_of(host, self._socket.getsockname()[1])}"
        config = uvicorn.Config(self._asgi, interface="asgi3", log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._server.serve([self._socket]))

    def wait(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Have something done in the replica's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _asgi(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        call = scope["path"].rpartition("/")[2]
        if scope["method"] == "POST":
            self.calls.append(call)
        if call == self._silent_at:
            await asyncio.Event().wait()
        app = self.control if scope["path"].startswith("/weights/") else self.public
        await app(scope, receive, send)

    def announce(self) -> None:
        """Say that it is there. Raises Evicted when the trainer went on without it."""
        member = Member(
            name=self.name,
            pid=1,
            host="localhost",
            control_url=self.url,
            http_url=self.url,
            policy_version=self.receiver.served_version,
            state=self.receiver.state,  # type: ignore[arg-type]
            incarnation=self.incarnation,
            groups_in_hand=0,
            tokens_generated=0,
            waiting_for="",
            updated=time.time(),
        )
        self._run.wait(self._queue.announce(member))

    def says_it_serves(self, version: int) -> bool:
        answer = httpx.get(f"{self.url}/readyz")
        return answer.status_code == 200 and answer.text == f"serving policy version {version}\n"

    def __enter__(self) -> Self:
        self._socket.listen()  # before it announces itself: the trainer may call at once
        self._thread.start()
        self.announce()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
