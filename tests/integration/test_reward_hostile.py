"""Items and clients that mean harm: nothing is lost, and the next request is served."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from retort.client import AsyncRewardClient, Item, Result, RewardClient, RewardServiceError
from retort.proto.reward.v1 import reward_pb2, reward_pb2_grpc
from tests.reward_service import Service, children, install_user_checkers, reward_service

pytestmark = pytest.mark.timeout(120)

GOOD = Item("mcq", "<answer>B</answer>", "B", id="good")
LIMIT = {"time_limit_s": "1"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    checkers = install_user_checkers(tmp_path_factory.mktemp("site-packages"))
    with reward_service("--http-port", "0", python_path=checkers) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[RewardClient]:
    with RewardClient(service.address) as connected:
        yield connected


@pytest.fixture(autouse=True)
def the_next_request_is_served(service: Service) -> Iterator[None]:
    yield
    with RewardClient(service.address, timeout_s=20) as late:
        assert [result.reward for result in late.score([GOOD])] == [1.0]
    assert service.process.poll() is None


def python(source: str) -> Item:
    return Item("python_tests", source, "assert True", {"case_limit_s": "0.5"}, id="bad")


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import os\nwhile True: os.fork()",
        "x = []\nwhile True: x.append('x' * 10**7)",
        "while True: print('x' * 1000)",
        "import os, sys; sys.stdout.close(); os.close(1); raise SystemExit",
        "import os; os.kill(os.getppid(), 9)",
        "import signal; signal.signal(15, signal.SIG_IGN)\nwhile True: pass",
        "assert open('/etc/passwd').read() is None",
        "import socket; socket.create_connection(('127.0.0.1', 80))",
        "(" * 10_000 + ")" * 10_000,
        "\x00",
    ],
)
def test_a_hostile_program_has_reward_0_and_costs_nobody_else_anything(client: RewardClient, source: str) -> None:
    good, bad = client.score([GOOD, python(source)])
    assert (good.reward, bad.reward) == (1.0, 0.0)
    assert bad.explanation


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("while True: pass", "took more than 1 s"),
        ("import os; os._exit(0)", "ended its worker process twice"),
        ("import ctypes; ctypes.string_at(0)", "ended its worker process twice"),
        ("x = 'a' * 10**9", "MemoryError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("open('/etc/passwd')", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("raise SystemExit(3)", "does raised SystemExit: 3"),
        ("import os\nfor n in range(3, 64): os.write(n, b'x' * 100)", ""),
        ("raise ValueError('\\ud800')", "ValueError: \\ud800"),
    ],
)
def test_a_checker_with_a_hole_costs_its_item_only(client: RewardClient, source: str, reason: str) -> None:
    good, bad = client.score([GOOD, Item("does", source, "", id="bad")])
    assert good.reward == 1.0
    assert bad.reward is None
    assert reason in bad.unscorable


def test_a_checker_that_cannot_be_prepared_costs_no_other_anything(service: Service) -> None:
    async def run() -> list[Result]:
        async with AsyncRewardClient(service.address) as client:
            hanging = [asyncio.create_task(client.score([Item("hangs_in_prepare", "", "")] * 20)) for _ in range(3)]
            others = [Item("cannot_prepare", "pass", ""), Item("does", "pass", ""), Item("regex", "6", "6")]
            results = await client.score(others)
            # More items that hang than there are places, and yet the others came first.
            assert [one.done() for one in hanging] == [False] * 3
            for one in hanging:
                one.cancel()
            return results

    assert [result.reward for result in asyncio.run(run())] == [1.0, 1.0, 1.0]
    assert "ValueError: not today" in service.read_log()


@pytest.mark.parametrize("answer", ["NaN", "inf", "-inf", "1e999", "\x00", "", "9" * 5000])
@pytest.mark.parametrize("checker", ["numeric", "math", "regex", "json_schema", "composite", "mcq_lenient"])
def test_a_hostile_answer_gets_a_verdict(client: RewardClient, checker: str, answer: str) -> None:
    good, bad = client.score([GOOD, Item(checker, "1", answer, LIMIT if checker == "math" else {}, id="bad")])
    assert good.reward == 1.0
    assert (bad.reward is None) == bool(bad.unscorable)


@pytest.mark.parametrize("checker", ["mcq", "mcq_lenient", "exact_match", "numeric", "regex", "json_schema", "math"])
@pytest.mark.parametrize("completion", ["a" * 10**6, "(" * 10**5, "[" * 10**5, "\\frac{" * 10**4, "1" * 10**6])
def test_a_large_or_deep_completion_gets_a_verdict(client: RewardClient, checker: str, completion: str) -> None:
    answer = {"regex": "(a+)+$", "json_schema": "{}"}.get(checker, "B" if "m" in checker and checker[1] == "c" else "5")
    options = LIMIT if checker in ("math", "json_schema", "regex") else {}
    started = time.monotonic()
    good, bad = client.score([GOOD, Item(checker, completion, answer, options, id="bad")])
    assert good.reward == 1.0
    assert (bad.reward is None) == bool(bad.unscorable)
    assert time.monotonic() - started < 20


def test_patterns_that_take_long_in_linear_time_are_stopped(client: RewardClient) -> None:
    # Too many states for RE2's automaton, which then looks at a thousand of them for each character.
    pattern = "|".join(f"{first}[ab]{{{count}}}c" for count in range(981, 991) for first in "ab")
    text = "".join(random.Random(0).choices("ab", k=100_000))
    slow = [Item("regex", text + "x" * n, pattern, LIMIT, id=str(n)) for n in range(8)]
    quick = Item("numeric", "It is 3", "3", id="quick")
    results = client.score([*slow, quick])
    assert [result.reward for result in results] == [None] * 8 + [1.0]
    assert all("took more than 1 s" in result.unscorable for result in results[:8])


def test_a_tower_of_powers_does_not_outlive_its_time(client: RewardClient) -> None:
    tower = Item("math", "$2^{" * 6 + "9999" + "}$" * 1 + "}" * 5, "3", LIMIT)
    good, bad = client.score([GOOD, tower])
    assert good.reward == 1.0
    assert bad.seconds < 20


def test_good_items_do_not_wait_for_hostile_ones(service: Service) -> None:
    """32 endless programs, streamed with good ones behind them: every good result comes before the first bad one."""

    async def run() -> list[Result]:
        bad = [Item("does", "while True: pass", "", id=f"bad-{n}") for n in range(32)]
        good = [Item("mcq", "B", "B", id=f"good-{n}") for n in range(100)]
        async with AsyncRewardClient(service.address) as client:
            return [result async for result in client.stream(bad + good)]

    results = asyncio.run(run())
    assert len(results) == 132
    first_bad = next(index for index, result in enumerate(results) if result.id.startswith("bad"))
    assert sum(result.id.startswith("good") for result in results[:first_bad]) == 100


def test_a_flood_of_endless_items_of_one_caller_delays_no_other(service: Service) -> None:
    async def run() -> list[float | None]:
        async with AsyncRewardClient(service.address) as flood, AsyncRewardClient(service.address) as other:
            flooding = asyncio.create_task(
                flood.score([Item("does", "while True: pass", "", {"time_limit_s": "40"})] * 120)
            )
            # Both lanes are full by now: 32 places, and four for each core.
            await asyncio.wait([flooding], timeout=3)
            # No endless item has ended by then, so none of them has made room.
            results = await asyncio.wait_for(other.score([Item("does", "pass", "")] * 3), timeout=35)
            flooding.cancel()
            return [result.reward for result in results]

    assert asyncio.run(run()) == [1.0] * 3


@pytest.mark.parametrize("victim", ["worker", "nursery"])
def test_a_killed_worker_and_a_killed_nursery_cost_no_verdict(victim: str, tmp_path: Path) -> None:
    """An item whose worker died runs once more; the workers die with their nursery."""
    items = [Item("does", "import time; time.sleep(2)", "", {"time_limit_s": "60"}, id=str(n)) for n in range(4)]

    async def run(service: Service) -> list[Result]:
        async with AsyncRewardClient(service.address) as client:
            scoring = asyncio.create_task(client.score(items))
            below: list[int] = []
            while len(below) < 5 and not scoring.done():
                await asyncio.wait([scoring], timeout=0.01)
                below = children(service.process.pid)
            nursery, *workers = sorted(below, key=lambda pid: psutil.Process(pid).ppid() != service.process.pid)
            assert len(workers) == 4
            os.kill(nursery if victim == "nursery" else workers[0], signal.SIGKILL)
            return await scoring

    with reward_service(python_path=install_user_checkers(tmp_path)) as service:
        results = asyncio.run(run(service))
        nurseries = service.read_log().count("nursery_started")
    assert [(result.id, result.reward) for result in results] == [(str(n), 1.0) for n in range(4)]
    assert nurseries == (2 if victim == "nursery" else 1)


def test_a_cancelled_call_leaves_no_process_running(service: Service) -> None:
    async def run() -> None:
        async with AsyncRewardClient(service.address, timeout_s=0.5) as client:
            with pytest.raises(RewardServiceError):
                endless = Item("does", "while True: pass", "", {"time_limit_s": "60"})
                await client.score([endless])

    asyncio.run(run())
    give_up = time.monotonic() + 10
    while (busy := _busy(service.process.pid)) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not busy


def _busy(pid: int) -> list[int]:
    """Children that are running now."""
    return [child for child in children(pid) if _state(child) == "R"]


def _state(pid: int) -> str:
    """The state as /proc has it, "" for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_client_that_stops_reading_holds_up_nobody(service: Service) -> None:
    async def run() -> None:
        async with grpc.aio.insecure_channel(service.address) as channel:
            call = reward_pb2_grpc.RewardServiceStub(channel).ScoreStream()
            sent = 0

            async def send() -> None:
                nonlocal sent
                while True:
                    text = "x" * 10_000
                    items = [
                        reward_pb2.Item(id=f"{sent}-{n}", checker="exact_match", completion=text, answer=text)
                        for n in range(64)
                    ]
                    await call.write(reward_pb2.ScoreStreamRequest(items=items))
                    sent += 64

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(send(), timeout=3)
            # It could not send for ever: nobody read the results.
            assert sent < 20_000
            async with AsyncRewardClient(service.address, timeout_s=10) as other:
                assert (await other.score([GOOD]))[0].reward == 1.0
            call.cancel()

    asyncio.run(run())


def test_half_a_body_over_http_holds_up_nobody(service: Service) -> None:
    host, port = service.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
        assert httpx.get(f"{service.http}/readyz").status_code == 200


def test_a_thousand_connections_at_a_time(service: Service) -> None:
    host, port = service.http.removeprefix("http://").split(":")
    body = json.dumps({"items": [{"id": "1", "checker": "mcq", "completion": "B", "answer": "B"}]}).encode()
    head = b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    async def run() -> list[bytes]:
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(1000)]
        for _, writer in opened:
            writer.write(head % len(body) + body)
        first_lines = [await asyncio.wait_for(reader.readline(), 60) for reader, _ in opened]
        for _, writer in opened:
            writer.close()
        return first_lines

    lines = asyncio.run(run())
    assert set(lines) <= {b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 429 Too Many Requests\r\n"}
    assert lines.count(b"HTTP/1.1 200 OK\r\n") > 900


def test_heads_that_never_end_shut_out_nobody_for_long() -> None:
    with reward_service("--http-port", "0", files=256) as small, contextlib.ExitStack() as opened:
        host, port = small.http.removeprefix("http://").split(":")
        for _ in range(300):
            connection = opened.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(ConnectionError):  # beyond half of its files it hangs up
                connection.sendall(b"POST /v1/score HTTP/1.1\r\nHo")
        with RewardClient(small.address, timeout_s=60) as client:
            assert client.score([GOOD])[0].reward == 1.0
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up:
            with contextlib.suppress(httpx.TransportError):
                assert httpx.get(f"{small.http}/healthz").text == "ok\n"
                break
            time.sleep(0.5)
        assert time.monotonic() < give_up
        assert "Traceback" not in small.read_log()


def test_a_thousand_grpc_connections_at_a_time(service: Service) -> None:
    async def run() -> list[reward_pb2.ScoreResponse]:
        request = reward_pb2.ScoreRequest(items=[reward_pb2.Item(id="1", checker="mcq", completion="B", answer="B")])
        # Connections of their own: channels with the same address share one otherwise.
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(service.address, options=options) for _ in range(1000)]
        try:
            calls = [reward_pb2_grpc.RewardServiceStub(one).Score(request, timeout=100) for one in channels]
            return await asyncio.gather(*calls)
        finally:
            await asyncio.gather(*(one.close() for one in channels))

    responses = asyncio.run(run())
    assert [response.results[0].reward.value for response in responses] == [1.0] * 1000


def test_nothing_is_left_over(service: Service) -> None:
    """After all of the above: few files, few processes."""
    files = len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))
    assert files < 200
    assert len(children(service.process.pid)) <= 1 + 8 * (os.cpu_count() or 1)
