"""Which metrics become which chart, with what each means and what would be bad."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from retort.cli.report.charts import Points, Series, bar_chart, line_chart, number, running_mean
from retort.cli.report.run_files import Run

REWARD_WINDOW = 5
"""One step's reward is the mean of few questions; the eye needs a mean over several steps."""

TIMINGS = {
    "wait_groups": "waiting for groups",
    "old_logprobs": "old logprobs",
    "teacher": "teacher",
    "update": "updates",
    "weight_sync": "weight sync",
    "checkpoint": "checkpoint",
    "validation": "validation",
    "wait_replica": "waiting for a replica",
}


@dataclass(frozen=True)
class Curve:
    """A chart of metrics that need no treatment."""

    title: str
    metrics: Sequence[tuple[str, str]]
    """(metric, label)."""
    meaning: str
    zero: bool = True


CURVES = (
    Curve(
        "Completion length",
        [
            ("response_length/mean", "mean"),
            ("response_length/max", "longest"),
            ("response_length/min", "shortest"),
        ],
        "Tokens per completion. Bad: the mean runs into the longest allowed length, or collapses to almost nothing.",
    ),
    Curve(
        "Entropy",
        [("actor/entropy", "entropy")],
        "How undecided the policy is, in nats per token. It falls as the policy makes up its mind. "
        "Bad: near zero while the reward is still low, because then nothing new is tried.",
    ),
    Curve(
        "Engine against trainer",
        [
            ("training/rollout_probs_diff_mean", "mean |Δ probability|"),
            ("rollout_corr/kl", "mean logprob difference (KL)"),
        ],
        "The engine that samples and the trainer that learns compute the same probabilities twice. Zero is "
        "agreement. Bad: a jump or a steady rise; look at the weight sync first.",
    ),
    Curve(
        "Staleness",
        [("staleness/max", "oldest in the step")],
        "How many versions the policy that sampled is behind the one that learns. Bad: above trainer.max_staleness.",
    ),
    Curve(
        "Token weights: level",
        [("self_distillation/token_reweight_w_clipped_mean", "mean w, clipped")],
        "What the teacher says about single tokens, in its band and before it is mixed with 1. A level near 1 shifts "
        "credit without changing its sum. Bad: a mean far from 1. Before clipping single tokens decide the mean, so "
        "that one is in metrics.jsonl only.",
        zero=False,
    ),
    Curve(
        "Token weights: clipped",
        [("self_distillation/token_reweight_w_clip_frac", "share clipped")],
        "How often the teacher is surer of a token than the band allows. It shrinks as the policy becomes certain. "
        "Bad: most tokens clipped, because then their order of importance is lost.",
    ),
    Curve(
        "Demonstrations",
        [
            ("self_distillation/success_group_fraction", "groups with a right completion"),
            ("self_distillation/reprompt_sample_fraction", "completions with a demonstration"),
        ],
        "A teacher can only speak where a sibling was right. Bad: near zero, because then the run is plain GRPO.",
    ),
    Curve(
        "Gradient norm",
        [("actor/grad_norm", "norm before clipping")],
        "Size of an update before it is clipped. It falls when most groups are all right. Bad: growing spikes.",
    ),
    Curve(
        "Throughput",
        [("perf/throughput", "trained tokens per second")],
        "Tokens that were trained on, per second of the whole step. Bad: a lasting drop; the next chart says where.",
    ),
)


def curves(run: Run) -> str:
    """Every chart for which the run logged something."""
    figures = [
        _reward(run),
        *(_validation(run, *item) for item in run.validated.items()),
        *_plain(run),
        _step_time(run),
    ]
    if not any(figures):
        return '<p class="empty">No step has been logged yet. Curves appear with the first one.</p>'
    return f'<div class="figures">{"".join(figures)}</div>'


def _reward(run: Run) -> str:
    points = run.points("critic/score/mean")
    if not points:
        return ""
    each = Series("each step", points, 1, "faint")
    mean = Series(f"mean of {REWARD_WINDOW} steps", running_mean(points, REWARD_WINDOW), 1)
    unit = all(0 <= value <= 1 for _, value in points)
    return _figure(
        "Training reward",
        line_chart([each, mean], unit=unit),
        [mean, each],
        "Mean reward of the completions that a step trained on. Single steps are noisy; the trend counts. "
        "Bad: flat (nothing to learn from), or a fall that stays (learning rate too high).",
    )


def _validation(run: Run, data_source: str, samples: int) -> str:
    prefix = f"val-core/{data_source}/acc"
    names = [
        (f"best@{samples}/mean", f"best@{samples}"),
        (f"maj@{samples}/mean", f"maj@{samples}"),
        (f"mean@{samples}", f"avg@{samples}"),
    ]
    series = [
        Series(label, points, colour, "dots")
        for colour, (name, label) in zip((2, 3, 1), names, strict=True)
        if (points := run.points(f"{prefix}/{name}"))
    ]
    mark = (0.25, "guessing") if data_source == "periodic_table" else None
    return _figure(
        f"Validation on {data_source}",
        line_chart(series, unit=True, mark=mark),
        series[::-1],
        f"The validation questions, {samples} completions each: avg is the share that is right, maj whether "
        "the most frequent answer is right, best whether any is. Bad: avg falls while the training reward rises.",
    )


def _plain(run: Run) -> list[str]:
    figures = []
    for curve in CURVES:
        series = [
            Series(label, points, colour)
            for colour, (metric, label) in enumerate(curve.metrics, start=1)
            if (points := run.points(metric))
        ]
        if series:
            figures.append(_figure(curve.title, line_chart(series, zero=curve.zero), series, curve.meaning))
    return figures


def _step_time(run: Run) -> str:
    """All the time as one bar; then step by step, without start and validation, which would dwarf the steps."""
    parts: dict[str, Points] = {label: run.points(f"timing_s/{name}") for name, label in TIMINGS.items()}
    parts["other"] = _rest(run.points("timing_s/step"), parts.values())
    seconds_of = {label: sum(seconds for _, seconds in points) for label, points in parts.items() if points}
    trained = {label: [point for point in points if point[0] > 0] for label, points in parts.items()}
    steps = {label: points for label, points in trained.items() if points and label != "validation"}
    together = sum(seconds_of.values())
    if not steps or not together:
        return ""
    colours = {label: colour for colour, label in enumerate(parts, start=1)}
    shares = "".join(
        f'<i class="s{colours[label]}" style="flex:{seconds / together:.4f}"></i>'
        for label, seconds in seconds_of.items()
    )
    return _box(
        "Where the time goes",
        f"seconds per step, of {number(together)} s in all",
        f'<div class="shares" aria-hidden="true">{shares}</div>{bar_chart(steps, colours)}',
        [(label, colours[label], f"{100 * seconds / together:.0f} %") for label, seconds in seconds_of.items()],
        "Above all the time since the trainer was ready, below each step without validation. "
        "Waiting for groups is the rollout services’ share. "
        "Bad: a part that grows step by step, or waiting that dwarfs the updates (add rollout services).",
        wide=True,
    )


def _rest(whole: Points, parts: Iterable[Points]) -> Points:
    """What is left of each step's time when its parts are taken away."""
    known: defaultdict[float, float] = defaultdict(float)
    for points in parts:
        for step, seconds in points:
            known[step] += seconds
    return [(step, max(0.0, seconds - known[step])) for step, seconds in whole]


def _figure(title: str, chart: str, series: Sequence[Series], meaning: str) -> str:
    legend = [(s.label, s.colour, number(s.points[-1][1])) for s in series if s.look != "faint"]
    change = " → ".join(number(value) for _, value in [series[0].points[0], *series[0].points[1:][-1:]])
    return _box(title, change, chart, legend, meaning)


def _box(
    title: str, note: str, chart: str, legend: Sequence[tuple[str, int, str]], meaning: str, *, wide: bool = False
) -> str:
    """`legend`: (label, colour, value)."""
    items = "".join(
        f'<li><i class="key s{colour}"></i>{escape(label)} <b>{value}</b></li>' for label, colour, value in legend
    )
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption><h3>{escape(title)}</h3>"
        f"<span>{escape(note)}</span></figcaption>{chart}"
        f'<ul class="legend">{items}</ul><p class="meaning">{escape(meaning)}</p></figure>'
    )
