"""The public face of a rollout server, over a socket-less transport: which status and which words."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp

from retort.weight_sync import CommitRequest, PrepareRequest, WeightManifest
from services.rollout import metrics
from services.rollout.app import make_app
from services.rollout.weight_receiver import WeightReceiver
from tests.scripted_engine import ScriptedEngine


@pytest.fixture
def receiver() -> WeightReceiver:
    return WeightReceiver(ScriptedEngine())


def get(app: ASGIApp, path: str) -> httpx.Response:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica") as http:
            return await http.get(path)

    return asyncio.run(request())


def test_a_server_that_runs_is_healthy(receiver: WeightReceiver) -> None:
    answer = get(make_app(receiver), "/healthz")
    assert (answer.status_code, answer.text) == (200, "ok\n")


def test_a_server_is_ready_when_it_serves_a_committed_version(receiver: WeightReceiver) -> None:
    def ready() -> tuple[int, str]:
        answer = get(make_app(receiver), "/readyz")
        return answer.status_code, answer.text

    assert ready() == (503, "joining\n")
    asyncio.run(receiver.prepare(PrepareRequest(epoch=1, version=3, manifest=WeightManifest(buckets=[]))))
    assert ready() == (503, "updating\n")
    receiver._phase = "verifying"  # transfer and probe have tests of their own
    asyncio.run(receiver.commit(CommitRequest(epoch=1, version=3)))
    assert ready() == (200, "serving policy version 3\n")


def test_metrics_are_those_of_prometheus(receiver: WeightReceiver) -> None:
    metrics.POLICY_VERSION.set(3)
    answer = get(make_app(receiver), "/metrics")
    assert answer.status_code == 200
    assert "rollout_policy_version 3.0\n" in answer.text
    assert "rollout_groups_total" in answer.text


def test_the_paths_of_the_policy_are_left_to_inference(receiver: WeightReceiver) -> None:
    inference = FastAPI()

    @inference.get("/v1/models")
    async def models() -> str:
        return "policy"

    assert get(make_app(receiver, inference), "/v1/models").json() == "policy"
    assert get(make_app(receiver, inference), "/healthz").text == "ok\n"
    assert get(make_app(receiver), "/v1/models").status_code == 404


def test_the_control_calls_are_not_there(receiver: WeightReceiver) -> None:
    assert get(make_app(receiver), "/weights/prepare").status_code == 401
    assert get(make_app(receiver), "/docs").status_code == 401
