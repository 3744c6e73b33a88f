"""The reward service as a process, called over a socket."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from retort.proto.reward.v1 import reward_pb2, reward_pb2_grpc
from services.rollout.reward_client import RewardClient, RewardServiceError, Scored, UnscorableError
from tests.reward_service import ROOT, Service, install_user_checkers, reward_service

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def user_checkers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return install_user_checkers(tmp_path_factory.mktemp("site-packages"))


@pytest.fixture(scope="module")
def reward_address(user_checkers: str) -> Iterator[str]:
    with reward_service("--port", "0", python_path=user_checkers) as service:
        yield service.address


def score(address: str, checker: str, completions: list[str], answer: str, budget_s: float = 30.0) -> list[Scored]:
    """One call of a client of its own."""

    async def call() -> list[Scored]:
        client = RewardClient(address, deadline_s=10.0, budget_s=budget_s)
        try:
            return await client.score(checker, completions, answer)
        finally:
            await client.close()

    return asyncio.run(call())


def items(*checkers: str) -> list[reward_pb2.Item]:
    return [
        reward_pb2.Item(id=f"item-{index}", checker=checker, completion="<answer>B</answer>", answer="B")
        for index, checker in enumerate(checkers)
    ]


def test_rewards_come_in_the_order_of_the_completions(reward_address: str) -> None:
    assert score(reward_address, "mcq", ["<answer>B</answer>", "<answer>C</answer>", "B"], "B") == [
        Scored(reward=1.0, parsed="B", format_ok=True),
        Scored(reward=0.0, parsed="C", format_ok=True),
        Scored(reward=1.0, parsed="B", format_ok=False),
    ]


def test_bad_items_cost_neither_the_batch_nor_the_good_items_their_rewards(reward_address: str) -> None:
    with grpc.insecure_channel(reward_address) as channel:
        service = reward_pb2_grpc.RewardServiceStub(channel)
        request = reward_pb2.ScoreRequest(items=items("mcq", "raises", "mqc", "not_a_number", "mcq"))
        response = service.Score(request, timeout=10)

    assert [result.id for result in response.results] == ["item-0", "item-1", "item-2", "item-3", "item-4"]
    good, raised, unknown, not_a_number, last = response.results
    assert (good.reward.value, good.reward.correct, good.checker) == (1.0, True, "mcq@1")
    assert last.reward == good.reward
    assert raised.unscorable.reason == "raises raised ValueError: boom"
    assert unknown.unscorable.reason.startswith("no checker 'mqc'; known: ")
    assert "finite number" in not_a_number.unscorable.reason


def test_the_client_names_the_completion_that_has_no_reward(reward_address: str) -> None:
    with pytest.raises(UnscorableError, match="completion 0 is unscorable: raises raised ValueError: boom") as raised:
        score(reward_address, "raises", ["B"], "B")
    assert (raised.value.index, raised.value.reason) == (0, "raises raised ValueError: boom")


def test_checkers_of_other_packages_are_listed_beside_the_built_in_ones(reward_address: str) -> None:
    with grpc.insecure_channel(reward_address) as channel:
        service = reward_pb2_grpc.RewardServiceStub(channel)
        response = service.ListCheckers(reward_pb2.ListCheckersRequest(), timeout=10)
    checkers = {checker.name: checker for checker in response.checkers}
    assert {"mcq", "math", "not_a_number", "raises", "waits"} < checkers.keys()
    assert dict(checkers["exact_match"].options) == {"ignore_case": "true or false (the default)"}
    assert checkers["mcq"].accepts == "the right option's letter, for example B"
    assert [example.reward for example in checkers["mcq"].examples] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([], "items: empty"),
        (["a", ""], "items[1].id: empty"),
        (["a", "b", "a"], "items[2].id: 'a' is also the id of items[0]"),
        ([str(i) for i in range(4097)], "items: 4097 are more than 4096"),
    ],
)
def test_a_malformed_request_is_refused_by_field(reward_address: str, ids: list[str], problem: str) -> None:
    request = reward_pb2.ScoreRequest(items=[reward_pb2.Item(id=id_, checker="mcq") for id_ in ids])
    with grpc.insecure_channel(reward_address) as channel, pytest.raises(grpc.RpcError) as raised:
        reward_pb2_grpc.RewardServiceStub(channel).Score(request, timeout=10)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details().startswith(problem)


def test_a_request_over_the_size_limit_is_refused_and_the_next_one_is_served(reward_address: str) -> None:
    with pytest.raises(RewardServiceError, match=f"{reward_address} refused 1 items: RESOURCE_EXHAUSTED"):
        score(reward_address, "mcq", ["x" * (17 << 20)], "B")
    assert score(reward_address, "mcq", ["x" * (15 << 20)], "B")[0].reward == 0.0


def test_a_client_outlives_a_service_that_is_killed_and_restarted_between_two_calls() -> None:
    async def run() -> None:
        with reward_service("--port", "0") as first:
            client = RewardClient(first.address, deadline_s=10.0)
            assert [s.reward for s in await client.score("mcq", ["B"], "B")] == [1.0]
        with reward_service("--port", str(first.port)):
            assert [s.reward for s in await client.score("mcq", ["C", "B"], "B")] == [0.0, 1.0]
            await client.close()

    asyncio.run(run())


def test_a_call_that_its_service_did_not_survive_is_repeated(user_checkers: str, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")

    async def run() -> list[Scored]:
        with reward_service("--port", "0", python_path=user_checkers) as first:
            client = RewardClient(first.address, deadline_s=10.0)
            call = asyncio.create_task(client.score("waits", [""], str(pipe)))
            in_flight = await asyncio.to_thread(pipe.open, "w")
            first.process.kill()
            await asyncio.to_thread(first.process.wait)
            in_flight.close()
        with reward_service("--port", str(first.port), python_path=user_checkers):
            (await asyncio.to_thread(pipe.open, "w")).close()
            scored = await call
            await client.close()
            return scored

    assert [s.reward for s in asyncio.run(run())] == [0.25]


def test_a_client_waits_for_a_service_that_starts_later(unused_port: int) -> None:
    async def run() -> list[Scored]:
        client = RewardClient(f"127.0.0.1:{unused_port}", deadline_s=1.0)
        call = asyncio.create_task(client.score("mcq", ["B"], "B"))
        # A deadline passes before anything listens.
        await asyncio.wait([call], timeout=1.5)
        with reward_service("--port", str(unused_port)):
            scored = await call
            await client.close()
            return scored

    assert [s.reward for s in asyncio.run(run())] == [1.0]


def test_the_error_after_the_last_deadline_names_the_address(unused_port: int) -> None:
    address = f"127.0.0.1:{unused_port}"
    with pytest.raises(RewardServiceError, match=f"reward service at {address}: no scores within 0.3 s"):
        score(address, "mcq", ["B"], "B", budget_s=0.3)


def test_a_terminated_service_says_so_finishes_its_call_and_exits_with_0(user_checkers: str, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")

    async def run(service: Service) -> list[Scored]:
        async with grpc.aio.insecure_channel(service.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service="reward.v1.RewardService"))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

            client = RewardClient(service.address, deadline_s=10.0)
            call = asyncio.create_task(client.score("waits", [""], str(pipe)))
            in_flight = await asyncio.to_thread(pipe.open, "w")
            service.process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            in_flight.close()
            scored = await call
            await client.close()
            return scored

    with reward_service("--port", "0", python_path=user_checkers) as service:
        assert [s.reward for s in asyncio.run(run(service))] == [0.25]
        assert service.process.wait(timeout=10) == 0


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.reward", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def test_a_port_in_use_ends_the_start_with_2_and_names_the_port(reward_address: str) -> None:
    done = start("--port", reward_address.rpartition(":")[2])
    assert done.returncode == 2
    assert f"the reward service cannot listen on {reward_address}: the port is in use" in done.stderr


def test_a_missing_run_file_ends_the_start_with_2() -> None:
    done = start("--config", "no-such.toml")
    assert (done.returncode, done.stderr) == (
        2,
        "no-such.toml: no such run file. Shipped ones are in configs/.\n",
    )


def test_host_and_port_come_from_the_run_file(tmp_path: Path, unused_port: int) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        'name = "a"\n[model]\npath = "m"\n[data]\ntrain = "t"\nvalidation = "v"\n[trainer]\nsteps = 1\n'
        f"[reward]\nport = {unused_port}\n"
    )
    with reward_service("--config", str(run_file)) as service:
        assert service.address == f"127.0.0.1:{unused_port}"


def test_help_teaches_how_to_start_and_stop() -> None:
    done = start("--help")
    assert done.returncode == 0
    assert "retort serve reward --grpc-port 50051" in done.stdout


def test_sigterm_before_the_service_is_up_ends_it_with_0(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "slow.py").write_text(f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(100)\n")
    metadata = tmp_path / "slow-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[retort.checkers]\nslow = slow:Slow\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-m", "services.reward"], cwd=ROOT, env=environment) as process:
        try:
            give_up = time.monotonic() + 50
            while time.monotonic() < give_up and not begun.exists():
                time.sleep(0.02)
            process.terminate()
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
