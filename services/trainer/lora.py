"""Adapters in place of all weights as what is trained. peft makes them; `retort.lora` says what they add up to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from retort.config import ConfigError, LoraConfig, MissingDependencyError
from retort.lora import base_digest
from retort.weight_sync import LoraBase, TensorSpec

if TYPE_CHECKING:
    import peft

_ADAPTER = "default"
"""peft's name for the one adapter that a layer has here."""


@dataclass(frozen=True)
class Adapters:
    """What there is to know of a policy of which adapters alone are trained."""

    base: LoraBase
    base_digest: int
    description: str
    """Equal only if adapters of one can go on as those of the other."""


def add_adapters(language_model: PreTrainedModel, config: LoraConfig, *, dtype: torch.dtype, seed: int) -> Adapters:
    """Freeze the model's weights in `dtype` and give its layers adapters in float32, which add nothing yet: B is 0.

    Every rank that has the same seed makes the same ones.
    Raises ConfigError for targets that the model does not have.
    """
    specs = specs_of(language_model, dtype)
    digest = base_digest(specs, dict(language_model.named_parameters()))
    lora = peft_config(config)
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(lora, language_model, adapter_name=_ADAPTER)
        except ValueError as error:
            raise ConfigError(f"lora.targets = {config.targets}: {error}") from None
    for parameter in language_model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    targets = ", ".join(sorted(config.targets)) or "every linear layer"
    description = f"rank {config.rank}, alpha {config.alpha:g}, on {targets} of base {digest:016x}"
    return Adapters(LoraBase(tensors=specs, scale=config.alpha / config.rank), digest, description)


def peft_config(config: LoraConfig) -> "peft.LoraConfig":
    """The same in peft's words. Raises MissingDependencyError without peft, ConfigError for what is never trained."""
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            f"lora.rank = {config.rank} needs peft: {error}. Install retort[lora], or set lora.rank = 0."
        ) from None
    if frozen := {"lm_head", "embed_tokens"} & {target.rpartition(".")[-1] for target in config.targets}:
        raise ConfigError(
            f"lora.targets: {', '.join(sorted(frozen))} cannot have an adapter. Name layers of the blocks, or none."
        )
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.targets or "all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def specs_of(language_model: PreTrainedModel, dtype: torch.dtype) -> list[TensorSpec]:
    """Name and shape of every weight, as it is served."""
    name_of_dtype = str(dtype).removeprefix("torch.")
    return [
        TensorSpec(name=name, shape=list(parameter.shape), dtype=name_of_dtype)
        for name, parameter in language_model.named_parameters()
    ]


def checkpoint_name(parameter: str) -> str:
    """The parameter's name in files: peft's names of factors have the adapter's in them, which files leave out."""
    return parameter.replace(f".{_ADAPTER}.weight", ".weight")
