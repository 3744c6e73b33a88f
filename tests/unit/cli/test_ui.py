"""`retort ui`: the page is made anew when the run goes on, and only for this machine."""

import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from retort.cli.ui import make_server
from retort.config import ConfigError
from tests.finished_run import a_config, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", a_config(tmp_path), [0.25, 0.5], exit_code=None)


@pytest.fixture
def address(run: Path) -> Iterator[str]:
    with make_server(run, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def get(url: str, host: str | None = None) -> str:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def test_the_page_is_newer_once_the_run_went_on(run: Path, address: str) -> None:
    page, stamp = get(address), get(f"{address}/stamp")
    assert f'data-stamp="{stamp}"' in page
    assert "step 1" in page
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 2, "critic/score/mean": 0.5}\n')
    os.utime(metrics, (1, 1))
    assert get(f"{address}/stamp") != stamp
    assert "step 2" in get(address)


def test_the_page_may_ask_its_server_and_nobody_else(address: str) -> None:
    assert "connect-src 'self';" in get(address)


def test_another_name_for_the_address_is_refused(address: str) -> None:
    with pytest.raises(HTTPError, match="403"):
        get(address, host="example.org:80")


def test_nothing_but_the_page_is_served(address: str) -> None:
    with pytest.raises(HTTPError, match="404"):
        get(f"{address}/config.toml")


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run directory"):
        make_server(tmp_path / "nowhere", port=0)
