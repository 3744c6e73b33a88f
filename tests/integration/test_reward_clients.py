"""Everybody who calls the reward service: our client, the command line, other trainers, other languages."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.client import AsyncRewardClient, Item, Result, RewardClient, RewardServiceError, UnscorableError
from retort.client.adapters import compute_score, trl_reward, verifiers_reward
from tests.reward_service import ROOT, Service, reward_service

pytestmark = pytest.mark.timeout(180)

BUF = Path(sys.executable).with_name("buf")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with reward_service("--http-port", "0") as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[RewardClient]:
    with RewardClient(service.address) as connected:
        yield connected


def test_results_come_in_the_order_of_the_items(client: RewardClient) -> None:
    right, wrong, unknown = client.score([Item("mcq", "B", "B"), Item("mcq", "C", "B"), Item("mqc", "B", "B", id="x")])
    assert (right.id, right.reward, right.checker) == ("0", 1.0, "mcq@1")
    assert (wrong.reward, wrong.correct) == (0.0, False)
    assert (unknown.id, unknown.reward) == ("x", None)
    with pytest.raises(UnscorableError, match="item x is unscorable: no checker 'mqc'"):
        unknown.value()


def test_a_text_that_cannot_be_sent_is_refused_before_the_call(client: RewardClient) -> None:
    with pytest.raises(ValueError, match="item 0 has a text with a lone surrogate"):
        client.score([Item("mcq", "\ud800", "B")])


def test_what_is_no_text_is_refused_by_the_name_of_its_item(client: RewardClient) -> None:
    with pytest.raises(TypeError, match="item b: checker, completion, answer and id are texts"):
        client.score([Item("mcq", "B", "B"), Item("mcq", 5, "B", id="b")])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"item 0: .*options and metadata have texts"):
        client.score([Item("numeric", "5", "5", {"relative": 0.1})])  # type: ignore[dict-item]


def test_a_bad_item_of_a_stream_is_raised_behind_the_results_before_it(service: Service, client: RewardClient) -> None:
    # The 65th is the first of the second message.
    items = [*[Item("mcq", "B", "B")] * 64, Item("mcq", "\ud800", "B")]
    ids: list[str] = []
    with pytest.raises(ValueError, match="item 64 has a text with a lone surrogate"):
        ids.extend(result.id for result in client.stream(items))
    assert sorted(ids, key=int) == [str(n) for n in range(64)]

    async def broken() -> AsyncIterator[Item]:
        yield Item("mcq", "B", "B", id="whole")
        raise LookupError("no more")

    async def run(into: list[str]) -> None:
        async with AsyncRewardClient(service.address) as connected:
            async for result in connected.stream(broken()):
                into.append(result.id)

    with pytest.raises(LookupError, match="no more"):
        asyncio.run(run(ids))
    assert ids[64:] == ["whole"]


def test_a_stream_to_nobody_ends_at_its_deadline_and_says_why(unused_port: int) -> None:
    async def run() -> None:
        async with AsyncRewardClient(f"127.0.0.1:{unused_port}", timeout_s=0.5) as client:
            async for _ in client.stream([Item("mcq", "B", "B")]):
                pass

    why = f"127.0.0.1:{unused_port}: UNAVAILABLE: .*Connection refused"
    with pytest.raises(RewardServiceError, match=why):
        asyncio.run(run())
    with (
        RewardClient(f"127.0.0.1:{unused_port}", timeout_s=0.5) as client,
        pytest.raises(RewardServiceError, match=why),
    ):
        list(client.stream([Item("mcq", "B", "B")]))


def test_a_stream_takes_items_as_they_come_and_answers_each_by_its_id(service: Service) -> None:
    async def run() -> list[Result]:
        sent: asyncio.Queue[Item | None] = asyncio.Queue()

        async def items() -> AsyncIterator[Item]:
            while (item := await sent.get()) is not None:
                yield item

        results = []
        async with AsyncRewardClient(service.address) as client:
            await sent.put(Item("mcq", "B", "B", id="first"))
            async for result in client.stream(items()):
                results.append(result)
                # The second is sent only when the first has been answered.
                await sent.put(Item("mcq", "C", "B", id="second") if len(results) == 1 else None)
        return results

    assert [(result.id, result.reward) for result in asyncio.run(run())] == [("first", 1.0), ("second", 0.0)]


def test_ten_thousand_items_in_one_stream(service: Service) -> None:
    items = [Item("mcq", "ABCD"[n % 4], "B") for n in range(10_000)]

    async def run() -> dict[str, float | None]:
        async with AsyncRewardClient(service.address) as client:
            return {result.id: result.reward async for result in client.stream(items)}

    rewards = asyncio.run(run())
    assert len(rewards) == 10_000
    assert sum(reward or 0.0 for reward in rewards.values()) == 2_500


def test_a_stream_needs_no_event_loop(client: RewardClient) -> None:
    results = {
        result.id: result.reward for result in client.stream([Item("mcq", "ABCD"[n % 4], "B") for n in range(200)])
    }
    assert sorted(results, key=int) == [str(n) for n in range(200)]
    assert sum(reward or 0.0 for reward in results.values()) == 50


def test_two_items_with_one_id_end_a_stream_by_name(service: Service) -> None:
    async def run() -> None:
        async with AsyncRewardClient(service.address) as client:
            async for _ in client.stream([Item("mcq", "B", "B", id="a"), Item("mcq", "B", "B", id="a")]):
                pass

    with pytest.raises(RewardServiceError, match=re.escape("INVALID_ARGUMENT: items[1].id: 'a' is also the id")):
        asyncio.run(run())


def test_a_client_gives_up_at_its_deadline_and_names_the_address(unused_port: int) -> None:
    started = time.monotonic()
    with (
        RewardClient(f"127.0.0.1:{unused_port}", timeout_s=0.5) as client,
        pytest.raises(RewardServiceError, match=f"{unused_port}: no results within 0.5 s .*Connection refused"),
    ):
        client.score([Item("mcq", "B", "B")])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("name", "problem"),
    [("mcq", "a checker that is installed"), ("json", "the name of a module"), ("import", "a word of Python")],
)
def test_a_new_checker_has_a_name_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, problem: str
) -> None:
    assert main(["checker", "new", name, "--directory", str(tmp_path / name)]) == 2
    assert f"'{name}' is {problem}" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_a_new_checker_passes_its_own_test_and_serves(tmp_path: Path) -> None:
    folder = tmp_path / "contains"
    assert main(["checker", "new", "contains", "--directory", str(folder)]) == 0
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_contains.py"]
    done = subprocess.run(test, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    # What pip would write when it installs the package.
    metadata = folder / "contains-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: contains\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[retort.checkers]\ncontains = contains:Contains\n")
    with reward_service(python_path=str(folder)) as service, RewardClient(service.address) as client:
        (result,) = client.score([Item("contains", "It is helium.", "helium")])
    assert (result.reward, result.checker) == (1.0, "contains@1")


def test_trl_gets_a_list_of_rewards_with_none_for_no_reward(client: RewardClient) -> None:
    """As GRPOTrainer calls it: keyword arguments, the columns of the data set among them (TRL 1.16)."""
    reward = trl_reward(client, "mcq")
    chat = [[{"role": "assistant", "content": "<answer>B</answer>"}], [{"role": "assistant", "content": "C"}]]
    columns = {"prompts": ["?", "?"], "completion_ids": [[1], [2]], "trainer_state": None, "log_extra": None}
    assert reward(completions=chat, answer=["B", "B"], **columns) == [1.0, 0.0]
    assert reward(completions=["B", "B"], answer=["B", ""], **columns) == [1.0, None]
    assert reward.__name__ == "retort_mcq"


def test_verl_gets_a_dictionary_with_a_score(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """As verl's reward loop calls it: four keyword arguments and `reward_kwargs` (verl 0.9)."""
    monkeypatch.setenv("RETORT_REWARD_SERVICE", service.address)
    score = compute_score(
        data_source="sciknoweval", solution_str="<answer>B</answer>", ground_truth="B", extra_info={"index": 1}
    )
    assert score == {"score": 1.0, "acc": 1.0, "pred": "B", "format_ok": 1.0}
    with pytest.raises(UnscorableError):
        compute_score(data_source="", solution_str="B", ground_truth="", extra_info=None, checker="mcq")


def test_verifiers_gets_an_awaitable_reward(service: Service) -> None:
    """As a Rubric calls it: by the names of its parameters, extra ones included (verifiers 0.1)."""

    async def run() -> float:
        async with AsyncRewardClient(service.address) as client:
            reward = verifiers_reward(client, "mcq")
            messages = [{"role": "assistant", "content": "<answer>B</answer>"}]
            return await reward(completion=messages, answer="B", prompt=[], state={}, info={})

    assert asyncio.run(run()) == 1.0


def test_a_node_client_that_loads_the_proto_at_run_time(service: Service, tmp_path: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    (program,) = re.findall(r"^```js\n(.*?)^```", (ROOT / "docs/reward-api.md").read_text(), re.MULTILINE | re.DOTALL)
    proto = str(ROOT / "proto/reward/v1/reward.proto")
    program = program.replace("127.0.0.1:50051", service.address).replace("proto/reward/v1/reward.proto", proto)
    (tmp_path / "client.js").write_text(program)
    install = ["npm", "install", "--no-audit", "--no-fund", "@grpc/grpc-js@1", "@grpc/proto-loader@0"]
    installed = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    if installed.returncode:
        pytest.skip(f"npm install failed: {installed.stderr[-300:]}")
    done = subprocess.run(["node", "client.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "1 1\n2 no checker 'mqc'; known: " + done.stdout.partition("known: ")[2], done.stderr


def test_the_proto_is_backward_compatible_with_every_commit(tmp_path: Path) -> None:
    """With all of the history that is there: a shallow clone has only the last commit."""
    file = "proto/reward/v1/reward.proto"
    log = subprocess.run(
        ["git", "log", "--format=%h", "--", file], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if log.returncode:
        pytest.skip("no git repository")
    for commit in log.stdout.split():
        old = tmp_path / commit / "reward" / "v1"
        old.mkdir(parents=True)
        show = ["git", "show", f"{commit}:{file}"]
        (old / "reward.proto").write_bytes(subprocess.run(show, cwd=ROOT, check=True, capture_output=True).stdout)
        breaking = [BUF, "breaking", "proto", "--against", str(tmp_path / commit)]
        done = subprocess.run(breaking, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"against {commit}: {done.stdout}"


def test_buf_would_see_a_breaking_change(tmp_path: Path) -> None:
    new = tmp_path / "reward" / "v1"
    new.mkdir(parents=True)
    text = (ROOT / "proto/reward/v1/reward.proto").read_text()
    (new / "reward.proto").write_text(text.replace("string reason = 1;", "int32 reason = 1;"))
    breaking = [BUF, "breaking", str(tmp_path), "--against", "proto"]
    done = subprocess.run(breaking, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "reason" in done.stdout
