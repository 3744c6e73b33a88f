"""What stands before the HTTP routes of a service: what is not on its list of open paths wants a token."""

import json
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""What everybody may ask of every service: orchestrators and Prometheus have no token."""
REFUSAL = json.dumps({"error": "send a token of this service: Authorization: Bearer TOKEN", "field": ""}).encode()


class TokenRequired:
    """Lets through what asks for an open path or shows a token; all else gets 401, path or no path."""

    def __init__(self, app: ASGIApp, accepts: Callable[[bytes], bool], open_paths: frozenset[str] = PROBES) -> None:
        """`accepts`: whether this is the `Authorization` header of somebody who may call."""
        self.app = app
        self._accepts = accepts
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        shown = next((value for key, value in scope["headers"] if key == b"authorization"), b"")
        if scope["type"] == "http" and (scope["path"] in self._open_paths or self._accepts(shown)):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            kind = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 401, "headers": kind})
            await send({"type": "http.response.body", "body": REFUSAL})
        else:  # a WebSocket, of which no service has one
            await send({"type": "websocket.close", "code": 1008})
        return None
