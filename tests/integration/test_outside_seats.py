"""Requests from outside and the seats of the engine, on real vLLM: training has its own, whatever the others do."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import httpx
import pytest

from retort.rollouts import SamplingParameters
from services.rollout.seats import OUTSIDE_COMPLETIONS
from tests.integration.vllm_fleet import SEQUENCES, Fleet

pytestmark = pytest.mark.timeout(400)

PROMPT = list(range(20, 44))
SHORT = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=16)
ENDLESS = {"model": "policy", "prompt": PROMPT, "max_tokens": 230, "ignore_eos": True}
"""As long as the model's length allows."""
CHAT = {"model": "policy", "messages": [{"role": "user", "content": "What is the symbol of sodium?"}]}
TOKENS = {"prompt_ids": PROMPT, "max_completion_tokens": 40}


@pytest.fixture
def served(fleet: Fleet) -> Iterator[Fleet]:
    fleet.inject("")
    if fleet.replica.receiver.state != "serving":
        fleet.restart_replica()
    assert fleet.sync() == 1
    assert in_engine(fleet) == 0
    yield fleet
    fleet.replica.wait(until(lambda: in_engine(fleet) == 0))


def in_engine(fleet: Fleet) -> int:
    """Completions that the engine was asked for and has not ended."""
    return int(fleet.replica.engine.llm.get_num_unfinished_requests())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def post(fleet: Fleet, path: str, body: dict[str, object], timeout_s: float = 120.0) -> httpx.Response:
    return httpx.post(f"{fleet.replica.url}{path}", json=body, timeout=timeout_s)


def test_training_has_its_seats_while_requests_from_outside_hold_theirs(served: Fleet) -> None:
    """Those run before the work comes, and have far to go when it is done."""
    engine = served.replica.engine

    async def a_step() -> int:
        work = (engine.sample(PROMPT, SHORT, seed, urgent=True) for seed in range(SEQUENCES))
        await asyncio.gather(*work)
        return in_engine(served)

    outside = {**ENDLESS, "n": OUTSIDE_COMPLETIONS, "stream": True}
    with httpx.stream("POST", f"{served.replica.url}/v1/completions", json=outside, timeout=60) as stream:
        lines = stream.iter_lines()  # without a name it would be gone after the first line, and the connection with it
        assert next(lines).startswith("data:")
        assert in_engine(served) == OUTSIDE_COMPLETIONS
        assert served.replica.wait(a_step()) == OUTSIDE_COMPLETIONS


def test_no_more_completions_from_outside_are_in_the_engine_than_it_has_seats_for_and_all_are_answered(
    served: Fleet,
) -> None:
    """By every route, with requests of which two do not go together, and one with more prompts than there are seats."""
    requests: list[tuple[str, dict[str, object]]] = [
        ("/v1/completions", {"model": "policy", "prompt": PROMPT, "max_tokens": 40, "n": 10}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 40, "n": 10}),
        ("/v1/completions", {"model": "policy", "prompt": [PROMPT] * 20, "max_tokens": 40}),
        ("/v1/completions", {"model": "policy", "prompt": [PROMPT] * 2, "max_tokens": 40, "n": 10}),
        *[("/generate", TOKENS)] * 10,
    ]
    most = 0
    with ThreadPoolExecutor(len(requests)) as pool:
        waiting: set[Future[httpx.Response]] = {pool.submit(post, served, *request) for request in requests}
        asked = list(waiting)
        while waiting:
            most = max(most, in_engine(served))
            waiting = wait(waiting, timeout=0.005).not_done
    answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [200] * len(requests)
    assert sum(len(answer.json().get("choices", [0])) for answer in answers) == 10 + 10 + 20 + 20 + 10
    assert 0 < most <= OUTSIDE_COMPLETIONS


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", ENDLESS)])
def test_more_completions_of_a_prompt_than_there_are_seats_are_refused_with_the_limit(
    served: Fleet, path: str, body: dict[str, object], streamed: bool
) -> None:
    answer = post(served, path, {**body, "n": OUTSIDE_COMPLETIONS + 1, "stream": streamed})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "n is 17, and at most 16 are sampled at a time" in error["message"]
    assert error["param"] == "n"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", TOKENS),
        ("/v1/completions", ENDLESS),
        ("/v1/completions", {**ENDLESS, "prompt": [PROMPT] * 3, "stream": True}),
        ("/v1/chat/completions", CHAT),
    ],
)
def test_a_client_that_goes_away_leaves_its_seats_to_those_who_wait(
    served: Fleet, path: str, body: dict[str, object]
) -> None:
    """Nothing ends by itself: the engine is paused. Of twenty clients some have seats and some wait for one."""
    llm = served.replica.engine.llm

    def goes_away() -> None:
        with pytest.raises(httpx.ReadTimeout):
            post(served, path, body, timeout_s=1.0)

    served.replica.wait(llm.pause_generation(mode="keep", clear_cache=False))
    try:
        with ThreadPoolExecutor(20) as pool:
            clients = [pool.submit(goes_away) for _ in range(20)]
            served.replica.wait(until(lambda: in_engine(served) == OUTSIDE_COMPLETIONS))
        for client in clients:
            client.result()
        served.replica.wait(until(lambda: in_engine(served) == 0))
    finally:
        served.replica.wait(llm.resume_generation())
    assert post(served, "/v1/completions", {**ENDLESS, "max_tokens": 1, "n": OUTSIDE_COMPLETIONS}).status_code == 200
