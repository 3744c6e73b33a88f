"""The policy in Hugging Face format: what `AutoModelForCausalLM.from_pretrained` reads."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from retort.config import RunConfig
from services.trainer.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_hugging_face(policy: Policy, config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write `hf/` of the run, in the served dtype; whole or not at all. A collective."""
    dtype = getattr(torch, config.model.dtype)
    tensors: dict[str, Tensor] = {}
    for name, tensor in policy.full_tensors():
        if policy.rank == 0:
            tensors[name] = tensor.to("cpu", dtype).contiguous()
    if policy.rank == 0:
        _write(config.directory / "hf", tensors, config, tokenizer)


def _write(
    directory: Path, tensors: dict[str, Tensor], config: RunConfig, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    unfinished = directory.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model_config = AutoConfig.from_pretrained(config.model.path)
    model_config.dtype = config.model.dtype
    model_config.save_pretrained(unfinished)
    GenerationConfig.from_model_config(model_config).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)
