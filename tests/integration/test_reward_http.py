"""The HTTP/JSON face of the reward service, over a socket."""

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from retort.proto.reward.v1 import reward_pb2, reward_pb2_grpc
from tests.reward_service import Service, install_user_checkers, reward_service

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    checkers = install_user_checkers(tmp_path_factory.mktemp("site-packages"))
    with reward_service("--http-port", "0", "--shadow", "mcq=mcq_lenient", python_path=checkers) as running:
        yield running


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.http, timeout=30) as client:
        yield client


def item(**changes: object) -> dict[str, object]:
    return {"id": "1", "checker": "mcq", "completion": "<answer>B</answer>", "answer": "B", **changes}


def test_a_reward_lies_flat_and_an_unscorable_item_has_a_reason_and_no_reward(http: httpx.Client) -> None:
    answer = http.post("/v1/score", json={"items": [item(), item(id="2", checker="mqc"), item(id="3", answer="C")]})
    assert answer.status_code == 200
    right, unknown, wrong = answer.json()["results"]
    assert 0 <= right.pop("seconds") < 1
    assert right == {
        "id": "1",
        "reward": 1.0,
        "correct": True,
        "parsed": "B",
        "format_ok": True,
        "rule": "last_answer_tag",
        "explanation": "read 'B', the answer is 'B'",
        "checker": "mcq@1",
    }
    assert unknown.keys() == {"id", "unscorable", "checker", "seconds"}
    assert unknown["unscorable"]["reason"].startswith("no checker 'mqc'; known: ")
    assert (wrong["id"], wrong["reward"], wrong["correct"]) == ("3", 0.0, False)


def test_a_body_without_the_header_of_json_is_told_so(http: httpx.Client) -> None:
    answer = http.post("/v1/score", content=json.dumps({"items": [item()]}))
    assert answer.status_code == 422
    assert answer.json()["error"].endswith("send the header Content-Type: application/json")


def test_a_composite_runs_its_parts_where_they_belong(http: httpx.Client) -> None:
    parts = [
        {"checker": "mcq", "answer": "B", "weight": 3},
        {"checker": "python_tests", "answer": "assert False"},
        {"checker": "regex", "answer": "answer", "weight": 0, "gate": True},
    ]
    answer = http.post("/v1/score", json={"items": [item(checker="composite", answer=json.dumps(parts))]})
    (result,) = answer.json()["results"]
    assert (result["reward"], result["rule"], result["checker"]) == (0.75, "weighted_mean", "composite@1")


@pytest.mark.parametrize(
    ("items", "field"),
    [
        ([], "items"),
        ([item(), item()], "items[1].id"),
        ([item(id="")], "items[0].id"),
        ([item(id=7)], "items[0].id"),
        ([item(id="x" * 257)], "items[0].id"),
        ([item(checker="x" * 257)], "items[0].checker"),
        ([item(answer=float("nan"))], "items[0].answer"),
        ([item(colour="red")], "items[0].colour"),
        ([item(options={"a": 1})], "items[0].options.a"),
        ([item(options={str(n): "" for n in range(65)})], "items[0].options"),
        ([item(metadata={"a": "x" * 65_537})], "items[0].metadata"),
        ([item(id="\ud800")], "items[0].id"),
    ],
)
def test_a_malformed_request_is_refused_by_field(http: httpx.Client, items: list[object], field: str) -> None:
    answer = http.post("/v1/score", content=json.dumps({"items": items}), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"\xff\xfe", 400),
        (b"", 422),
        (b"1", 422),
        (b'{"items":[' + b"{}," * 1_000_000 + b"{}]}", 422),
        (b"x" * (17 << 20), 413),
    ],
    ids=["half", "deep", "no UTF-8", "empty", "a number", "many items", "too large"],
)
def test_a_body_that_is_no_request_is_refused(http: httpx.Client, body: bytes, status: int) -> None:
    answer = http.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json().keys()) == (status, {"error", "field"})


def test_a_lone_surrogate_costs_its_item_only(http: httpx.Client) -> None:
    bad = [item(id=checker, checker=checker, completion="\ud800", answer="5") for checker in ("math", "mcq", "regex")]
    answer = http.post(
        "/v1/score", content=json.dumps({"items": [item(), *bad]}), headers={"Content-Type": "application/json"}
    )
    good, *others = answer.json()["results"]
    assert good["reward"] == 1.0
    assert ["unscorable" in other for other in others] == [True, True, True]


def test_an_equal_item_for_a_worker_is_remembered(http: httpx.Client) -> None:
    items = {"items": [item(checker="math", completion="$77$", answer="77")]}
    first, second = (http.post("/v1/score", json=items).json()["results"][0] for _ in range(2))
    assert (first["reward"], second["reward"]) == (1.0, 1.0)
    metrics = http.get("/metrics").text
    label = re.search(r'reward_verdicts_total\{(checker="math@[^"]+")', metrics)
    assert label is not None
    # The same label wherever verdicts are counted or timed, so that the series join.
    assert f"reward_verdicts_cached_total{{{label[1]}}} 1.0" in metrics
    assert f"reward_worker_item_seconds_count{{{label[1]}}}" in metrics
    assert 'reward_items_waiting{checker="math"} 0.0' in metrics


def test_probes_metrics_and_the_api_page(http: httpx.Client) -> None:
    assert http.get("/healthz").text == "ok\n"
    assert http.get("/readyz").text == "ready\n"
    assert 'reward_verdicts_total{checker="mcq@1",outcome="correct"}' in http.get("/metrics").text
    assert http.get("/docs").status_code == 200
    names = {checker["name"] for checker in http.get("/v1/checkers").json()["checkers"]}
    assert {"mcq", "math", "does"} < names


def test_the_examples_of_the_api_page_run(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    answer = http.post("/v1/score", json=schemas["ScoreBody"]["examples"][0])
    expected = schemas["ResultsBody"]["examples"][0]["results"]
    for result, promised in zip(answer.json()["results"], expected, strict=True):
        assert result.keys() == promised.keys()
        assert result.get("reward") == promised.get("reward")


def test_the_examples_of_the_checkers_have_the_rewards_that_they_promise(http: httpx.Client) -> None:
    checkers = http.get("/v1/checkers").json()["checkers"]
    examples = [(checker["name"], example) for checker in checkers for example in checker["examples"]]
    items = [
        {"id": str(n), "checker": name, **{key: example[key] for key in ("completion", "answer", "options")}}
        for n, (name, example) in enumerate(examples)
    ]
    results = http.post("/v1/score", json={"items": items}).json()["results"]
    assert [result.get("reward") for result in results] == [example["reward"] for _, example in examples]
    assert len(examples) > 15


def test_a_shadow_that_disagrees_is_reported(service: Service, http: httpx.Client) -> None:
    http.post("/v1/score", json={"items": [item(id="shadowed", completion="The answer is (B)")]})
    for _ in range(100):
        if "shadow_disagrees id=shadowed" in service.read_log():
            break
        http.get("/healthz")
    assert "checker=mcq reward=0 shadow=mcq_lenient@1 shadow_reward=1" in service.read_log()
    assert (
        'reward_shadow_verdicts_total{checker="mcq",outcome="disagree",shadow="mcq_lenient"}'
        in http.get("/metrics").text
    )


def test_the_bodies_of_slime_and_openrlhf_are_answered_as_they_expect(http: httpx.Client) -> None:
    slime = {"prompt": "?", "response": "<answer>B</answer>", "label": "B"}
    assert http.post("/compat/slime/mcq", json=slime).json() == 1.0
    openrlhf = {"query": ["?<answer>B</answer>", "?<answer>C</answer>"], "prompts": ["?", "?"], "labels": ["B", "B"]}
    assert http.post("/compat/openrlhf/mcq", json=openrlhf).json() == {
        "rewards": [1.0, 0.0],
        "scores": [1.0, 0.0],
        "extra_logs": {},
    }


def test_a_label_is_a_text_or_a_number_and_nothing_else(http: httpx.Client) -> None:
    assert http.post("/compat/slime/exact_match", json={"response": "7", "label": 7}).json() == 1.0
    slime = http.post("/compat/slime/exact_match", json={"response": "1", "label": True})
    assert (slime.status_code, slime.json()["field"]) == (422, "label")
    openrlhf = {"query": ["1", "1"], "prompts": ["", ""], "labels": ["1", None]}
    answer = http.post("/compat/openrlhf/exact_match", json=openrlhf)
    assert (answer.status_code, answer.json()["field"]) == (422, "labels[1]")


def test_these_bodies_never_get_0_for_an_unscorable_item(http: httpx.Client) -> None:
    answer = http.post("/compat/slime/mcq", json={"prompt": "?", "response": "B", "label": ""})
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (422, "unscorable")
    body = {"query": ["B"], "prompts": [""], "labels": [""]}
    assert http.post("/compat/openrlhf/mcq", json=body).status_code == 422


def test_a_client_that_leaves_stops_its_item(service: Service, http: httpx.Client) -> None:
    endless = item(checker="does", completion="while True: pass", options={"time_limit_s": "60"})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service.http}/v1/score", json={"items": [endless]}, timeout=1)
    give_up = time.monotonic() + 30
    while "reward_items_in_flight 0.0" not in (text := http.get("/metrics").text):
        assert time.monotonic() < give_up, text
        time.sleep(0.02)


def test_bodies_that_stall_do_not_fill_the_memory(service: Service, http: httpx.Client) -> None:
    host, port = service.http.removeprefix("http://").split(":")
    head = b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 16000000\r\n\r\n"
    stalled = []
    try:
        for _ in range(24):
            stalled.append(connection := socket.create_connection((host, int(port))))
            connection.sendall(head + b"x" * 15_900_000)
        large = http.post("/v1/score", json={"items": [item(completion="x" * 15_000_000)]})
        assert (large.status_code, large.headers["retry-after"]) == (429, "1")
        assert http.post("/v1/score", json={"items": [item()]}).status_code == 200
    finally:
        for connection in stalled:
            connection.close()
    memory = Path(f"/proc/{service.process.pid}/status").read_text()
    peak_kib = int(memory.partition("VmHWM:")[2].split()[0])
    assert peak_kib < 600 << 10
    give_up = time.monotonic() + 30
    while http.post("/v1/score", json={"items": [item(completion="x" * 15_000_000)]}).status_code != 200:
        assert time.monotonic() < give_up, "the bodies of connections that closed are still counted"


def test_a_drain_has_one_deadline_for_both_faces_and_says_what_it_cut_off(tmp_path: Path) -> None:
    endless = item(checker="does", completion="while True: pass", options={"time_limit_s": "60"})

    async def run(service: Service) -> tuple[httpx.Response, grpc.StatusCode, float]:
        async with (
            httpx.AsyncClient(base_url=service.http, timeout=60) as http,
            grpc.aio.insecure_channel(service.address) as channel,
        ):
            over_http = asyncio.create_task(http.post("/v1/score", json={"items": [endless]}))
            request = reward_pb2.ScoreRequest(items=[reward_pb2.Item(**endless)])  # type: ignore[arg-type]
            over_grpc = reward_pb2_grpc.RewardServiceStub(channel).Score(request, timeout=60)
            while "reward_items_in_flight 2.0" not in (await http.get("/metrics")).text:
                await asyncio.wait([over_http, asyncio.ensure_future(over_grpc.code())], timeout=0.1)
            service.process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            answers = await over_http, await over_grpc.code()
            await asyncio.to_thread(service.process.wait, 60)
            return *answers, time.monotonic() - started

    with reward_service("--http-port", "0", python_path=install_user_checkers(tmp_path)) as service:
        cut_off, code, seconds = asyncio.run(run(service))
        assert (cut_off.status_code, cut_off.json()["field"]) == (503, "")
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert 9 < seconds < 18
        assert "Traceback" not in service.read_log()


def test_a_service_that_drains_finishes_what_it_has(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")

    async def run() -> None:
        with reward_service("--http-port", "0", python_path=install_user_checkers(tmp_path)) as service:
            slow = item(checker="waits", answer=str(pipe))
            async with httpx.AsyncClient(base_url=service.http, timeout=20) as client:
                call = asyncio.create_task(client.post("/v1/score", json={"items": [slow]}))
                while "reward_items_in_flight 1.0" not in (await client.get("/metrics")).text:
                    assert not call.done()
                    await asyncio.wait([call], timeout=0.02)
                service.process.send_signal(signal.SIGTERM)
                while "draining" not in service.read_log():
                    assert not call.done()
                    await asyncio.wait([call], timeout=0.02)
                await asyncio.to_thread(pipe.write_text, "go on")
                assert (await call).json()["results"][0]["reward"] == 0.25
            assert await asyncio.to_thread(service.process.wait, 15) == 0

    asyncio.run(run())
