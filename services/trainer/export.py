"""The policies of a run in Hugging Face format: what `AutoModelForCausalLM.from_pretrained` reads.

    hf/  model.safetensors ...  README.md      the last policy, and the model card of them all
         step-000010/  step-000020/ ...        the policy after every `checkpoint.every` steps
         best_avg16/                           the policy with the best validation so far

Each is whole or absent. The weights say in their header what they are, so that one rename replaces both. Of a policy
of adapters it is what they and their base add up to; `adapter/` in each has them alone, as peft reads them.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from retort.config import ConfigError, RunConfig
from retort.disk import writing
from retort.lora import MergedWeights
from retort.weight_sync import LoraBase, Snapshot
from services.trainer.fence import Fence
from services.trainer.lora import peft_config
from services.trainer.policy import load_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
ROOT = "."
ADAPTER = "adapter"
_PEFT_PREFIX = "base_model.model."
"""What peft's files have before the names of the model that it is put around."""


@dataclass(frozen=True)
class Exported:
    """What exported weights say about themselves."""

    step: int
    score: float | None
    """Validation avg@n that was measured on these very weights; None where nobody measured."""


def exported(directory: Path) -> Exported | None:
    """What is in an export's directory; None when there is no whole one."""
    if not (directory / WEIGHTS).exists():
        return None
    with safe_open(directory / WEIGHTS, "pt") as file:
        said = file.metadata()
    return Exported(int(said["step"]), float(said["score"]) if "score" in said else None)


def _header(export: Exported) -> dict[str, str]:
    """As `exported` reads it. `format` is what transformers asks for."""
    score = {} if export.score is None else {"score": repr(export.score)}
    return {"format": "pt", "step": str(export.step), **score}


def hf_directory(config: RunConfig) -> Path:
    """Where the exports of a run are."""
    return config.directory / "hf"


def _unfinished(config: RunConfig) -> Path:
    return hf_directory(config) / ".unfinished"


def best_name(config: RunConfig) -> str:
    """The directory of the best policy, named after what is compared."""
    return f"best_avg{config.validation.samples}"


class Exports:
    """Writes the directory `hf/` of a run, from the snapshots that replicas get. Rank 0 has them; others do nothing."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: "PreTrainedTokenizerBase",
        write_card: Callable[[], None] | None,
        fence: Fence | None = None,
    ) -> None:
        """`write_card` is called after every export; `fence` keeps trainers out that were replaced."""
        self._config = config
        self._tokenizer = tokenizer
        self._write_card = write_card
        self._fence = fence

    def after_step(self, snapshot: Snapshot | None, score: float | None) -> None:
        """Export the policy if it is one to keep, or better than every one before.

        `score` is its validation avg@n; None: not validated, or not yet.
        """
        if snapshot and snapshot.version % self._config.checkpoint.every == 0:
            self._export(snapshot, f"step-{snapshot.version:06d}", score)
        if score is not None:
            self.after_validation(snapshot, score)

    def after_validation(self, snapshot: Snapshot | None, score: float) -> None:
        """Export the policy if it is better than every one before."""
        if snapshot and self._is_best(score):
            self._export(snapshot, best_name(self._config), score)

    def after_run(self, snapshot: Snapshot | None) -> None:
        """Export the policy with which the run ended, or stopped."""
        if snapshot:
            self._export(snapshot, ROOT, None)

    def _is_best(self, score: float) -> bool:
        # A best of a step that is being trained again, after a crash, stays: score and weights belong together whatever
        # happened since, and what it replaced is gone.
        best = exported(hf_directory(self._config) / best_name(self._config))
        return best is None or best.score is None or score > best.score

    def _export(self, snapshot: Snapshot, place: str, score: float | None) -> None:
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in snapshot.tensors()}
        adapters: dict[str, Tensor] = {}
        if snapshot.manifest.lora_base:
            adapters, tensors = tensors, self._merged(snapshot.manifest.lora_base, tensors, snapshot.digests[-1])
        export = Exported(snapshot.version, score)
        with self._fence.held() if self._fence else contextlib.nullcontext():
            directory = hf_directory(self._config) / place
            with writing(directory, draft=_unfinished(self._config)):
                write_model(directory, tensors, self._config, self._tokenizer, export, adapters)
            if self._write_card:
                with writing(hf_directory(self._config)):
                    self._write_card()

    def _merged(self, base: LoraBase, adapters: dict[str, Tensor], base_digest: int) -> dict[str, Tensor]:
        """What replicas make of the adapters. Raises ConfigError when the base's files are others by now."""
        files = load_language_model(self._config.model).named_parameters()
        merged = MergedWeights(base, ((name, weight.detach()) for name, weight in files), adapters, torch.device("cpu"))
        tensors = dict(merged)
        if merged.base_digest != base_digest:
            raise ConfigError(
                f"model.path = {self._config.model.path!r} does not hold the weights any more with which the trainer "
                "started, so the adapters cannot be merged into them. Put them back and resume."
            )
        return tensors


def write_model(
    directory: Path,
    tensors: dict[str, Tensor],
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    export: Exported,
    adapters: dict[str, Tensor] | None = None,
) -> None:
    """Write a model whole or not at all; one that is there is replaced at once.

    `adapters`: what it was merged from, if it was.
    """
    unfinished = _unfinished(config)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model_config = AutoConfig.from_pretrained(config.model.path)
    model_config.dtype = config.model.dtype
    model_config.save_pretrained(unfinished)
    GenerationConfig.from_model_config(model_config).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    save_file(tensors, unfinished / WEIGHTS, metadata=_header(export))
    if adapters:
        _write_adapters(unfinished / ADAPTER, adapters, config, export)
    for file in unfinished.rglob("*.safetensors"):
        # safetensors writes for its owner alone; who may read the other files may read the weights.
        shutil.copymode(unfinished / "config.json", file)
    files = sorted((path for path in unfinished.rglob("*") if path.is_file()), key=lambda path: path.name == WEIGHTS)
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if not directory.exists():
        unfinished.rename(directory)
        return
    # All but the weights is the same at every step of a run, so the last rename is the one that counts. Adapters are
    # not; those that a crash left beside older weights say so in their header.
    for file in files:
        place = directory / file.relative_to(unfinished)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(unfinished)


def _write_adapters(directory: Path, adapters: dict[str, Tensor], config: RunConfig, export: Exported) -> None:
    described = peft_config(config.lora)
    described.base_model_name_or_path = config.model.path
    described.inference_mode = True
    described.save_pretrained(str(directory))
    named = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in adapters.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata=_header(export))
