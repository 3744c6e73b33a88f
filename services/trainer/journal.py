"""What a run leaves behind: metrics.jsonl, the groups it was trained on, and what it is doing right now."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from retort.config import RunConfig
from retort.disk import writing
from retort.questions import Question, question_text
from retort.rollouts import RolloutGroup, WorkItem
from retort.telemetry import log_event, log_with
from services.trainer import gauges
from services.trainer.batch import StepBatch
from services.trainer.fence import Fence
from services.trainer.guards import KeptStep, collapse_signals
from services.trainer.metrics import step_metrics, validation_metrics_of
from services.trainer.ranks import gather_all
from services.trainer.update import Update
from services.trainer.weight_sender import SyncReport
from services.trainer.work import Work, work_metrics

Decode = Callable[[Sequence[int]], str]
PHASES = {
    "wait_replica": "waiting for a rollout replica",
    "wait_redis": "waiting for room in Redis",
    "wait_groups": "waiting for rollouts",
    "validation": "validating",
    "old_logprobs": "training",
    "teacher": "training",
    "update": "training",
    "weight_sync": "syncing weights",
    "checkpoint": "saving",
}
LEARNED = ("advantage", "demonstration", "token_weights", "update", "has_gradient")
"""What a training step adds to a completion: `update` is the number, from 1, of the step's update that it counts in."""


class Journal:
    """Times the parts of a step. On ranks other than 0 that is all: the rest is rank 0's, a `RunJournal`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """What the parts of the step took so far."""

    @contextmanager
    def timing(self, name: str, *, waiting_for: str = "", step: int | None = None) -> Iterator[None]:
        """Add the block's time to `timing_s/<name>`, and show it as what the trainer is doing."""
        self.show(PHASES[name], waiting_for, step)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.keep_span(name, seconds)

    def keep_span(self, name: str, seconds: float) -> None:
        """A part of a step that has just ended."""

    def show(self, phase: str, waiting_for: str = "", step: int | None = None) -> None:
        """Say what the trainer is doing."""

    def beat(self) -> None:
        """Say that it is still doing it."""

    def beat_in_sync(self, unanswered: str) -> None:
        """Say whom a weight sync waits for; with nothing, what the phase at hand waits for."""

    def is_validated(self, version: int) -> bool:
        """Whether metrics.jsonl has the validation of a policy version."""
        return False

    def record_untrained(self) -> None:
        """The line of step 0."""

    def record(self, batch: StepBatch, updates: Sequence[Update], report: SyncReport, work: Work) -> None:
        """The line of a step, and its groups. A collective: the token weights lie on the rank that computed them."""
        batch.token_weights = gather_all(batch.token_weights).sum(0)

    def keep_step(self, step: KeptStep) -> None:
        """A step to which a guard objected, for `retort replay`."""

    def keep_given_up(self, item: WorkItem, question: Question, reason: str) -> None:
        """Work that nobody could finish, for example because a completion is unscorable."""

    def keep_validation(self, version: int, groups: Sequence[tuple[RolloutGroup, Question]]) -> None:
        """The groups of a validation. Their metrics go into the line of that step, or one more if that is written."""


class RunJournal(Journal):
    """Writes the files of a run and its progress in Redis."""

    def __init__(
        self,
        config: RunConfig,
        *,
        version: int,
        question_of: Callable[[RolloutGroup], Question],
        decode: Decode,
        set_progress: Callable[..., None],
        fence: Fence,
    ) -> None:
        """Cuts the files back to `version`, from which the run goes on."""
        super().__init__()
        self._config = config
        self._directory = config.directory
        self._version = version
        self._question_of = question_of
        self._decode = decode
        self._set_progress = set_progress
        self._fence = fence
        self._step_started = time.perf_counter()
        self._validation: dict[str, float] = {}
        self._waiting_for = ""
        with fence.held():
            lines = _cut_back(self._directory / "metrics.jsonl", version)
            _drop_torn_line(self._directory / "timeline.jsonl")
            for groups in (*self._directory.glob("rollouts/step-*"), *self._directory.glob("validation/step-*")):
                if int(groups.stem.removeprefix("step-")) > version:
                    groups.unlink()
        self._recorded = {line["step"] for line in lines}
        self._validated = {line["step"] for line in lines if any(name.startswith("val-core/") for name in line)}

    def show(self, phase: str, waiting_for: str = "", step: int | None = None) -> None:
        now, self._waiting_for = time.time(), waiting_for
        fields = {"phase": phase, "waiting_for": waiting_for, "since": now, "updated": now}
        place = {"step": step or self._version, "steps": self._config.trainer.steps, "policy_version": self._version}
        self._set_progress(**fields, **place)
        log_with(step=place["step"], version=self._version)
        gauges.PROGRESS.set(now)

    def keep_span(self, name: str, seconds: float) -> None:
        # A streamed step has parts several times, and their sums do not tell when. What is saved is the step before.
        step = self._version + (name != "checkpoint")
        path = self._directory / "timeline.jsonl"
        with writing(path), path.open("a") as file:
            file.write(json.dumps({"part": name, "step": step, "end": time.time(), "seconds": seconds}) + "\n")

    def beat(self) -> None:
        now = time.time()
        self._set_progress(updated=now)
        gauges.PROGRESS.set(now)

    def beat_in_sync(self, unanswered: str) -> None:
        now = time.time()
        self._set_progress(waiting_for=unanswered or self._waiting_for, updated=now)
        gauges.PROGRESS.set(now)

    def is_validated(self, version: int) -> bool:
        return version in self._validated

    def record_untrained(self) -> None:
        with self._fence.held():
            self._append(0, {})

    def record(self, batch: StepBatch, updates: Sequence[Update], report: SyncReport, work: Work) -> None:
        super().record(batch, updates, report, work)
        self._version = batch.step
        longest, max_ratio = self._config.sampling.max_completion_tokens, self._config.method.max_rollout_ratio
        metrics = step_metrics(batch, updates, longest, max_ratio)
        metrics["weight_sync/replicas"] = report.replicas
        metrics["weight_sync/probe_gap"] = report.probe_gap
        metrics["weight_sync/seconds"] = report.seconds
        metrics |= work_metrics(work, self.seconds)
        metrics["timing_s/snapshot"] = report.snapshot_seconds
        metrics["timing_s/broadcast"] = report.phase_seconds.get("transfer", 0.0)
        rows = iter(_learned(batch))
        lines = [
            self._line(group, self._question_of(group), [next(rows) for _ in group.rollouts]) for group in batch.groups
        ]
        with self._fence.held():
            _write_lines(rollouts_file(self._directory, batch.step), lines)
            self._append(batch.step, metrics)
        signals = "; ".join(collapse_signals(metrics))
        if signals:
            log_event("collapse_signal", logging.WARNING, message=signals)
        self._set_progress(warning=signals)

    def keep_step(self, step: KeptStep) -> None:
        with self._fence.held():
            _write_whole(kept_file(self._directory, step.step), [step.to_bytes()])

    def keep_given_up(self, item: WorkItem, question: Question, reason: str) -> None:
        path = self._directory / "given_up.jsonl"
        asked = _asked(item, question)
        with self._fence.held(), writing(path), path.open("ab") as file:
            file.write(msgspec.json.encode(asked | {"time": time.time(), "reason": reason}) + b"\n")

    def keep_validation(self, version: int, groups: Sequence[tuple[RolloutGroup, Question]]) -> None:
        metrics = validation_metrics_of(groups)
        nothing = dict.fromkeys(LEARNED)
        lines = [self._line(group, question, [nothing] * len(group.rollouts)) for group, question in groups]
        gauges.set_validation(metrics)
        self._validated.add(version)
        with self._fence.held():
            _write_lines(self._directory / "validation" / f"step-{version:06d}.jsonl", lines)
            if version in self._recorded:
                self._write({"step": version, "time": time.time(), "policy_version": version, **metrics})
            else:
                self._validation = metrics

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        elapsed = time.perf_counter() - self._step_started
        tokens = metrics.get("perf/total_num_tokens", 0.0)
        not_training = sum(
            self.seconds.get(name, 0.0) for name in ("validation", "checkpoint", "wait_replica", "wait_redis")
        )
        line = {
            "step": step,
            "time": time.time(),
            "policy_version": step,
            **metrics,
            **self._validation,
            **{f"timing_s/{name}": seconds for name, seconds in self.seconds.items()},
            "timing_s/step": elapsed,
            **({"perf/throughput": tokens / (elapsed - not_training)} if tokens else {}),
        }
        self._write(line)
        gauges.set_step(line)
        self._recorded.add(step)
        self._validation, self.seconds, self._step_started = {}, {}, time.perf_counter()

    def _write(self, line: Mapping[str, float]) -> None:
        path = self._directory / "metrics.jsonl"
        with writing(path), path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _line(self, group: RolloutGroup, question: Question, learned: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rollouts = [
            {
                **msgspec.to_builtins(rollout),
                "text": self._decode(rollout.completion_ids),
                **of_row,
            }
            for rollout, of_row in zip(group.rollouts, learned, strict=True)
        ]
        return {
            **_asked(group, question),
            "sampled_by": group.sampled_by,
            "generate_seconds": group.generate_seconds,
            "score_seconds": group.score_seconds,
            "began": group.began,
            "prompt_ids": group.prompt_ids,
            "rollouts": rollouts,
        }


def _asked(group: RolloutGroup | WorkItem, question: Question) -> dict[str, Any]:
    return {
        "group_id": group.group_id,
        "step": group.step,
        "data_index": question.index,
        "data_source": question.data_source,
        "question": question_text(question),
        "answer": question.answer,
    }


def _learned(batch: StepBatch) -> list[dict[str, Any]]:
    """What was learned from each row, by the names of `LEARNED`. Rows that nobody taught have no token weights."""
    advantages, active = batch.advantages.tolist(), set(batch.active_rows)
    weights = [
        weights if row_has and advantage else None
        for weights, row_has, advantage in zip(
            batch.split(batch.token_weights), batch.has_demonstration.tolist(), advantages, strict=True
        )
    ]
    has_gradient = [row in active for row in range(len(advantages))]
    columns = (advantages, batch.demonstrations, weights, batch.update_of.tolist(), has_gradient)
    return [dict(zip(LEARNED, values, strict=True)) for values in zip(*columns, strict=True)]


def rollouts_file(directory: Path, step: int) -> Path:
    """The groups of a step; their numbers are written with every bit."""
    return directory / "rollouts" / f"step-{step:06d}.jsonl"


def kept_file(directory: Path, step: int) -> Path:
    """A `KeptStep`."""
    return directory / "kept" / f"step-{step:06d}.msgpack"


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    _write_whole(path, (msgspec.json.encode(line) + b"\n" for line in lines))


def _write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """A whole file or none: a step that is trained again after a crash replaces its file, so no group appears twice."""
    unfinished = path.with_suffix(".unfinished")
    with writing(path, draft=unfinished):
        path.parent.mkdir(exist_ok=True)
        with unfinished.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def _drop_torn_line(path: Path) -> None:
    """What a crash left of a last line would make the next one unreadable too."""
    if path.exists():
        with writing(path):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _cut_back(path: Path, version: int) -> list[dict[str, Any]]:
    """Drop the lines of steps that will be trained again; all of them when training starts from the beginning."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in lines if version and line["step"] <= version]
    unfinished = path.with_suffix(".unfinished")
    with writing(path):
        unfinished.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        unfinished.replace(path)
    return kept
