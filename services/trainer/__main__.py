"""`torchrun -m services.trainer --config FILE`: one rank of the trainer. It goes on from the newest checkpoint."""

import argparse
import logging
import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING

import torch
from prometheus_client import start_http_server
from transformers import AutoTokenizer

from retort.config import ConfigError, RunConfig, load_config
from retort.disk import DiskFullError
from retort.identity import identity_of
from retort.metrics_file import validation_scores
from retort.questions import Question
from retort.queues import Fenced, RunView, TrainerQueue, connect
from retort.telemetry import die_with_parent, log_event, log_with, start_logging
from retort.unpickling import refuse_unpickling
from retort.weight_sync import authorization
from services.trainer.admission import GivenUpError, StalledError, WorkList
from services.trainer.checkpoint import Checkpoints
from services.trainer.export import Exports
from services.trainer.fence import Fence
from services.trainer.guards import DivergedError
from services.trainer.journal import Journal, RunJournal
from services.trainer.model_card import ModelCard
from services.trainer.parts import assembler, freeze_heap, make_policy, make_work, start_ranks
from services.trainer.prompts import decode
from services.trainer.publish import WeightPublisher
from services.trainer.steps import Rank0Steps, Steps
from services.trainer.teacher import Teacher
from services.trainer.train import train
from services.trainer.weight_sender import WeightSender

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOPPED = 130
EXIT_CODES = {ConfigError: 2, Fenced: 2, StalledError: 4, GivenUpError: 4, DivergedError: 5, DiskFullError: 6}


def main() -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m services.trainer", description=__doc__)
    parser.add_argument("--config", required=True, help="the run file")
    args = parser.parse_args()
    start_logging("trainer")
    die_with_parent()
    refuse_unpickling()
    try:
        config = load_config(args.config)
        log_with(run=config.key_prefix)
        return run(config)
    except ConfigError as error:
        log_event("bad_configuration", logging.ERROR, message=error)
        return error.exit_code
    except (Fenced, StalledError, DivergedError, DiskFullError) as error:
        log_event("ended", logging.ERROR, message=error)
        return EXIT_CODES[type(error)]


def run(config: RunConfig) -> int:
    """Wire this rank together and train."""
    terminated = threading.Event()
    # On every rank: torchrun passes SIGTERM on to all, and rank 0 cannot finish a step alone.
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    with start_ranks(config) as is_first:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        work = make_work(config, tokenizer)
        _check_fit(config, work)
        policy = make_policy(config)
        teacher = Teacher(policy, on_host="teacher" in config.trainer.offload)
        fence = Fence(config.directory / "epoch", config.timeouts.startup_s) if is_first else None
        # Before anything is read: a trainer that is still alive must not commit another checkpoint after that.
        queue = _take_over(config, fence) if fence else None
        checkpoints = _checkpoints(config, fence)
        if checkpoints.load(policy, teacher):
            log_event("resumed", version=policy.version)

        assemble_step = assembler(config, work, tokenizer)
        journal, steps, sender = Journal(), Steps(assemble_step), None
        if fence and queue:
            queue.withdraw_later(policy.version + 1 + config.trainer.max_staleness)
            journal = RunJournal(
                config,
                version=policy.version,
                question_of=work.question,
                decode=partial(decode, tokenizer),
                set_progress=queue.set_progress,
                fence=fence,
            )
            sender = _sender(config, queue, fence, tokenizer, journal)
            steps = Rank0Steps(
                assemble_step,
                config,
                work=work,
                queue=queue,
                sender=sender,
                journal=journal,
                stop_requested=lambda: terminated.is_set() or bool(queue.stop_requested()),
            )
        weights = WeightPublisher(sender, config, policy, probe_ids=work.of_step(1)[0].prompt_ids)
        exports = Exports(config, tokenizer, ModelCard(config).write if is_first else None, fence)
        freeze_heap()
        try:
            finished = train(config, policy, teacher, steps, weights, checkpoints, exports, journal)
        except GivenUpError as error:
            journal.keep_given_up(error.item, work.question(error.item), error.reason)
            raise
        finally:
            weights.close()
        exports.after_run(weights.snapshot)
        journal.show("done" if finished else "stopped")
        return 0 if finished else STOPPED


def _sender(
    config: RunConfig, queue: TrainerQueue, fence: Fence, tokenizer: "PreTrainedTokenizerBase", journal: Journal
) -> WeightSender:
    return WeightSender(
        queue,
        config.weight_sync,
        epoch=fence.epoch,
        backend="nccl" if torch.cuda.is_available() else "gloo",
        authorization=authorization(),
        identity=identity_of(config, tokenizer),
        tell=journal.beat_in_sync,
    )


def _checkpoints(config: RunConfig, fence: Fence | None) -> Checkpoints:
    return Checkpoints(
        config.directory / "checkpoints",
        config.checkpoint.keep_last,
        fence,
        keep_best=config.checkpoint.keep_best,
        scores=lambda: validation_scores(config.directory, config.validation.samples),
    )


def _take_over(config: RunConfig, fence: Fence) -> TrainerQueue:
    """Become the run's only trainer, for Prometheus too. Every earlier one is fenced out from here on."""
    if config.trainer.metrics_port:
        _serve_metrics(config.weight_sync.host, config.trainer.metrics_port)
    redis = connect(config.redis.url or os.environ.get("REDIS_URL", ""))
    epoch = fence.take_over(RunView(redis, config.key_prefix).highest_epoch())
    queue = TrainerQueue(redis, config.key_prefix, epoch)
    queue.open()
    queue.withdraw("validation")
    log_event("took_over", epoch=epoch)
    return queue


def _serve_metrics(host: str, port: int) -> None:
    try:
        start_http_server(port, host)
    except OSError as error:
        raise ConfigError(f"trainer.metrics_port = {port}: cannot listen on {host}: {error.strerror}.") from None


def _check_fit(config: RunConfig, work: WorkList) -> None:
    """Raise ConfigError before anything is started that cannot end well."""
    limit = min(config.data.max_prompt_tokens, config.model.max_length - config.sampling.max_completion_tokens)
    for name, questions in (("train", work.train), ("validation", work.validation)):
        longest = max(questions, key=lambda question: _length(work, question))
        if _length(work, longest) > limit:
            raise ConfigError(
                f"data.{name}, line {longest.index + 1}: the prompt has {_length(work, longest)} tokens, and "
                f"data.max_prompt_tokens and model.max_length leave room for {limit}"
            )


def _length(work: WorkList, question: Question) -> int:
    return len(work.encode(question))


if __name__ == "__main__":
    raise SystemExit(main())
