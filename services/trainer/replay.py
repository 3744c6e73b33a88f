"""`torchrun -m services.trainer.replay --config FILE --step N --out FILE`: train again on what a run has recorded.

The training loop is the run's own, `train.train`, from the newest checkpoint before the step (or the initial model)
to the step. What surrounds it is what ranks other than 0 have: no queue, no replicas, no files that it writes; and
its steps come from the run's files. With as many ranks as the run had, and `trainer.deterministic`, bits are the same.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch.distributed as dist
from transformers import AutoTokenizer

from retort.config import ConfigError, RunConfig, load_config
from retort.rollouts import RolloutGroup
from retort.telemetry import die_with_parent, log_event, start_logging
from retort.unpickling import refuse_unpickling
from services.trainer.batch import StepBatch
from services.trainer.checkpoint import Checkpoints
from services.trainer.export import Exports
from services.trainer.guards import DivergedError, KeptStep
from services.trainer.journal import Journal, kept_file, rollouts_file
from services.trainer.metrics import step_metrics
from services.trainer.parts import assembler, make_policy, make_work, start_ranks
from services.trainer.policy import Policy
from services.trainer.publish import WeightPublisher
from services.trainer.steps import Assemble, Steps
from services.trainer.teacher import Teacher
from services.trainer.train import train
from services.trainer.update import Update
from services.trainer.weight_sender import SyncReport
from services.trainer.work import Work


class Result(msgspec.Struct):
    """What the replay found; the command line prints it."""

    start: int
    """Policy version from which it began; 0 is the initial model."""
    recorded: dict[str, float | str] = {}
    replayed: dict[str, float | str] = {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m services.trainer.replay", description=__doc__)
    parser.add_argument("--config", required=True, help="the run's own config.toml")
    parser.add_argument("--step", type=int, required=True, help="the step to repeat")
    parser.add_argument("--out", type=Path, required=True, help="where the first rank writes what it found, as JSON")
    args = parser.parse_args()
    start_logging("replay")
    die_with_parent()
    refuse_unpickling()
    try:
        replay(load_config(args.config), args.step, args.out)
    except ConfigError as error:
        log_event("cannot_replay", logging.ERROR, message=error)
        return error.exit_code
    return 0


def replay(config: RunConfig, step: int, out: Path) -> None:
    """Repeat the run's training up to `step` and write the numbers of both to `out`."""
    # The loop ends after the last step, which is the one that is wanted.
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": step})})
    with start_ranks(config):
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        work = make_work(config, tokenizer)
        policy = make_policy(config)
        teacher = Teacher(policy, on_host="teacher" in config.trainer.offload)
        checkpoints = Unchanged(config.directory / "checkpoints", config.checkpoint.keep_last)
        checkpoints.load(policy, teacher, before=step)
        result = Result(policy.version)
        journal = Replayed(config, step)
        steps = RecordedSteps(assembler(config, work, tokenizer), config.directory)
        weights = WeightPublisher(None, config, policy, probe_ids=work.of_step(1)[0].prompt_ids)
        try:
            train(config, policy, teacher, steps, weights, checkpoints, Exports(config, tokenizer, None), journal)
        except DivergedError as error:
            log_event("stopped_by_a_guard", logging.WARNING, message=error)
        result.recorded, result.replayed = recorded_numbers(config.directory, step), journal.numbers
        if dist.get_rank() == 0:
            out.write_bytes(msgspec.json.encode(result))


class RecordedSteps(Steps):
    """The steps of a run from its files, which every rank reads."""

    def __init__(self, assemble: Assemble, directory: Path) -> None:
        super().__init__(assemble)
        self._directory = directory

    def take(self, step: int) -> Iterator[StepBatch]:
        yield self._assemble(step, recorded_groups(self._directory, step))

    def validate(self, version: int, *, at_once: bool) -> float | None:
        return None

    def finish_validation(self) -> float | None:
        return None

    def should_save(self) -> bool:
        return False


class Unchanged(Checkpoints):
    """A run's checkpoints, to read only."""

    def save(self, policy: Policy, teacher: Teacher) -> None:
        """What was trained once more is not kept."""


class Replayed(Journal):
    """Notes the numbers of one step."""

    def __init__(self, config: RunConfig, step: int) -> None:
        super().__init__()
        self._config, self._step = config, step
        self.numbers: dict[str, float | str] = {}

    def keep_step(self, step: KeptStep) -> None:
        if step.step == self._step:
            self.numbers = numbers_of(step)

    def record(self, batch: StepBatch, updates: Sequence[Update], report: SyncReport, work: Work) -> None:
        super().record(batch, updates, report, work)
        if batch.step == self._step:
            longest, max_ratio = self._config.sampling.max_completion_tokens, self._config.method.max_rollout_ratio
            self.numbers = dict(step_metrics(batch, updates, longest, max_ratio))


def recorded_groups(directory: Path, step: int) -> list[RolloutGroup]:
    """The groups that a step was trained on, or on which a guard stopped it; every number bit for bit.

    Raises ConfigError when the run has neither.
    """
    file, kept = rollouts_file(directory, step), kept_file(directory, step)
    if file.exists():
        # A line has more than a group, and not its kind, which its place tells.
        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        return [msgspec.convert({**line, "kind": "train"}, RolloutGroup) for line in lines]
    if kept.exists():
        return KeptStep.from_bytes(kept.read_bytes()).groups
    raise ConfigError(f"step {step} cannot be repeated: the run has neither {file} nor {kept}.")


def recorded_numbers(directory: Path, step: int) -> dict[str, float | str]:
    """The step's line of metrics.jsonl, or what a guard kept of its updates."""
    metrics = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    found = {name: value for line in lines if line["step"] == step for name, value in line.items()}
    return found or numbers_of(KeptStep.from_bytes(kept_file(directory, step).read_bytes()))


def numbers_of(step: KeptStep) -> dict[str, float | str]:
    """What JSON has no number for, NaN and infinities, as words."""
    numbers: dict[str, float | str] = {}
    for number, (loss, grad_norm) in enumerate(zip(step.losses, step.grad_norms, strict=True), start=1):
        numbers |= {f"update {number}, loss": str(loss), f"update {number}, grad norm": str(grad_norm)}
    return {**numbers, "why": step.why}


if __name__ == "__main__":
    raise SystemExit(main())
