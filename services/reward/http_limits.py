"""What stands before the HTTP routes: the size of a body, and the time it may take."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.reward.requests import MAX_REQUEST_BYTES

BODY_S = 30.0
"""Longest time for a body to arrive."""
MAX_HELD_BYTES = 256 << 20
"""Of all bodies together."""
SMALL_BODY_BYTES = 1 << 16
"""A body of this size is taken all the same: a few large ones that stall must not shut out everybody."""
MAX_UNREAD_BYTES = 4 * MAX_REQUEST_BYTES


class BodyLimit:
    """Reads the body before the application sees the request; refuses one that is too large or too slow."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._held = 0
        """Bytes of all bodies that have arrived and are not answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(BODY_S):
                    refused = await self._read(receive, parts)
            except TimeoutError:
                refused = 408, f"the body did not arrive within {BODY_S:g} s; send it again"
            if refused is not None:
                await _answer(send, *refused)
                return
            parts[:] = [b"".join(parts)]
            unread: list[Message] = [{"type": "http.request", "body": parts[0], "more_body": False}]

            async def replay() -> MutableMapping[str, Any]:
                return unread.pop() if unread else await receive()

            await self._app(scope, replay, send)
        finally:
            self._forget(parts)

    async def _read(self, receive: Receive, parts: list[bytes]) -> tuple[int, str] | None:
        """Status and reason of a refusal. No parts if the client left, which the application then learns."""
        size = 0
        refused: tuple[int, str] | None = None
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self._forget(parts)
                return None
            part = message.get("body", b"")
            size += len(part)
            parts.append(part)
            self._held += len(part)
            if size > MAX_REQUEST_BYTES:
                refused = 413, f"the body is over {MAX_REQUEST_BYTES} bytes; send several batches"
            elif self._held > MAX_HELD_BYTES and size > SMALL_BODY_BYTES and refused is None:
                refused = 429, f"the bodies in hand are over {MAX_HELD_BYTES} bytes; try again"
            if refused is not None:
                # Read on, and forget: closing with unread bytes resets the connection before the answer is read.
                self._forget(parts)
            if not message.get("more_body", False) or size > MAX_UNREAD_BYTES:
                return refused

    def _forget(self, parts: list[bytes]) -> None:
        self._held -= sum(map(len, parts))
        parts.clear()


async def _answer(send: Send, status: int, error: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode({"error": error, "field": ""})})
