"""Real vLLM with its weights split between two worker processes."""

import torch

from retort.rollouts import SamplingParameters
from tests.integration.vllm_fleet import a_fleet

PROMPT = list(range(20, 44))


def test_both_workers_of_a_split_engine_get_ranks_and_the_weights_that_were_sent(redis_url: str) -> None:
    plain = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=24)
    with a_fleet(redis_url, "rollout.tensor_parallel=2") as fleet:
        for version in (1, 2):
            assert fleet.sync() == 1
            going = fleet.sender._broadcast._going
            assert going
            [(_, workers)] = going.members
            assert workers == 2
            assert fleet.sender.snapshot
            received = fleet.replica.wait(fleet.replica.engine.llm.collective_rpc("received_digests"))
            assert received == [fleet.sender.snapshot.digests] * 2
            sampled = fleet.replica.wait(fleet.replica.engine.sample(PROMPT, plain, seed=version, urgent=True))
            ids = torch.tensor(sampled.completion_ids)
            with torch.no_grad():
                logits = fleet.model(torch.tensor([[*PROMPT, *sampled.completion_ids]])).logits[0]
            expected = logits[len(PROMPT) - 1 : -1].log_softmax(-1)[torch.arange(len(ids)), ids]
            assert sampled.policy_versions == [version] * len(ids)
            assert float((expected - torch.tensor(sampled.logprobs)).abs().max()) < 1e-4
