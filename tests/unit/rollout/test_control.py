"""The trainer's face of a rollout server, over a socket-less transport: which status and which words."""

import asyncio

import httpx
import pytest

from retort.rollouts import Message
from retort.weight_sync import CommitRequest, PrepareReply, PrepareRequest, ProbeReply, ProbeRequest, WeightManifest
from services.rollout.control import make_control_app
from services.rollout.weight_receiver import WeightReceiver
from tests.scripted_engine import ScriptedEngine

PREPARE = PrepareRequest(epoch=1, version=3, manifest=WeightManifest(buckets=[]))


class Server:
    """The app around a receiver, called without a socket."""

    def __init__(self) -> None:
        self.authorization = "Bearer right"
        self.engine = ScriptedEngine()
        self.receiver = WeightReceiver(self.engine)
        self._app = make_control_app(self.receiver, "Bearer right")

    def post(self, phase: str, message: Message | bytes) -> httpx.Response:
        body = message if isinstance(message, bytes) else message.to_bytes()
        return asyncio.run(self._request("POST", f"/weights/{phase}", body))

    async def _request(self, method: str, path: str, body: bytes) -> httpx.Response:
        # As a server does: what a route lets through becomes status 500, and is not raised here.
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        headers = {"Authorization": self.authorization}
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
            return await http.request(method, path, content=body, headers=headers)


@pytest.fixture
def server() -> Server:
    return Server()


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


@pytest.mark.parametrize("authorization", ["", "right", "Bearer wrong", "Bearer right and more", "bearer right"])
@pytest.mark.parametrize("path", ["/weights/prepare", "/weights/commit", "/docs", "/"])
def test_without_the_token_every_path_answers_alike_and_nothing_happens(
    server: Server, authorization: str, path: str
) -> None:
    server.authorization = authorization
    for method in ("GET", "POST", "PUT"):
        answer = asyncio.run(server._request(method, path, PREPARE.to_bytes()))
        assert (answer.status_code, answer.json()["error"][:12]) == (401, "send a token")
    assert server.engine.calls == []


def test_control_calls_are_posts(server: Server) -> None:
    assert asyncio.run(server._request("GET", "/weights/prepare", b"")).status_code == 405
    assert asyncio.run(server._request("GET", "/docs", b"")).status_code == 404
