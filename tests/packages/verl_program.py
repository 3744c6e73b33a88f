"""Arguments: the service's address, the answer. verl's own reward manager scores one sample; prints it, as JSON."""

import json
import sys

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager

address, answer = sys.argv[1:]
function = {
    "path": "retort/client/adapters.py",
    "name": "compute_score",
    "reward_kwargs": {"checker": "mcq", "address": address},
}
manager = {"source": "register", "name": "naive"}
config = OmegaConf.create({"reward": {"custom_reward_function": function, "reward_manager": manager}})
tokenizer = AutoTokenizer.from_pretrained("models/tiny")
ids = torch.tensor([tokenizer.encode("<answer>B</answer>")])


def column(value):
    return np.array([value], dtype=object)


sample = DataProto.from_dict(
    tensors={"responses": ids, "attention_mask": torch.ones_like(ids)},
    non_tensors={
        "data_source": column("sciknoweval"),
        "reward_model": column({"ground_truth": answer}),
        "extra_info": column({"index": 7}),
    },
)
loaded = load_reward_manager(config, tokenizer)
print(json.dumps(loaded.loop.run_until_complete(loaded.run_single(sample))))
