"""The figures of the reward service, all in one run: `python -m benchmarks.reward [--seconds 3]`.

Everything runs on this machine, so that clients and servers share its cores; ratios within one run are what counts.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import httpx

from retort.client import AsyncRewardClient, Item
from retort.proto.reward.v1 import reward_pb2 as pb
from services.reward.checkers import Reward
from services.reward.checkers.math import Math
from services.reward.checkers.mcq import MultipleChoice
from services.reward.checkers.python_tests import PythonTests
from tests.reward_service import ROOT, reward_service

BATCH = 256
WORDS = (
    *("the", "atom", "has", "two", "protons", "and", "so", "its", "number", "is"),
    *("two", "because", "of", "that", "we", "take", "this", "option"),
)
OPTIONS = [("grpc.max_receive_message_length", -1)]
PROGRAM = "```python\ndef double(x):\n    return 2 * x\n```"


def completion(dice: random.Random, words: int = 300) -> str:
    """About 300 words, as models write them, and a letter."""
    return f"{' '.join(dice.choices(WORDS, k=words))} <answer>{dice.choice('ABCD')}</answer>"


def batch(dice: random.Random) -> list[pb.Item]:
    return [pb.Item(id=str(n), checker="mcq", completion=completion(dice), answer="B") for n in range(BATCH)]


async def echo(port_file: str) -> None:
    """The limit of the transport: the same library and messages, and no work.

    `Returned` decodes the request and sends it back, which is what an echo is. `Built` answers as the service does,
    with one result message made for each item. `Prepared` sends one response that was made before, for all requests.
    """
    verdict = MultipleChoice().check("<answer>B</answer>", "B", {})
    assert isinstance(verdict, Reward)

    def built(item: pb.Item) -> pb.Result:
        reward = pb.Reward(
            value=verdict.value,
            correct=verdict.correct,
            parsed=verdict.parsed,
            format_ok=verdict.format_ok,
            rule=verdict.rule,
            explanation=verdict.explanation,
        )
        return pb.Result(id=item.id, reward=reward, checker="mcq@1", seconds=1e-6)

    prepared = pb.ScoreResponse(results=[built(item) for item in batch(random.Random(0))])

    async def send_returned(request: pb.ScoreRequest, context: object) -> pb.ScoreRequest:
        return request

    async def send_built(request: pb.ScoreRequest, context: object) -> pb.ScoreResponse:
        return pb.ScoreResponse(results=[built(item) for item in request.items])

    async def send_prepared(request: pb.ScoreRequest, context: object) -> pb.ScoreResponse:
        return prepared

    server = grpc.aio.server()
    methods = {
        name: grpc.unary_unary_rpc_method_handler(method, pb.ScoreRequest.FromString, response.SerializeToString)
        for name, method, response in (
            ("Returned", send_returned, pb.ScoreRequest),
            ("Built", send_built, pb.ScoreResponse),
            ("Prepared", send_prepared, pb.ScoreResponse),
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    Path(f"{port_file}.part").write_text(str(port))
    os.replace(f"{port_file}.part", port_file)
    await server.wait_for_termination()


@contextmanager
def echo_server() -> Iterator[tuple[int, str]]:
    port_file = ROOT / f".echo-{os.getpid()}"
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.reward", "--echo", str(port_file)], cwd=ROOT)
    try:
        give_up = time.monotonic() + 30
        while not port_file.exists() and time.monotonic() < give_up:
            time.sleep(0.02)
        yield process.pid, f"127.0.0.1:{port_file.read_text()}"
    finally:
        process.kill()
        process.wait()
        port_file.unlink(missing_ok=True)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def saturate(
    call: Callable[[int], Awaitable[object]], seconds: float, pid: int, lanes: int = 3
) -> dict[str, float]:
    """Call from several lanes without a pause: calls a second, and the server's CPU time for each."""
    done = 0
    end = time.perf_counter() + seconds

    async def lane(number: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await call(number)
            done += 1

    before, started = cpu_seconds(pid), time.perf_counter()
    await asyncio.gather(*(lane(number) for number in range(lanes)))
    wall = time.perf_counter() - started
    return {"per_s": done / wall, "server_cpu_ms": (cpu_seconds(pid) - before) / done * 1e3}


async def paced(call: Callable[[int], Awaitable[object]], per_s: float, seconds: float) -> list[float]:
    """Call at random moments, so often on average and however long answers take; seconds from each planned start."""
    dice = random.Random(3)
    moments = list(itertools.accumulate(dice.expovariate(per_s) for _ in range(int(per_s * seconds))))
    taken: list[float] = []
    first = time.perf_counter()

    async def one(number: int, moment: float) -> None:
        planned = first + moment
        await asyncio.sleep(max(0.0, planned - time.perf_counter()))
        await call(number)
        taken.append(time.perf_counter() - planned)

    await asyncio.gather(*(one(number, moment) for number, moment in enumerate(moments)))
    return taken


def percentiles(taken: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(taken, n=100)
    return {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3}


async def measure_mcq(seconds: float) -> dict[str, object]:
    """Batches over gRPC beside the echo, in turns, so that a change of the machine's load meets all of them."""
    dice = random.Random(1)
    requests = [pb.ScoreRequest(items=batch(dice)) for _ in range(4)]
    bodies = [request.SerializeToString() for request in requests]
    json_bodies = [_as_json(request) for request in requests]
    with reward_service("--http-port", "0") as service, echo_server() as (echo_pid, echo_address):
        async with (
            grpc.aio.insecure_channel(service.address, options=OPTIONS) as scored,
            grpc.aio.insecure_channel(echo_address, options=OPTIONS) as echoed,
            httpx.AsyncClient(base_url=service.http) as http,
        ):
            service_pid = service.process.pid
            score = scored.unary_unary("/reward.v1.RewardService/Score")
            calls: dict[str, tuple[int, Callable[[int], Awaitable[object]]]] = {
                name: (echo_pid, partial(_call, echoed.unary_unary(f"/Echo/{name}"), bodies))
                for name in ("Returned", "Built", "Prepared")
            }
            calls["batches"] = (service_pid, partial(_call, score, bodies))
            calls["http"] = (service_pid, lambda n: http.post("/v1/score", content=json_bodies[n], headers=JSON))
            rounds: dict[str, list[dict[str, float]]] = {}
            for _ in range(ROUNDS):
                for name, (pid, call) in calls.items():
                    rounds.setdefault(name, []).append(await saturate(call, seconds / ROUNDS, pid))
                streamed = await _stream(scored, requests, seconds / ROUNDS, service_pid)
                rounds.setdefault("stream", []).append(streamed)
                rounds.setdefault("plain_loop", []).append({"per_s": _plain_loop(requests[0])})
            figures: dict[str, object] = {
                name: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
                for name, measured in rounds.items()
            }
            figures["ratios"] = _ratios(rounds)
            half = statistics.median(one["per_s"] for one in rounds["batches"]) / 2
            figures["batches_at_half_load"] = percentiles(await paced(lambda n: score(bodies[n % 4]), half, seconds))
    return figures


async def _call(method: Callable[[bytes], Awaitable[object]], bodies: list[bytes], number: int) -> object:
    return await method(bodies[number])


def _ratios(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of the rates of one round, in which each had the same neighbours: the median of all rounds, and the extremes."""
    ratios: dict[str, dict[str, float]] = {}
    for name, other in RATIOS:
        sides = zip(rounds[name], rounds[other], strict=True)
        quotients = [one["per_s"] / beside["per_s"] for one, beside in sides]
        ratios[f"{name} / {other}"] = {
            "median": statistics.median(quotients), "lowest": min(quotients), "highest": max(quotients),
        }  # fmt: skip
    return ratios


JSON = {"Content-Type": "application/json"}
ROUNDS = 8
RATIOS = (
    ("batches", "Returned"),
    ("batches", "Built"),
    ("batches", "Prepared"),
    ("stream", "batches"),
    ("http", "batches"),
    ("batches", "plain_loop"),
)


def _as_json(request: pb.ScoreRequest) -> bytes:
    items = [
        {"id": item.id, "checker": item.checker, "completion": item.completion, "answer": item.answer}
        for item in request.items
    ]
    return json.dumps({"items": items}).encode()


def _plain_loop(request: pb.ScoreRequest) -> float:
    checker, texts = MultipleChoice(), [(item.completion, item.answer) for item in request.items]
    started = time.perf_counter()
    for _ in range(100):
        for text, answer in texts:
            checker.check(text, answer, {})
    return 100 / (time.perf_counter() - started)


async def _stream(
    channel: grpc.aio.Channel, requests: list[pb.ScoreRequest], seconds: float, pid: int
) -> dict[str, float]:
    """Messages of 256 items on one stream, as many in flight as batches have lanes."""
    call = channel.stream_stream("/reward.v1.RewardService/ScoreStream")
    room = asyncio.Semaphore(3)
    end = time.perf_counter() + seconds
    sent = 0

    async def messages() -> AsyncIterator[bytes]:
        nonlocal sent
        while time.perf_counter() < end:
            await room.acquire()
            yield bodies[sent % len(bodies)]
            sent += 1

    # Ids of messages in flight together must differ.
    bodies = []
    for number in range(8):
        items = [pb.Item() for _ in range(BATCH)]
        for index, item in enumerate(items):
            item.CopyFrom(requests[number % len(requests)].items[index])
            item.id = f"{number}-{index}"
        bodies.append(pb.ScoreStreamRequest(items=items).SerializeToString())
    before, started, answered = cpu_seconds(pid), time.perf_counter(), 0
    async for _ in call(messages()):
        answered += 1
        room.release()
    wall = time.perf_counter() - started
    return {"per_s": answered / wall, "server_cpu_ms": (cpu_seconds(pid) - before) / answered * 1e3}


async def measure_workers(seconds: float) -> dict[str, object]:
    """`math` and `python_tests` against the same code in one process, and good items beside hostile ones."""
    good = {
        "math": [Item("math", f"${n}+1$", f"{n + 1}") for n in range(100_000)],
        "python_tests": [Item("python_tests", PROGRAM, f"assert double({n}) == {2 * n}") for n in range(100_000)],
    }
    hostile = {
        "math": Item("math", "$9^{9^{9^{9}}}$", "7", {"time_limit_s": "1"}),
        "python_tests": Item("python_tests", "while True: pass", "assert True", {"case_limit_s": "1"}),
    }
    figures: dict[str, object] = {}
    with reward_service() as service:
        async with AsyncRewardClient(service.address) as client:
            for name, items in good.items():
                await client.score(items[-8:])
                position = iter(range(len(items)))

                async def score(_: int, items: list[Item] = items, position: Iterator[int] = position) -> None:
                    await client.score([items[next(position)]])

                rate = (await saturate(score, seconds, service.process.pid, lanes=4))["per_s"]
                alone, among = [], []
                for _ in range(ROUNDS):
                    alone += await paced(score, rate / 4, seconds)
                    among += await _among_hostile(client, score, hostile[name], rate / 4, seconds)
                figures[name] = {
                    "per_s": rate,
                    "in_process_per_s": _in_process(name, items[-200:]),
                    "alone": percentiles(alone),
                    "among_hostile": percentiles(among),
                }
    return figures


async def _among_hostile(
    client: AsyncRewardClient, score: Callable[[int], Awaitable[None]], hostile: Item, per_s: float, seconds: float
) -> list[float]:
    """Times of the good items when every tenth item is hostile."""

    async def bad(number: int) -> None:
        # Not one that is remembered.
        await client.score([replace(hostile, completion=f"{hostile.completion} # {time.perf_counter()}")])

    attack = asyncio.create_task(paced(bad, per_s / 9, seconds))
    taken = await paced(score, per_s, seconds)
    await attack
    return taken


def _in_process(name: str, items: list[Item]) -> float:
    checker = Math() if name == "math" else PythonTests()
    checker.prepare()
    checker.check(items[0].completion, items[0].answer, {})
    started = time.perf_counter()
    for item in items:
        checker.check(item.completion, item.answer, item.options)
    return len(items) / (time.perf_counter() - started)


async def measure_start() -> dict[str, float]:
    """Seconds from the start of the process to a first verdict, and the memory after a hundred batches of `mcq`."""
    started = time.perf_counter()
    with reward_service("--http-port", "0") as service:
        async with AsyncRewardClient(service.address) as client:
            await client.score([Item("mcq", "B", "B")])
            cold_start_s = time.perf_counter() - started
            dice = random.Random(2)
            items = [Item("mcq", completion(dice), "B") for _ in range(BATCH)]
            for _ in range(100):
                await client.score(items)
        status = Path(f"/proc/{service.process.pid}/status").read_text()
    resident_kib = int(status.partition("VmRSS:")[2].split()[0])
    return {"cold_start_s": cold_start_s, "memory_mb": resident_kib * 1024 / 1e6}


async def measure(seconds: float) -> dict[str, object]:
    load = os.getloadavg()[0]
    figures: dict[str, object] = {"load_before": load, "cores": os.cpu_count()}
    figures["start"] = await measure_start()
    figures["mcq"] = await measure_mcq(seconds)
    figures["workers"] = await measure_workers(seconds)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each figure (default %(default)s)")
    parser.add_argument("--echo", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        asyncio.run(echo(arguments.echo))
    else:
        print(json.dumps(asyncio.run(measure(arguments.seconds)), indent=2))


if __name__ == "__main__":
    main()
