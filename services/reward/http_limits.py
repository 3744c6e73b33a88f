"""What stands before the HTTP routes: the size of a body, and the time it may take."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.reward.requests import MAX_REQUEST_BYTES

BODY_S = 30.0
"""Longest time for a body to arrive."""
MAX_UNREAD_BYTES = 4 * MAX_REQUEST_BYTES


class BodyLimit:
    """Reads the body before the application sees the request; refuses one that is too large or too slow."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive)
        except TimeoutError:
            await _answer(send, 408, f"the body did not arrive within {BODY_S:g} s; send it again")
            return
        if body is None:
            await _answer(send, 413, f"the body is over {MAX_REQUEST_BYTES} bytes; send several batches")
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if it is too large. Empty if the client left, which the application then learns."""
    parts: list[bytes] = []
    size = 0
    refused = False
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_REQUEST_BYTES:
            # Read on, and forget: closing with unread bytes resets the connection before the answer is read.
            refused = True
            parts.clear()
        if not message.get("more_body", False) or size > MAX_UNREAD_BYTES:
            return None if refused else b"".join(parts)


async def _answer(send: Send, status: int, error: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode({"error": error, "field": ""})})
