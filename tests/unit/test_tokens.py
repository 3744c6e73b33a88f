"""Every HTTP route of every service, listed from the applications themselves, asked without a token."""

import asyncio
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import start_http_server
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from retort.cli import ui
from retort.tokens import PROBES, TokenRequired
from services.reward.app import make_app as make_reward_app
from services.reward.security import Security
from services.rollout.app import POLICY_PATHS, make_app
from services.rollout.control import make_control_app
from services.rollout.weight_receiver import WeightReceiver
from tests.finished_run import a_config, write_run
from tests.scripted_engine import ScriptedEngine

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
UNKNOWN = ("/", "/no/such/path", "/healthz/../v1/score", "/docs", "/openapi.json", "//metrics", "/metrics/", "/HEALTHZ")


def policy() -> FastAPI:
    """In place of vLLM's routes; tests/integration/test_inference.py asks those."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for path in [*POLICY_PATHS, "/collective_rpc"]:
        app.add_api_route(path, lambda: "answered", methods=["GET", "POST"])
    return app


SERVICES: dict[str, tuple[ASGIApp, frozenset[str]]] = {
    "reward": (make_reward_app(None, Security(frozenset({b"0" * 32}))), PROBES),  # type: ignore[arg-type]
    "rollout, control": (make_control_app(WeightReceiver(ScriptedEngine()), "Bearer right"), frozenset()),
    "rollout, public": (make_app(WeightReceiver(ScriptedEngine()), policy()), PROBES | POLICY_PATHS),
}
"""Service -> its application as it is served, and what everybody may ask of it."""


def paths(app: Any) -> Iterator[str]:
    while not hasattr(app, "routes"):
        app = app.app
    for route in app.routes:
        if isinstance(route, Mount):
            yield from paths(route.app)
        elif isinstance(route, Route):
            yield route.path.replace("{checker}", "mcq")


@pytest.mark.parametrize("service", SERVICES)
def test_only_open_paths_answer_without_a_token(service: str) -> None:
    app, open_paths = SERVICES[service]
    asked = {*paths(app), *UNKNOWN}
    assert open_paths <= asked and len(asked) > len(UNKNOWN) + 3

    async def ask_all() -> dict[tuple[str, str], int]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
            pairs = [(method, path) for method in METHODS for path in sorted(asked)]
            return {pair: (await http.request(*pair)).status_code for pair in pairs}

    answers = asyncio.run(ask_all())
    assert {path for (_, path), status in answers.items() if status != 401} == open_paths


def test_a_web_socket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = TokenRequired(policy(), lambda shown: False)
    asyncio.run(app({"type": "websocket", "path": "/healthz", "headers": []}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_trainer_has_nothing_but_metrics() -> None:
    server, thread = start_http_server(0, "127.0.0.1")
    try:
        for path in UNKNOWN:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=20) as answer:
                assert b"python_info" in answer.read(), path
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_report_has_two_paths_and_answers_this_machine_alone(tmp_path: Path) -> None:
    server = ui.make_server(write_run(tmp_path / "run", a_config(tmp_path), [0.25]), 0)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        place = f"http://127.0.0.1:{server.server_port}"
        assert server.server_address[0] == "127.0.0.1"
        answers = {
            path: _status(place + path) for path in ("/", "/stamp", "/config.toml", "/secrets/operator/redis-url")
        }
        assert [path for path, status in answers.items() if status == 200] == ["/", "/stamp"]
        assert _status(f"{place}/", "POST") == 501
        assert _status(f"{place}/", host="attacker.example:80") == 403
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _status(url: str, method: str = "GET", host: str = "") -> int:
    request = urllib.request.Request(url, method=method, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
