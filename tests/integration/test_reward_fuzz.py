"""Whatever is sent, the service answers it, stays as it was, and never says INTERNAL. Long form: `make test-fuzz`."""

import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from retort.client import Item, RewardClient
from retort.proto.reward.v1 import reward_pb2
from services.reward.checkers import Checker
from services.reward.discovery import load_checkers
from tests.hostile_texts import TEXT
from tests.reward_service import Service, children, reward_service

pytestmark = pytest.mark.timeout(300)

CHECKERS = load_checkers([])
# A program or a formula takes a thousand times as long as a comparison.
QUICK = [checker for checker in CHECKERS.values() if checker.quick]
SLOW = [checker for checker in CHECKERS.values() if not checker.quick]
LARGEST_GROWTH_MB = 60
"""What the cache of verdicts may take; a leak of a kilobyte a case would be more."""


def long(*values: object) -> object:
    return pytest.param(*values, marks=[pytest.mark.fuzz, pytest.mark.timeout(3000)])


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with reward_service("--http-port", "0") as running:
        yield running


@pytest.fixture(autouse=True)
def it_is_as_before(service: Service) -> Iterator[None]:
    with RewardClient(service.address) as client:
        client.score([Item(checker.name, "B", "5") for checker in CHECKERS.values()])
    before = resident_mb(service.process.pid)
    yield
    with RewardClient(service.address) as client:
        assert client.score([Item("mcq", "B", "B")])[0].reward == 1.0
    assert service.process.poll() is None
    assert "Traceback" not in service.read_log()
    assert resident_mb(service.process.pid) - before < LARGEST_GROWTH_MB
    assert len(children(service.process.pid)) <= 1 + 8 * (os.cpu_count() or 1)


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


def items(checkers: list[Checker]) -> st.SearchStrategy[dict[str, object]]:
    options = sorted({option for checker in checkers for option in checker.options})
    return st.fixed_dictionaries(
        {
            "checker": st.sampled_from([*(checker.name for checker in checkers), "no such checker"]),
            "completion": TEXT,
            "answer": TEXT,
            "options": st.just({}) | st.dictionaries(st.sampled_from(options), TEXT, max_size=2),
        }
    )


def over_http(http: httpx.Client, batch: list[dict[str, object]]) -> None:
    body = json.dumps({"items": [{**item, "id": str(index)} for index, item in enumerate(batch)]})
    answer = http.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
    if answer.status_code == 422:  # a lone surrogate or too large an option
        assert answer.json()["field"].startswith("items[")
        return
    assert answer.status_code == 200, answer.text
    assert [("reward" in one) != ("unscorable" in one) for one in answer.json()["results"]] == [True] * len(batch)


def over_grpc(client: RewardClient, batch: list[dict[str, object]]) -> None:
    sendable = json.loads(json.dumps(batch, ensure_ascii=False).encode(errors="replace"))
    results = client.score([Item(**item) for item in sendable])
    assert [(one.reward is None) == bool(one.unscorable) for one in results] == [True] * len(batch)


@pytest.mark.parametrize(
    ("checkers", "cases"),
    [(QUICK, 300), (SLOW, 60), long(QUICK, 40_000), long(SLOW, 10_000)],
    ids=["quick", "slow", "quick-long", "slow-long"],
)
def test_any_item_gets_a_verdict_over_both_faces(service: Service, checkers: list[Checker], cases: int) -> None:
    size = 8
    with httpx.Client(base_url=service.http, timeout=120) as http, RewardClient(service.address) as client:

        @settings(
            max_examples=cases // (2 * size),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(batch=st.lists(items(checkers), min_size=size, max_size=size))
        def both(batch: list[dict[str, object]]) -> None:
            over_http(http, batch)
            over_grpc(client, batch)

        both()


@pytest.mark.parametrize("cases", [600, long(40_000)])
def test_a_damaged_message_is_an_invalid_argument_and_never_internal(service: Service, cases: int) -> None:
    dice = random.Random(0)
    codes = set()
    whole = reward_pb2.ScoreRequest(items=[reward_pb2.Item(id="1", checker="mcq", completion="B", answer="B")])
    with grpc.insecure_channel(service.address) as channel:
        score = channel.unary_unary("/reward.v1.RewardService/Score")
        for number in range(cases):
            body = bytearray(whole.SerializeToString() if number % 2 else dice.randbytes(dice.randrange(60)))
            for _ in range(dice.randrange(4)):
                if body:
                    body[dice.randrange(len(body))] = dice.randrange(256)
            try:
                reward_pb2.ScoreResponse.FromString(score(bytes(body), timeout=10))
                codes.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.add(error.code())
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}


@pytest.mark.parametrize("cases", [100, long(5_000)])
@pytest.mark.parametrize("face", ["grpc", "http"])
def test_random_bytes_and_half_a_message_on_a_port_end_nothing(service: Service, face: str, cases: int) -> None:
    dice = random.Random(0)
    port = service.port if face == "grpc" else int(service.http.rpartition(":")[2])
    opening = {
        "grpc": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        "http": b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n",
    }[face]
    for number in range(cases):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            noise = dice.randbytes(dice.randrange(1, 2000))
            connection.sendall(opening + noise if number % 2 else noise)


@pytest.mark.parametrize("cases", [40, long(500)])
def test_any_request_that_the_api_page_allows_is_answered_as_it_says(service: Service, cases: int) -> None:
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{service.http}/openapi.json")
    codes = set()

    for operation in schema.get_all_operations():

        @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def call(case: schemathesis.Case) -> None:
            # No schema can say that ids differ and that lists are of one length.
            answer = case.call_and_validate(excluded_checks=[positive_data_acceptance])
            codes.add(answer.status_code)

        call()
    assert 200 in codes
