"""The algorithm, on one screen. Everything it calls has a file of its name.

Every rank executes this. What only rank 0 knows (finished groups, replicas, files) is behind `steps`, `weights` and
`journal`: their methods are collectives, or do nothing on the other ranks.
"""

from retort.config import RunConfig
from services.trainer.batch import StepBatch, join
from services.trainer.checkpoint import Checkpoints
from services.trainer.export import Exports
from services.trainer.guards import Guards
from services.trainer.journal import Journal
from services.trainer.policy import Policy
from services.trainer.publish import WeightPublisher
from services.trainer.schedule import learning_rate, update_sizes
from services.trainer.steps import Steps
from services.trainer.teacher import Teacher
from services.trainer.update import Update, make_update, take_gradient, update_policy
from services.trainer.weight_copy import WeightCopy


def train(
    config: RunConfig,
    policy: Policy,
    teacher: Teacher,
    steps: Steps,
    weights: WeightPublisher,
    checkpoints: Checkpoints,
    exports: Exports,
    journal: Journal,
) -> bool:
    """Run the training steps; step s turns policy version s - 1 into s. False if asked to stop before the last."""
    settings, guards = config.trainer, Guards(config.trainer, journal.keep_step)
    # In a streamed step the policy moves on while its old log-probs are still wanted.
    start = WeightCopy(policy.local_shards()) if settings.is_streamed else None
    saved_version = policy.version

    def is_due(version: int) -> bool:
        return version == settings.steps or version % config.validation.every == 0

    weights.publish(policy)
    if policy.version == 0:
        steps.validate(policy.version, at_once=True)
        journal.record_untrained()
    elif is_due(policy.version):
        # The run ended while this validation went on, and the policy is still the one that it measured.
        keep_if_best(weights, exports, steps.validate(policy.version, at_once=False))

    while policy.version < settings.steps:
        parts: list[StepBatch] = []
        updates: list[Update] = []
        for batch in steps.take(policy.version + 1):
            # Before its first update, the policy is what `start` keeps.
            updates += learn(config, policy, teacher, start if parts else None, batch, guards, journal)
            parts.append(batch)
        if not parts:
            break
        # Before another version is served, because no replica could answer for the old one any more.
        keep_if_best(weights, exports, steps.finish_validation())
        batch = join(parts)
        with journal.timing("update"):
            finite_updates = sum(update.is_finite for update in updates)
            teacher.follow(policy, rate=config.method.teacher_update_rate, finite_updates=finite_updates)
        if start:
            start.take(policy.local_shards())
        policy.version = batch.step

        with journal.timing("weight_sync"):
            weights.publish(policy)
        is_last = policy.version == settings.steps
        score = steps.validate(policy.version, at_once=is_last) if is_due(policy.version) else None
        journal.record(batch, updates, weights.report, policy.take_work())
        with journal.timing("checkpoint"):
            exports.after_step(weights.snapshot, score)
        if is_last or policy.version % config.checkpoint.every == 0 or steps.should_save():
            saved_version = save(policy, teacher, steps, checkpoints, journal)

    if saved_version != policy.version:
        save(policy, teacher, steps, checkpoints, journal)
    return policy.version == settings.steps


def learn(
    config: RunConfig,
    policy: Policy,
    teacher: Teacher,
    start: WeightCopy | None,
    batch: StepBatch,
    guards: Guards,
    journal: Journal,
) -> list[Update]:
    """Make the updates of a step, or of a part of it. `start`: the step's first weights, where they are gone by now."""
    settings = config.trainer
    sizes = update_sizes(
        groups_per_step=settings.groups_per_step,
        groups_per_update=settings.groups_per_update,
        group_size=settings.group_size,
        ranks=policy.ranks,
    )
    first, *others = batch.updates(settings.update_order, sizes.sequences_per_update, config.seed)
    # The first update's own pass says what the policy of the step's start thinks of its rows.
    by_itself = set() if start else set(first) & set(batch.active_rows)
    rows = [row for row in batch.scored_rows if row not in by_itself]
    with journal.timing("old_logprobs"):
        batch.old_logprobs, batch.entropies = policy.score(batch, rows, batch.prompts, start)
    with journal.timing("teacher"):
        taught = batch.taught_rows
        batch.teacher_logprobs, _ = policy.score(batch, taught, batch.teacher_prompts, teacher, entropies=False)

    with journal.timing("update"):
        rate = learning_rate(batch.step, base=settings.learning_rate, warmup_steps=settings.warmup_steps)
        gradient = take_gradient(policy, batch, first, config.method, is_first=start is None)
        guards.check_engine(batch)
        updates = [make_update(policy, gradient, rate)]
        updates += [update_policy(policy, batch, other, config.method, learning_rate=rate) for other in others]
        guards.check_updates(updates)
    return updates


def keep_if_best(weights: WeightPublisher, exports: Exports, score: float | None) -> None:
    """Export the policy that is served if its validation, done beside a step, found it the best."""
    if score is not None:
        exports.after_validation(weights.snapshot, score)


def save(policy: Policy, teacher: Teacher, steps: Steps, checkpoints: Checkpoints, journal: Journal) -> int:
    """Make the policy durable, then let go of the groups it was trained on. Returns its version."""
    with journal.timing("checkpoint"):
        checkpoints.save(policy, teacher)
    # Only now: until the checkpoint is durable, a restarted trainer needs these groups again.
    steps.release(policy.version)
    return policy.version
