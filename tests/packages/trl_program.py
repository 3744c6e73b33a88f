"""Arguments: the service's address, a folder. One step of TRL's GRPO; prints the columns of its metrics, as JSON."""

import json
import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from retort.client import RewardClient
from retort.client.adapters import trl_reward

address, folder = sys.argv[1:]
messages = [{"role": "user", "content": "Which is helium? A: H B: He C: Li D: Be"}]
rows = [{"prompt": messages, "answer": "B"}, {"prompt": messages, "answer": ""}] * 2
config = GRPOConfig(
    folder,
    max_steps=1,
    per_device_train_batch_size=4,
    num_generations=2,
    max_completion_length=8,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
)
with RewardClient(address) as client:
    reward = trl_reward(client, "mcq")
    given = []

    def remembered(**columns):
        given.extend(rewards := reward(**columns))
        return rewards

    remembered.__name__ = reward.__name__
    trainer = GRPOTrainer(
        "models/tiny", reward_funcs=remembered, args=config, train_dataset=Dataset.from_list(rows), eval_dataset=None
    )
    trainer.train()
print(json.dumps({"rewards": given, "metrics": sorted(trainer.state.log_history[0])}))
