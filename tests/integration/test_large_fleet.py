"""A transfer in which nobody answers before all have joined, as real ones do, to more replicas than a client's pool."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import uvicorn
from starlette.types import Receive, Scope, Send

from retort.weight_sync import CommitRequest
from services.rollout.__main__ import listen
from tests.integration.queue_run import Run, a_member
from tests.integration.test_weight_sender import a_sender

REPLICAS = 120


class AllAtOnce:
    """Answers when so many have asked."""

    def __init__(self, parties: int) -> None:
        self._parties = parties
        self._asked = 0
        self._all_there = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        self._asked += 1
        if self._asked == self._parties:
            self._all_there.set()
        await self._all_there.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def a_server() -> Iterator[str]:
    listening = listen("127.0.0.1", 0)
    listening.listen(REPLICAS)
    server = uvicorn.Server(uvicorn.Config(AllAtOnce(REPLICAS), log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def test_every_replica_of_a_large_fleet_is_called_at_once(run: Run) -> None:
    sender, request = a_sender(run), CommitRequest(epoch=1, version=0)

    async def ask(url: str) -> int:
        members = [a_member(f"rollout-{number}") for number in range(REPLICAS)]
        requests = [(msgspec.structs.replace(member, control_url=url), request) for member in members]
        async with sender._client() as http:
            return len(await sender._ask(http, "transfer", requests, CommitRequest))

    with a_server() as url:
        assert asyncio.run(ask(url)) == REPLICAS
