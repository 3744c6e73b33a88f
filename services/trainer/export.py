"""The policies of a run in Hugging Face format: what `AutoModelForCausalLM.from_pretrained` reads.

    hf/  model.safetensors ...  README.md      the last policy, and the model card of them all
         step-000010/  step-000020/ ...        the policy after every `checkpoint.every` steps
         best_avg16/                           the policy with the best validation so far

Each is whole or absent. The weights say in their header what they are, so that one rename replaces both.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from retort.config import RunConfig
from retort.disk import writing
from retort.weight_sync import Snapshot
from services.trainer.fence import Fence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
ROOT = "."


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
        export = Exported(snapshot.version, score)
        with self._fence.held() if self._fence else contextlib.nullcontext():
            directory = hf_directory(self._config) / place
            with writing(directory, draft=_unfinished(self._config)):
                write_model(directory, tensors, self._config, self._tokenizer, export)
            if self._write_card:
                with writing(hf_directory(self._config)):
                    self._write_card()


def write_model(
    directory: Path,
    tensors: dict[str, Tensor],
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    export: Exported,
) -> None:
    """Write a model whole or not at all; one that is there is replaced at once."""
    unfinished = _unfinished(config)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model_config = AutoConfig.from_pretrained(config.model.path)
    model_config.dtype = config.model.dtype
    model_config.save_pretrained(unfinished)
    GenerationConfig.from_model_config(model_config).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    save_file(tensors, unfinished / WEIGHTS, metadata=_header(export))
    # safetensors writes for its owner alone; who may read the other files may read the weights.
    shutil.copymode(unfinished / "config.json", unfinished / WEIGHTS)
    files = sorted((path for path in unfinished.rglob("*") if path.is_file()), key=lambda path: path.name == WEIGHTS)
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if not directory.exists():
        unfinished.rename(directory)
        return
    # All but the weights is the same at every step of a run, so the last rename is the one that counts.
    for file in files:
        place = directory / file.relative_to(unfinished)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(unfinished)
