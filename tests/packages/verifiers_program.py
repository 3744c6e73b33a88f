"""Argument: the service's address. A Rubric of verifiers scores rollouts; prints reward and metrics of each."""

import asyncio
import json
import sys

import verifiers as vf

from retort.client import AsyncRewardClient
from retort.client.adapters import verifiers_reward


async def main() -> None:
    completion = [{"role": "assistant", "content": "<answer>B</answer>"}]
    async with AsyncRewardClient(sys.argv[1]) as client:
        rubric = vf.Rubric(funcs=[verifiers_reward(client, "mcq")], weights=[1.0])
        scored = []
        for answer in ("B", "C", ""):
            state = vf.State(prompt=[], completion=completion, answer=answer, task="t", info={}, timing=None)
            await rubric.score_rollout(state)
            scored.append([state["reward"], state["metrics"]])
    print(json.dumps(scored))


asyncio.run(main())
