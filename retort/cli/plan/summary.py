"""The last lines of a plan: what the run needs, whether it fits, how long it takes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from retort.cli.plan.figures import GIB, Assumptions, Figure
from retort.config import RunConfig

TRAINER, ROLLOUT, TIME = "Memory of a trainer rank", "Memory of a rollout GPU", "Expected time of a step"


def summary(config: RunConfig, plan: Sequence[Figure], given: Assumptions, *, on_cpu: bool) -> Iterator[str]:
    """`plan` is what `figures` gave."""
    values = {(figure.section, figure.name): figure.value for figure in plan}
    yield from _cpu(config, values) if on_cpu else _gpus(config, values, given)
    yield f"disk: {_disk(config, values) / GIB:,.2f} GiB for checkpoints and exported models"
    for key, file in (("train", config.data.train), ("validation", config.data.validation)):
        if not Path(file).is_file():
            yield f"missing: data.{key} = {file}: no such file"


def _cpu(config: RunConfig, values: dict[tuple[str, str], float]) -> Iterator[str]:
    trainer, weights = values[TRAINER, "together"] / GIB, values["Weights", "sent per weight sync"] / GIB
    replica = weights + config.rollout.kv_cache_gib
    memory = config.trainer.ranks * trainer + config.rollout.replicas * replica
    yield f"no GPU: the CPU and {memory:,.1f} GiB of memory, libraries not counted; its speed is not predicted"


def _gpus(config: RunConfig, values: dict[tuple[str, str], float], given: Assumptions) -> Iterator[str]:
    ranks, sampling = config.trainer.ranks, config.rollout.replicas * config.rollout.tensor_parallel
    needed = values[TRAINER, "together"] / GIB
    fits = "it fits"
    if needed > given.gpu_gib:
        fits = f"it does NOT fit: a trainer rank needs {needed:,.0f} GiB of {given.gpu_gib:g}"
    elif values[ROLLOUT, "longest sequences that fit"] < 1:
        fits = "it does NOT fit: the KV cache of a rollout GPU holds no sequence of model.max_length"
    yield f"GPUs: {ranks + sampling} ({ranks} train, {sampling} sample); {fits}"
    step = values[TIME, "a step"]
    yield f"time: {step * config.trainer.steps / 3600:,.1f} hours for {config.trainer.steps} steps, without validations"
    replicas, best = values[TIME, "rollout replicas in the best split"], values[TIME, "a step in the best split"]
    if best < 0.99 * step:
        others = ranks + sampling - replicas * config.rollout.tensor_parallel
        yield (
            f"quicker: rollout.replicas={replicas:.0f} trainer.ranks={others:.0f} is predicted to take "
            f"{1 - best / step:.0%} less time"
        )


def _disk(config: RunConfig, values: dict[tuple[str, str], float]) -> float:
    """Bytes of the checkpoints that are kept and one that is being written, of every kept model, the best, the last."""
    models = config.trainer.steps // config.checkpoint.every + 2
    checkpoints = (config.checkpoint.keep_last + 1) * values["Weights", "a checkpoint"]
    return checkpoints + models * values["Weights", "sent per weight sync"]
