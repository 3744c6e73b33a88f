"""What holds a run up, in a sentence, and what moving a GPU would change."""

from collections.abc import Mapping, Sequence
from statistics import median

RECENT_STEPS = 10
TRAINING = ("old_logprobs", "teacher", "update")
PARTS = {
    "training": TRAINING,
    "waiting for completions": ("wait_groups", "wait_replica"),
    "weight sync": ("weight_sync",),
    "validation": ("validation",),
    "checkpoints": ("checkpoint",),
}


def bottleneck(lines: Sequence[Mapping[str, float]]) -> str:
    """One or two sentences about the last steps; empty before there is one.

    The prediction lets a step's training time shrink with the trainer's ranks and its waiting time with the replicas:
    the first order. Sampling that training hides is not seen, so a GPU taken from rollout may cost more than it says.
    """
    recent = [line for line in lines if line["step"] > 0 and line.get("timing_s/step")][-RECENT_STEPS:]
    if not recent:
        return ""
    step = median(line["timing_s/step"] for line in recent)
    seconds = {part: _seconds(recent, names) for part, names in PARTS.items()}
    most = max(seconds, key=lambda part: seconds[part])
    said = f"Most of a step of {step:.3g} s goes into {most}: {seconds[most] / step:.0%}."
    ranks, replicas = (int(recent[-1].get(name, 0)) for name in ("perf/trainer_ranks", "weight_sync/replicas"))
    if not ranks or not replicas or most not in ("training", "waiting for completions"):
        return said
    training, waiting = seconds["training"], seconds["waiting for completions"]
    if most == "training":
        gained, lost = training / (ranks + 1), waiting / (replicas - 1) if replicas > 1 else None
        return f"{said} {_prediction('trainer rank', 'rollout', step, gained, lost)}"
    gained, lost = waiting / (replicas + 1), training / (ranks - 1) if ranks > 1 else None
    return f"{said} {_prediction('rollout replica', 'training', step, gained, lost)}"


def _prediction(more: str, giver: str, step: float, gained: float, lost: float | None) -> str:
    """`gained`, `lost`: seconds of a step; `lost` is None if the giver has no GPU to spare."""
    said = f"One {more} more would make that about {step - gained:.3g} s"
    return f"{said}." if lost is None else f"{said}, on a GPU taken from {giver} {step - gained + lost:.3g} s."


def _seconds(lines: Sequence[Mapping[str, float]], parts: Sequence[str]) -> float:
    return median(sum(line.get(f"timing_s/{part}", 0.0) for part in parts) for line in lines)
