import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.rollouts import SamplingParameters
from services.rollout.simulated_model import SimulatedModel
from tests.training import a_config

SAMPLING = SamplingParameters(temperature=2.0, top_p=1.0, max_completion_tokens=40)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def engine() -> SimulatedModel:
    return SimulatedModel(a_config())


def test_the_seed_alone_decides_the_completion(engine: SimulatedModel) -> None:
    async def sample() -> list[str]:
        seeds = [0, 64, 128, 192, 256, 64 + 63]
        sampled = [await engine.sample(PROMPT, SAMPLING, seed, urgent=True) for seed in seeds]
        tokenizer = AutoTokenizer.from_pretrained("models/tiny")
        return [tokenizer.decode(one.completion_ids, skip_special_tokens=True) for one in sampled]

    assert asyncio.run(sample()) == [f"<answer>{letter}</answer>" for letter in "ABCDAB"]


def test_its_log_probs_are_those_of_the_model_at_the_sampling_temperature(engine: SimulatedModel) -> None:
    sampled = asyncio.run(engine.sample(PROMPT, SAMPLING, 64, urgent=True))
    ids = [*PROMPT, *sampled.completion_ids]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained("models/tiny")(torch.tensor([ids])).logits[0] / 2.0
    expected = [float(logits[place - 1].log_softmax(-1)[ids[place]]) for place in range(len(PROMPT), len(ids))]
    assert sampled.logprobs == pytest.approx(expected, abs=1e-6)


def test_between_prepare_and_resume_nothing_is_sampled(engine: SimulatedModel) -> None:
    async def sample_over_an_update() -> list[int]:
        await engine.prepare()
        sampling = asyncio.create_task(engine.sample(PROMPT, SAMPLING, 0, urgent=True))
        await asyncio.sleep(0.1)
        assert not sampling.done()
        await engine.load(7)
        await asyncio.sleep(0.1)
        assert not sampling.done()
        await engine.resume()
        return (await sampling).policy_versions

    assert set(asyncio.run(sample_over_an_update())) == {7}
