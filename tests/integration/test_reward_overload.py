"""A service that has as much in hand as it takes."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from retort.client import AsyncRewardClient, Item
from retort.proto.reward.v1 import reward_pb2, reward_pb2_grpc
from services.reward.admission import Admission
from services.reward.app import make_app
from services.reward.checkers import Checker, Reward, Verdict
from services.reward.isolation.pool import WorkerPool
from services.reward.scorer import Scorer
from services.reward.security import Security
from services.reward.server import MAX_STREAMED_REQUESTS, bind, make_server

pytestmark = pytest.mark.timeout(60)


class Waits(Checker):
    """Answers when it is let go."""

    name, version, description, quick = "waits", "1", "", True

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        self.entered.set()
        self.go.wait(30)
        return Reward(value=1.0, correct=True, parsed="", format_ok=True, rule="", explanation="")


@asynccontextmanager
async def small_service(checker: Waits) -> AsyncIterator[tuple[Scorer, str]]:
    """Takes two items at a time."""
    scorer = Scorer({"waits": checker}, WorkerPool(), Admission(max_items=2))
    server, _ = make_server(scorer, Security())
    address = bind(server, "127.0.0.1", 0, Security())
    await server.start()
    try:
        yield scorer, address
    finally:
        checker.go.set()
        await server.stop(grace=5)


def test_a_full_service_says_when_to_come_back() -> None:
    async def run() -> grpc.aio.AioRpcError:
        checker = Waits()
        async with small_service(checker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            score = reward_pb2_grpc.RewardServiceStub(channel).Score
            request = reward_pb2.ScoreRequest(items=[reward_pb2.Item(id=name, checker="waits") for name in ("a", "b")])
            first = asyncio.ensure_future(score(request, timeout=30))
            await asyncio.to_thread(checker.entered.wait, 30)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await score(request, timeout=30)
            checker.go.set()
            assert len((await first).results) == 2
            return refused.value

    error = asyncio.run(run())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details().startswith("2 items are in flight and 2 more would be over 2")
    trailing = dict(error.trailing_metadata())
    assert trailing["grpc-retry-pushback-ms"] == "500"
    hint = RetryInfo()
    assert Status.FromString(trailing["grpc-status-details-bin"]).details[0].Unpack(hint)
    assert hint.retry_delay.ToMilliseconds() == 500


def test_and_the_client_comes_back() -> None:
    async def run() -> list[float | None]:
        checker = Waits()
        async with small_service(checker) as (_, address), AsyncRewardClient(address, timeout_s=30) as client:
            first = asyncio.create_task(client.score([Item("waits", "", "")] * 2))
            await asyncio.to_thread(checker.entered.wait, 30)
            second = asyncio.create_task(client.score([Item("waits", "", "")]))
            # Long enough for a first refusal; the hint is half a second.
            await asyncio.wait([second], timeout=0.2)
            checker.go.set()
            return [result.reward for result in [*await first, *await second]]

    assert asyncio.run(run()) == [1.0, 1.0, 1.0]


def one_by_one(ids: str) -> AsyncIterator[Item]:
    """Items of the checker `waits`, each in a message of its own."""

    async def items() -> AsyncIterator[Item]:
        for one in ids:
            yield Item("waits", "", "", id=one)

    return items()


def test_a_stream_waits_for_room() -> None:
    async def run() -> list[str]:
        checker = Waits()
        async with small_service(checker) as (_, address), AsyncRewardClient(address, timeout_s=30) as client:

            async def read() -> list[str]:
                return [result.id async for result in client.stream(one_by_one("abcdefg"))]

            reading = asyncio.create_task(read())
            await asyncio.to_thread(checker.entered.wait, 30)
            # The third would be refused by now.
            await asyncio.wait([reading], timeout=0.2)
            checker.go.set()
            return await reading

    assert sorted(asyncio.run(run())) == list("abcdefg")


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (b"\xff", "the request is no message of proto/reward/v1/reward.proto"),
        (
            reward_pb2.ScoreStreamRequest(items=[{"id": "b"}, {"id": "a"}]).SerializeToString(),
            "items[1].id: 'a' is also the id of an item without a result so far",
        ),
    ],
    ids=["no message", "an id in use"],
)
def test_a_malformed_message_ends_a_stream_behind_the_results_in_flight(
    second: bytes, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> tuple[list[str], grpc.aio.AioRpcError]:
        checker = Waits()
        async with small_service(checker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream("/reward.v1.RewardService/ScoreStream")(timeout=30)
            first = reward_pb2.ScoreStreamRequest(items=[{"id": "a", "checker": "waits"}])
            await call.write(first.SerializeToString())
            await asyncio.to_thread(checker.entered.wait, 30)
            await call.write(second)
            # Else the item might end first, and its id be free: calls behind it on the same connection were answered.
            for _ in range(3):
                await channel.unary_unary("/reward.v1.RewardService/ListCheckers")(b"")
            checker.go.set()
            response = reward_pb2.ScoreStreamResponse.FromString(await call.read())
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call.read()
            return [result.id for result in response.results], ended.value

    ids, error = asyncio.run(run())
    assert ids == ["a"]
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(problem)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


class Large(Waits):
    """Answers at once, with a text that soon fills what a connection holds."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[str] = []

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        self.answers.append(answer)
        return Reward(value=1.0, correct=True, parsed="x" * 100_000, format_ok=True, rule="", explanation="")


def test_a_client_that_goes_without_reading_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    def streams() -> list[str]:
        names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
        return [name for name in names if name.startswith("_Stream")]

    async def until(is_so: Callable[[], bool]) -> None:
        give_up = asyncio.get_running_loop().time() + 30
        while not is_so():
            assert asyncio.get_running_loop().time() < give_up, streams()
            await asyncio.sleep(0.05)

    async def run() -> None:
        checker = Large()
        async with small_service(checker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream("/reward.v1.RewardService/ScoreStream")(timeout=50)
            for number in range(3 * MAX_STREAMED_REQUESTS):
                request = reward_pb2.ScoreStreamRequest(items=[{"id": str(number), "checker": "waits"}])
                await call.write(request.SerializeToString())
            # As many results as wait to be sent, one that is being sent, and one that finds no place.
            await until(lambda: len(checker.answers) >= MAX_STREAMED_REQUESTS + 2)
            await asyncio.sleep(0.2)
            call.cancel()
            await until(lambda: not streams())

    asyncio.run(run())
    assert not [record for record in caplog.records if "raised" in record.getMessage()]


def test_a_full_service_says_the_same_over_http() -> None:
    async def run() -> httpx.Response:
        checker = Waits()
        async with small_service(checker) as (scorer, _):
            transport = httpx.ASGITransport(make_app(scorer, Security()))
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
                body = {"items": [{"id": name, "checker": "waits", "completion": "", "answer": ""} for name in "ab"]}
                first = asyncio.create_task(http.post("/v1/score", json=body))
                await asyncio.to_thread(checker.entered.wait, 30)
                refused = await http.post("/v1/score", json=body)
                checker.go.set()
                assert (await first).status_code == 200
                return refused

    refused = asyncio.run(run())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"].startswith("2 items are in flight")
