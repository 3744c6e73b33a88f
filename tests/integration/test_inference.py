"""What people and programs may ask of the policy, on real vLLM, with OpenAI's own client."""

import asyncio
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from fastapi import FastAPI
from starlette.routing import Mount, Route

from retort.rollouts import SamplingParameters
from retort.tokens import PROBES
from services.rollout import metrics
from services.rollout.app import POLICY_PATHS
from services.rollout.engine import Sampled
from services.rollout.seats import OUTSIDE_COMPLETIONS
from tests.integration.vllm_fleet import SEQUENCES, Fleet

pytestmark = pytest.mark.timeout(400)

PROMPT = list(range(20, 44))
QUESTION = [{"role": "user", "content": "What is the symbol of sodium?"}]
SHORT = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=16)
LONG_TOKENS = 200


@pytest.fixture
def served(fleet: Fleet) -> Fleet:
    """A replica that serves a version of its own for this test."""
    fleet.inject("")
    if fleet.replica.receiver.state != "serving":
        fleet.restart_replica()
    assert fleet.sync() == 1
    return fleet


@pytest.fixture
def client(served: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.replica.url}/v1", api_key="none is needed", max_retries=0) as client:
        yield client


def greedy(model: torch.nn.Module, count: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_a_chat_is_answered_by_the_served_version_which_the_header_names(served: Fleet, client: openai.OpenAI) -> None:
    for model in ("policy", f"policy@{served.version}"):
        answer = client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, max_tokens=8)
        assert answer.headers["x-policy-version"] == str(served.version)
        [choice] = answer.parse().choices
        assert choice.message.role == "assistant"
        assert choice.finish_reason in ("stop", "length")


def test_a_completion_has_the_tokens_of_the_weights_that_were_sent(served: Fleet, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="policy", prompt=PROMPT, max_tokens=6, temperature=0, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].token_ids == greedy(served.model, 6)  # type: ignore[attr-defined]


def test_a_stream_says_the_same_as_one_answer(client: openai.OpenAI) -> None:
    options = {"model": "policy", "messages": QUESTION, "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**options, stream=True)]  # type: ignore[call-overload]
    assert "".join(parts) == whole.choices[0].message.content


def test_a_version_that_is_not_served_is_refused_and_the_error_says_which_is(
    served: Fleet, client: openai.OpenAI
) -> None:
    for model in (f"policy@{served.version - 1}", f"policy@{served.version + 1}", "gpt-4"):
        with pytest.raises(openai.NotFoundError, match=rf"policy, policy@{served.version}"):
            client.chat.completions.create(model=model, messages=QUESTION)
    assert [model.id for model in client.models.list()] == ["policy", f"policy@{served.version}"]


def test_token_ids_in_token_ids_out(served: Fleet) -> None:
    request = {"prompt_ids": PROMPT, "max_completion_tokens": 6, "temperature": 0.0}
    answer = httpx.post(f"{served.replica.url}/generate", json=request)
    assert answer.headers["x-policy-version"] == str(served.version)
    sampled = Sampled(**answer.json())
    assert sampled.completion_ids == greedy(served.model, 6)
    assert sampled.policy_versions == [served.version] * 6
    assert len(sampled.logprobs) == 6


@pytest.mark.parametrize(
    "request_",
    [{}, {"prompt_ids": [], "max_completion_tokens": 1}, {"prompt_ids": [1] * 999, "max_completion_tokens": 1}],
)
def test_a_request_that_makes_no_sense_is_the_clients_error(served: Fleet, request_: dict[str, object]) -> None:
    assert httpx.post(f"{served.replica.url}/generate", json=request_).status_code == 400


def test_requests_from_outside_wait_behind_the_work_from_the_queue(served: Fleet) -> None:
    """All arrive while the engine is paused, and the work alone takes every seat, those of outside too."""
    order: list[str] = []
    work = SEQUENCES + OUTSIDE_COMPLETIONS

    async def note(who: str, urgent: bool) -> None:
        await served.replica.engine.sample(PROMPT, SHORT, seed=len(who), urgent=urgent)
        order.append(who)

    async def story() -> None:
        await served.replica.engine.llm.pause_generation(mode="keep", clear_cache=False)
        waiting = [asyncio.create_task(note("outside", urgent=False))]
        await asyncio.sleep(0.2)
        waiting += [asyncio.create_task(note("work", urgent=True)) for _ in range(work)]
        await asyncio.sleep(0.2)
        await served.replica.engine.llm.resume_generation()
        await asyncio.gather(*waiting)

    served.replica.wait(story())
    assert order == ["work"] * work + ["outside"]


def test_a_stream_goes_on_over_an_update_unless_it_asked_for_one_version(served: Fleet, client: openai.OpenAI) -> None:
    def stream(model: str) -> openai.Stream[openai.types.Completion]:
        return client.completions.create(
            model=model, prompt=PROMPT, max_tokens=LONG_TOKENS, stream=True, extra_body={"ignore_eos": True}
        )

    either, pinned = stream("policy"), stream(f"policy@{served.version}")
    assert next(either).choices and next(pinned).choices
    assert served.sync() == 1
    assert sum(len(part.choices) for part in either) > 0
    with pytest.raises(openai.APIError, match=rf"not served any more, `policy@{served.version}` is"):
        for _ in pinned:
            pass


def test_the_header_of_an_answer_that_took_an_update_names_the_version_that_ended_it(served: Fleet) -> None:
    before = served.version
    request = {"prompt_ids": PROMPT, "max_completion_tokens": LONG_TOKENS, "temperature": 1.0}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(httpx.post, f"{served.replica.url}/generate", json=request) for _ in range(8)]
        time.sleep(0.3)
        assert served.sync() == 1
        answers = [one.result() for one in asked]
    last = [answer.json()["policy_versions"][-1] for answer in answers]
    assert before + 1 in last, "some were in flight"
    assert [int(answer.headers["x-policy-version"]) for answer in answers] == last


def test_while_no_version_is_served_requests_wait_and_are_then_refused(served: Fleet, client: openai.OpenAI) -> None:
    served.inject("flipped_bit")
    assert served.sync() == 0
    with pytest.raises(openai.InternalServerError, match="no policy version is served"):
        client.completions.create(model="policy", prompt=PROMPT, max_tokens=1)


def test_metrics_are_vllms_and_ours(served: Fleet) -> None:
    metrics.POLICY_VERSION.set(served.version)
    text = httpx.get(f"{served.replica.url}/metrics").text
    assert "vllm:generation_tokens_total" in text
    assert f"rollout_policy_version {served.version}.0" in text


def routes(app: object, prefix: str = "") -> set[str]:
    """`METHOD /path` of everything that an application answers, mounted applications included."""
    found = set()
    while not isinstance(app, FastAPI):
        app = app.app  # type: ignore[attr-defined]
    for route in app.routes:
        if isinstance(route, Mount):
            found |= routes(route.app, prefix + route.path)
        else:
            assert isinstance(route, Route)
            found |= {f"{method} {prefix}{route.path}" for method in route.methods or () if method != "HEAD"}
    return found


def test_every_route_is_known_and_those_of_the_trainer_need_its_token(served: Fleet) -> None:
    public, control = served.replica.public, served.replica.control
    assert routes(public) == {
        "GET /healthz",
        "GET /readyz",
        "GET /metrics",
        "GET /v1/models",
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /generate",
    }
    assert {route.split()[1] for route in routes(public)} == PROBES | POLICY_PATHS
    assert routes(control) == {f"POST /weights/{call}" for call in ("prepare", "transfer", "probe", "commit")}
    for method, path in (route.split() for route in routes(control)):
        assert httpx.request(method, f"{served.replica.url}{path}").status_code == 401


def test_vllms_routes_for_development_are_not_there(served: Fleet) -> None:
    from vllm.entrypoints.serve import dev

    assert dev.__file__
    sources = "".join(path.read_text() for path in Path(dev.__file__).parent.rglob("*.py"))
    paths = set(re.findall(r"@router\.\w+\(\s*\"(/[^\"]+)", sources))
    assert {"/collective_rpc", "/reset_prefix_cache"} <= paths
    for path in paths | {"/v1/load_lora_adapter", "/start_profile", "/tokenize", "/v1/responses"}:
        for method in ("GET", "POST"):
            assert httpx.request(method, f"{served.replica.url}{path}").status_code == 401, path


def test_vllms_processes_listen_on_loopback_alone_and_unpickle_nothing(served: Fleet) -> None:
    """What may listen is a process group."""
    engines = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM")]
    # An engine that another test has ended may still be there in name.
    processes = [p for p in engines if p.status() != psutil.STATUS_ZOMBIE]
    listening = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [p.name() for p in processes] == ["VLLM::EngineCore"]
    assert set(listening) <= {"127.0.0.1", "::1"}
    with pytest.raises(TypeError, match="not serializable"):
        served.replica.wait(served.replica.engine.llm.collective_rpc(len))
