"""The HTTP face of a rollout server, over a socket-less transport: which status and which words."""

import asyncio

import httpx
import pytest

from retort.rollouts import Message
from retort.weight_sync import CommitRequest, PrepareReply, PrepareRequest, ProbeReply, ProbeRequest, WeightManifest
from services.rollout import metrics
from services.rollout.app import make_app
from services.rollout.weight_receiver import WeightReceiver
from tests.scripted_engine import ScriptedEngine

PREPARE = PrepareRequest(epoch=1, version=3, manifest=WeightManifest(buckets=[]))


class Server:
    """The app around a receiver, called without a socket."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.receiver = WeightReceiver(self.engine)
        self._app = make_app(self.receiver)

    def get(self, path: str) -> httpx.Response:
        return asyncio.run(self._request("GET", path, b""))

    def post(self, phase: str, message: Message | bytes) -> httpx.Response:
        body = message if isinstance(message, bytes) else message.to_bytes()
        return asyncio.run(self._request("POST", f"/weights/{phase}", body))

    async def _request(self, method: str, path: str, body: bytes) -> httpx.Response:
        # As a server does: what a route lets through becomes status 500, and is not raised here.
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
            return await http.request(method, path, content=body)


@pytest.fixture
def server() -> Server:
    return Server()


def test_a_server_that_runs_is_healthy(server: Server) -> None:
    answer = server.get("/healthz")
    assert (answer.status_code, answer.text) == (200, "ok\n")


def test_a_server_is_ready_when_it_serves_a_committed_version(server: Server) -> None:
    def ready() -> tuple[int, str]:
        answer = server.get("/readyz")
        return answer.status_code, answer.text

    assert ready() == (503, "joining\n")
    assert server.post("prepare", PREPARE).status_code == 200
    assert ready() == (503, "updating\n")
    server.receiver._phase = "verifying"  # transfer and probe have tests of their own
    assert server.post("commit", CommitRequest(epoch=1, version=3)).status_code == 200
    assert ready() == (200, "serving policy version 3\n")


def test_metrics_are_those_of_prometheus(server: Server) -> None:
    metrics.POLICY_VERSION.set(3)
    answer = server.get("/metrics")
    assert answer.status_code == 200
    assert "rollout_policy_version 3.0\n" in answer.text
    assert "rollout_groups_total" in answer.text


def test_a_reply_is_a_message(server: Server) -> None:
    answer = server.post("prepare", PREPARE)
    assert answer.headers["content-type"] == "application/msgpack"
    assert PrepareReply.from_bytes(answer.content) == PrepareReply(num_workers=1)


def test_the_probe_answers_a_log_probability_for_every_token_but_the_first(server: Server) -> None:
    server.post("prepare", PREPARE)
    server.receiver._phase = "received"
    answer = server.post("probe", ProbeRequest(epoch=1, prompt_ids=[5, 6, 7]))
    assert ProbeReply.from_bytes(answer.content).logprobs == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "prepare: Input data was truncated"),
        (b"not msgpack at all", "prepare: "),
        (CommitRequest(epoch=1, version=1).to_bytes(), "prepare: Object missing required field `manifest`"),
        (b"\x81\xa5epoch\xa3one", "prepare: Expected `int`, got `str` - at `$.epoch`"),
    ],
)
def test_a_malformed_request_is_unprocessable_and_says_where(server: Server, body: bytes, said: str) -> None:
    answer = server.post("prepare", body)
    assert answer.status_code == 422
    assert answer.text.startswith(said)
    assert server.engine.calls == []


def test_what_a_replica_must_not_do_is_a_conflict(server: Server) -> None:
    answer = server.post("commit", CommitRequest(epoch=1, version=3))
    assert answer.status_code == 409
    assert answer.text == "commit: expected phase verifying of epoch 1, but this replica is in joining of epoch 0"


def test_a_failure_of_the_engine_carries_its_words(server: Server) -> None:
    server.engine.failures["prepare"] = RuntimeError("no KV cache left")
    answer = server.post("prepare", PREPARE)
    assert (answer.status_code, answer.text) == (500, "prepare: RuntimeError: no KV cache left")


def test_control_calls_are_posts(server: Server) -> None:
    assert server.get("/weights/prepare").status_code == 405
    assert server.get("/docs").status_code == 404
