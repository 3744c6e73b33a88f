"""Runs the faces of the service together, from the first listening socket to the last answer."""

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from retort.config import ConfigError
from retort.network import address_of, family_of
from retort.telemetry import log_event
from services.reward.app import make_app
from services.reward.checkers import Checker
from services.reward.scorer import Scorer, open_scorer
from services.reward.security import Security
from services.reward.server import bind, make_server, report_health

DRAIN_S = 10.0
KEEP_ALIVE_S = 30
HEAD_S = 10.0
"""Longest time for the head of a request over HTTP to arrive."""
MAX_CONNECTIONS = 4096
"""Over HTTP."""
BACKLOG = 64
"""Connections that are accepted in one go, which asyncio does without a look at how many there are."""


async def serve(
    checkers: Mapping[str, Checker],
    host: str,
    grpc_port: int,
    http_port: int | None,
    security: Security,
    shadows: Mapping[str, str],
    stop: asyncio.Event,
) -> None:
    """Serve until `stop` is set, then drain: not ready, no new calls, up to DRAIN_S for those in flight.

    Port 0 lets the system choose, no HTTP port means no HTTP; the event "ready" in the log names the addresses.
    Raises ConfigError if an address cannot be bound.
    """
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    async with open_scorer(checkers, shadows) as scorer:
        server, health = make_server(scorer, security)
        addresses = {"address": bind(server, host, grpc_port, security)}
        async with _http(scorer, host, http_port, security, addresses) as drain_http:
            await server.start()
            await report_health(health)
            fields: dict[str, Any] = {**addresses, "checkers": ",".join(checkers)}
            log_event("ready", **fields)
            await stop.wait()

            log_event("draining", at_most_s=DRAIN_S)
            # Before the ports close: a load balancer that watches must hear it from us, not from failing calls.
            await health.enter_graceful_shutdown()
            await asyncio.gather(server.stop(grace=DRAIN_S), drain_http())
    log_event("stopped")


@contextlib.asynccontextmanager
async def _http(
    scorer: Scorer, host: str, port: int | None, security: Security, addresses: dict[str, str]
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Serves HTTP within the context, and adds its address; yields what drains it."""
    if port is None:
        yield _nothing
        return
    app = make_app(scorer, security)
    listening = _listen(host, port)
    addresses["http"] = address_of(host, listening.getsockname()[1])
    server = uvicorn.Server(_http_config(app, security))
    serving = asyncio.create_task(_serve(server, listening))

    async def drain() -> None:
        app.state.service.ready = False
        server.should_exit = True
        await serving

    try:
        yield drain
    finally:
        await drain()


async def _nothing() -> None:
    pass


async def _serve(server: uvicorn.Server, listening: socket.socket) -> None:
    # Not server.serve(): that takes the signals, which are for both faces together.
    await server._serve([listening])


class _Connection(H11Protocol):
    """A connection that has HEAD_S for the head of each request, and ends at once if there are too many."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            transport.abort()
        self._time_the_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_the_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _time_the_head(self) -> None:
        in_a_request = self.cycle is not None and not self.cycle.response_complete
        if in_a_request and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not in_a_request and self._late is None:
            self._late = self.loop.call_later(HEAD_S, self.transport.close)


def _most_connections() -> int:
    """At most half of the files that this process can open, the others being for gRPC and for workers, and as many
    fewer as may be accepted before the first of those that are too many is hung up.
    """
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - BACKLOG)


def _http_config(app: object, security: Security) -> uvicorn.Config:
    tls = security.tls
    files: dict[str, object] = {}
    if tls is not None:
        files = {"ssl_certfile": tls.certificate_file, "ssl_keyfile": tls.key_file}
        if tls.client_authority_file is not None:
            files |= {"ssl_ca_certs": str(tls.client_authority_file), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=_Connection,
        limit_concurrency=_most_connections(),
        backlog=BACKLOG,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=int(DRAIN_S),
        timeout_keep_alive=KEEP_ALIVE_S,
        **files,  # type: ignore[arg-type]
    )


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(family_of(host), socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"the reward service cannot listen on {host}:{port} for HTTP: {error.strerror}. "
            "Choose another --http-port (0: any free one) or --host."
        ) from None
    return listening
