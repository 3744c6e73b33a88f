"""Packages, questions, memory, disk and ports."""

import shutil
from collections.abc import Callable, Mapping
from types import MappingProxyType

from retort.cli import preflight
from retort.cli.invocation import command
from retort.cli.machine.finding import Answer, failed, ok, warning
from retort.cli.plan.model_shape import read_shape
from retort.cli.process_table import visible_gpus
from retort.config import ConfigError, RunConfig
from retort.questions import questions_of

GIB = 2**30
ENGINE_GIB = 2.5
"""A process with vLLM and torch, before weights and cache."""
TRAINER_GIB = 1.0
"""A trainer rank before weights."""
SHARED_MEMORY_GIB = 1
"""What vLLM and NCCL pass through /dev/shm; a container's default of 64 MiB ends with a bus error."""


def packages(config: RunConfig) -> Answer:
    preflight.check_dependencies(config)
    return ok("everything that the run imports is installed")


def questions(config: RunConfig) -> Answer:
    try:
        train, validation = questions_of(config)
    except ConfigError as error:
        fix = f"Correct [data], or make the file: `{command('prepare')}` has published ones."
        return failed(str(error).rstrip("."), fix)
    return ok(f"{len(train)} questions to train on, {len(validation)} to validate with")


def memory(config: RunConfig) -> Answer:
    """Of the host. On GPUs the weights pass through it once; without, everything lies in it."""
    import psutil  # type: ignore[import-untyped]  # it has no types

    parameters = read_shape(config.model.path).parameters
    engines = config.rollout.replicas * ENGINE_GIB
    if visible_gpus():
        needed = engines + config.trainer.ranks * TRAINER_GIB + 4 * parameters * config.trainer.ranks / GIB
    else:
        engines += config.rollout.replicas * (config.rollout.kv_cache_gib + 4 * parameters / GIB)
        needed = engines + config.trainer.ranks * TRAINER_GIB + 20 * parameters / GIB
    free = psutil.virtual_memory().available / GIB
    text = f"{free:.1f} GiB free, the run wants about {needed:.1f} GiB"
    if free < needed:
        return failed(text, "End what else uses it, or lower rollout.replicas or rollout.kv_cache_gib.")
    return ok(text)


def shared_memory(_: RunConfig) -> Answer:
    free = shutil.disk_usage("/dev/shm").free / GIB
    text = f"{free:.1f} GiB in /dev/shm"
    if free < SHARED_MEMORY_GIB:
        return failed(
            text, "A container needs shm_size (compose), --shm-size (docker) or an emptyDir in memory (Kubernetes)."
        )
    return ok(text)


def disk(config: RunConfig) -> Answer:
    """Checkpoints hold weights, teacher and two moments in float32; one more than is kept is being written."""
    place = config.directory.resolve()
    while not place.exists():
        place = place.parent
    parameters = read_shape(config.model.path).parameters
    exports = 2 + -(-config.trainer.steps // config.checkpoint.every)
    needed = ((config.checkpoint.keep_last + 1) * 16 * parameters + exports * 2 * parameters) / GIB
    free = shutil.disk_usage(place).free / GIB
    text = f"{free:.1f} GiB free at {place}, checkpoints and exports want about {needed:.1f} GiB"
    if free < needed:
        return failed(text, "Another --run-dir, a lower checkpoint.keep_last, or a higher checkpoint.every.")
    if free < 2 * needed:
        return warning(text, "The rollouts of every step are kept as well; see that there is room for them.")
    return ok(text)


def ports(config: RunConfig) -> Answer:
    preflight.check_ports(config)
    named = [port for _, _, port in preflight.chosen_ports(config)]
    return ok(f"{', '.join(map(str, named))} free" if named else "the system chooses free ones")


CHECKS: Mapping[str, Callable[[RunConfig], Answer]] = MappingProxyType(
    {
        "packages": packages,
        "questions": questions,
        "memory": memory,
        "shared memory": shared_memory,
        "disk": disk,
        "ports": ports,
    }
)
