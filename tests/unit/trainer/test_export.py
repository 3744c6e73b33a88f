from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.config import RunConfig
from services.trainer.export import export_hugging_face
from services.trainer.policy import Policy, load_language_model
from tests.training import a_config

TINY = Path(__file__).parents[3] / "models" / "tiny"
IDS = torch.tensor([[11, 12, 13, 14, 15]])


def exported(mesh: DeviceMesh, directory: Path, dtype: str) -> tuple[Policy, RunConfig]:
    """The shipped model, changed in every weight and exported."""
    config = a_config(directory, model={"path": str(TINY), "dtype": dtype})
    policy = Policy(load_language_model(config.model), config.trainer, mesh, dtype=torch.float32, temperature=1.0)
    for shard in policy.local_shards():
        shard.mul_(1.25)
    export_hugging_face(policy, config, AutoTokenizer.from_pretrained(TINY))
    return policy, config


def test_the_export_loads_as_any_model_and_equals_the_policy(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy, config = exported(mesh, tmp_path, "float32")
    model = AutoModelForCausalLM.from_pretrained(config.directory / "hf")
    tensors = dict(policy.full_tensors())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    logprobs = model(IDS).logits[0, :-1].log_softmax(-1)[range(4), IDS[0, 1:]]
    assert policy.score_prompt(IDS[0].tolist()) == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_weights_are_exported_in_the_served_type(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy, config = exported(mesh, tmp_path, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(config.directory / "hf")
    assert model.dtype == torch.bfloat16
    for name, tensor in policy.full_tensors():
        assert torch.equal(model.get_parameter(name), tensor.bfloat16()), name


def test_the_tokenizer_and_its_chat_template_come_along(mesh: DeviceMesh, tmp_path: Path) -> None:
    _, config = exported(mesh, tmp_path, "float32")
    ours, theirs = AutoTokenizer.from_pretrained(config.directory / "hf"), AutoTokenizer.from_pretrained(TINY)
    chat = [{"role": "user", "content": "Which element has the symbol K?"}]
    for tokenizer in (ours, theirs):
        assert tokenizer.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert len(ours) == len(theirs)


def test_an_export_replaces_the_one_before_and_leaves_nothing_unfinished(mesh: DeviceMesh, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model-00001-of-00009.safetensors").touch()
    exported(mesh, tmp_path, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert [path.name for path in (tmp_path / "hf").glob("*.safetensors")] == ["model.safetensors"]
