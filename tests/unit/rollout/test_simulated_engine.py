import asyncio

from retort.rollouts import SamplingParameters
from services.rollout.engine_steps import TokenTime
from services.rollout.simulated_engine import Lengths, SimulatedEngine
from tests.unit.rollout.test_engine_steps import in_virtual_time

SAMPLING = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=8)


def test_a_seed_is_a_quantile_of_the_lengths() -> None:
    lengths = Lengths(mean=1000, sigma=0.8)
    median = 2**62
    assert lengths.of(median, 8192) == 726  # 1000 * exp(-0.32)
    assert lengths.of(2**63 - 1, 8192) == 8192
    assert lengths.of(0, 8192) == 1
    assert Lengths(mean=5, sigma=0.0).of(123, 8192) == 5


def test_a_completion_says_which_version_sampled_each_token() -> None:
    async def story() -> tuple[list[int], str]:
        engine = SimulatedEngine(TokenTime(1.0, 0.0), 4, Lengths(8, 0.0), transfer_s=0.0)
        await engine.load(0)
        sampling = asyncio.create_task(engine.sample([1], SAMPLING, 0, urgent=True))
        await asyncio.sleep(3.0)
        await engine.prepare()
        await engine.load(1)
        await engine.resume()
        sampled = await sampling
        return sampled.policy_versions, sampled.finish_reason

    assert in_virtual_time(story()) == ([0, 0, 0, 1, 1, 1, 1, 1], "length")
