"""What is exported of a policy whose shards lie on two ranks is the whole of it."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.weight_sync import Snapshot, TensorSpec, WeightManifest
from services.trainer.export import Exported, Exports, exported
from services.trainer.policy import Policy, load_language_model
from tests.integration.rank_programs import TINY, Arrays, whole
from tests.integration.trainer_ranks import Ranks
from tests.training import a_config

SCORES = [0.5, 0.25, 0.75]


def export_three_steps(directory: Path) -> list[Arrays]:
    """Steps 1 to 3, of which every second is kept; rank 0 alone has snapshots. The policy after each."""
    config = a_config(directory, model={"path": str(TINY)}, checkpoint={"every": 2})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = Policy(load_language_model(config.model), config.trainer, mesh, dtype=torch.float32, temperature=1.0)
    exports = Exports(config, AutoTokenizer.from_pretrained(TINY), write_card=None)
    specs = [TensorSpec(name=name, shape=shape, dtype="float32") for name, shape in policy.specs]
    manifest = WeightManifest.of(specs, 2**20)
    history = []
    snapshot = None
    for step, score in enumerate(SCORES, start=1):
        policy.version = step
        for shard in policy.local_shards():
            shard.mul_(1.25)
        taken = Snapshot.take(step, manifest, policy.full_tensors())
        snapshot = taken if policy.rank == 0 else None
        exports.after_step(snapshot, score)
        history.append({name: whole(tensor) for name, tensor in policy.full_tensors()})
    exports.after_run(snapshot)
    return history


def test_what_two_ranks_export_is_the_whole_policy(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    history, same = ranks(2).run(export_three_steps, tmp_path)
    hf = tmp_path / "hf"
    expected = {
        "step-000002": Exported(2, 0.25),
        "best_avg16": Exported(3, 0.75),
        ".": Exported(3, None),
    }
    assert {place: exported(hf / place) for place in expected} == expected
    assert sorted(path.name for path in hf.iterdir() if path.is_dir()) == ["best_avg16", "step-000002"]
    for place, known in expected.items():
        policy = history[known.step - 1]
        tensors = load_file(hf / place / "model.safetensors")
        assert {name: (tensor.numpy() == policy[name]).all() for name, tensor in tensors.items()} == dict.fromkeys(
            policy, True
        )
    assert all((history[2][name] == same[2][name]).all() for name in same[2])
    best = AutoModelForCausalLM.from_pretrained(hf, subfolder="best_avg16")
    assert (best.get_input_embeddings().weight.detach().numpy() == history[2]["model.embed_tokens.weight"]).all()
