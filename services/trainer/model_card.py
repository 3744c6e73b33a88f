"""The model card of a run: what was trained on what and how, how it went, and how to repeat it. Written by rank 0."""

import hashlib
import math
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce
from importlib.metadata import version
from pathlib import Path

import torch

from retort.config import RedisConfig, RewardConfig, RunConfig, dump_config
from retort.questions import asked_in_both, questions_of
from services.trainer.export import ROOT, best_name, exported, hf_directory
from services.trainer.methods import method_of
from services.trainer.results import Results
from services.trainer.validation_curve import validation_svg

HYPERPARAMETERS = {
    "Base model": "model.path",
    "Training steps": "trainer.steps",
    "Train batch size": "trainer.groups_per_step",
    "Rollouts per prompt": "trainer.group_size",
    "PPO mini batch size": "trainer.groups_per_update",
    "Update order": "trainer.update_order",
    "Max staleness": "trainer.max_staleness",
    "Learning rate": "trainer.learning_rate",
    "LR warmup steps": "trainer.warmup_steps",
    "Weight decay": "trainer.weight_decay",
    "Grad clip": "trainer.max_grad_norm",
    "Clip low": "method.clip_low",
    "Clip high": "method.clip_high",
    "Dual clip": "method.dual_clip",
    "Rollout correction threshold": "method.max_rollout_ratio",
    "Max prompt length": "data.max_prompt_tokens",
    "Max response length": "sampling.max_completion_tokens",
    "Max model length": "model.max_length",
    "Train temperature": "sampling.temperature",
    "Train top_p": "sampling.top_p",
    "Validation generations": "validation.samples",
    "Validation temperature": "validation.temperature",
    "Validation top_p": "validation.top_p",
    "vLLM GPU memory utilization": "rollout.gpu_memory_utilization",
    "Save frequency (steps)": "checkpoint.every",
    "Validation frequency (steps)": "validation.every",
    "Weights and compute type": "model.dtype",
    "Trainer ranks": "trainer.ranks",
    "Rollout replicas": "rollout.replicas",
    "Seed": "seed",
}
"""A model card's name of a setting -> its key in the run file."""
TEACHER_HYPERPARAMETERS = {
    "Token reweight lambda": "method.reweight_lambda",
    "Token reweight eps_w": "method.reweight_clip",
    "Token reweight decay steps": "method.reweight_decay_steps",
    "Teacher update rate": "method.teacher_update_rate",
    "Max reprompt length": "method.max_teacher_prompt_tokens",
}
"""The same for methods with a teacher."""

CARD = """\
---
{front_matter}
---

# {name}

`{base}`, trained with Retort for {reached} of {steps} steps by the method `{method}`.

## Checkpoints

{checkpoints}

## Data

{data}

Data source: {sources}. {separation}

## Method

{parts}

{trained} The reward of a completion is what the checker `{checker}` gives it. Rollout correction:
token-level importance sampling, threshold {threshold:g}. Retort's docs/algorithm.md has the formulas.

## Hyperparameters

{hyperparameters}

## Metrics

{metrics}

best@{n} and maj@{n} are means over 1,000 draws of {n} completions *with* replacement. best@{n} is not pass@{n}: for a
question with c of {n} completions right it tends to 1 − (1 − c/{n})^{n}.

![Validation over training steps](validation.svg)

{curve}

## Loading

`DIRECTORY` is this directory, or the name of the repository that it was uploaded to.

{loading}

## How to reproduce

`run.toml` beside this card holds every setting. In a checkout of Retort {retort}, with that file copied there
(Python {python}, torch {torch}, transformers {transformers}):

```sh
{commands}
```

`trainer.deterministic` was {deterministic}; {repetition}.

## Intended use

Research on reinforcement learning and self-distillation. No safety evaluation has been made.

## Limitations

{limitations}
"""
NO_NEW_CHEMISTRY = """\
The periodic-table questions **teach no new chemistry**. Training and validation ask about the same 36 elements; only
  the combinations of options are new. A rising score shows that a model brings out what it knew before and reads the
  options. Retort's own tiny model, for which these questions were made, had been taught on purpose to guess; training
  removes that habit."""


class ModelCard:
    """Writes README.md, run.toml and validation.svg of `hf/` from what the run has left so far."""

    def __init__(self, config: RunConfig) -> None:
        """Reads the questions, of which the card says how many and which they are."""
        self._config = config
        self._directory = hf_directory(config)
        train, used = questions_of(config)
        both = asked_in_both(train, used)
        self._separation = (
            f"{both} of the {len(used)} validation questions are training questions too."
            if both
            else "No validation question is a training question."
        )
        self._sources = Counter(question.data_source for question in used)
        self._splits = [
            ["Training", f"`{config.data.train}`", str(len(train)), f"`{_digest(config.data.train)}`"],
            ["Validation", f"`{config.data.validation}`", str(len(used)), f"`{_digest(config.data.validation)}`"],
        ]

    def write(self) -> None:
        config = self._config
        results = Results(config.directory / "metrics.jsonl", self._sources, config.validation.samples)
        self._directory.mkdir(parents=True, exist_ok=True)
        _replace(self._directory / "validation.svg", validation_svg(results.curves, title=f"Validation, {config.name}"))
        _replace(self._directory / "run.toml", dump_config(_without_addresses(config)))
        _replace(self._directory / "README.md", self._text(results))

    def _text(self, results: Results) -> str:
        config = self._config
        deterministic = config.trainer.deterministic
        summary = [[name, _number(value), str(step)] for name, value, step in results.summary()]
        curve = [[str(s), *map(_number, values), _number(score)] for s, values, score in results.validations()]
        parts = method_of(config.method).parts._asdict().items()
        return CARD.format(
            front_matter=_front_matter(config),
            name=config.name,
            base=config.model.path,
            reached=results.last_step,
            steps=config.trainer.steps,
            method=config.method.name,
            checkpoints=self._checkpoints(results),
            data=_table(["Split", "File", "Questions", "sha256 of the file"], self._splits),
            sources=", ".join(f"`{source}`" for source in self._sources),
            separation=self._separation,
            parts=_table(["Part", "Value"], [[part, f"`{value}`"] for part, value in parts]),
            trained=_trained(config),
            checker=config.data.checker,
            threshold=config.method.max_rollout_ratio,
            hyperparameters=_hyperparameters(config),
            metrics=_table(["Metric", "Value", "Step"], summary),
            n=config.validation.samples,
            curve=_table(["Step", *results.names, "training score"], curve),
            loading=self._loading(),
            retort=version("retort"),
            python=platform.python_version(),
            torch=version("torch"),
            transformers=version("transformers"),
            commands=_commands(config),
            deterministic=str(deterministic).lower(),
            repetition="a repetition on the same machine agrees bit by bit"
            if deterministic
            else "a repetition agrees within sampling error, not bit by bit",
            limitations=self._limitations(results),
        )

    def _exports(self) -> list[tuple[str, str, int, float | None]]:
        """(subfolder, what it is, step, score) of everything in `hf/` that can be loaded."""
        steps = sorted(path.name for path in self._directory.glob("step-*"))
        best, n = best_name(self._config), self._config.validation.samples
        roles = {ROOT: "the last policy", best: f"highest validation avg@{n}"} | dict.fromkeys(steps, "")
        found = [(name, role, exported(self._directory / name)) for name, role in roles.items()]
        return [(name, role, one.step, one.score) for name, role, one in found if one]

    def _checkpoints(self, results: Results) -> str:
        rows, note = [], ""
        for name, role, step, score in self._exports():
            values = results.at(step)
            measured = values[0]
            if score is not None and (measured is None or not math.isclose(measured, score, abs_tol=1e-6)):
                values = [score, *([None] * (len(values) - 1))]
                note = (
                    "\n\nWhere only one value is given, the step was trained again after an interruption. The value is "
                    "that of these weights; the metrics below are those of the repetition."
                )
            rows.append(["Root" if name == ROOT else f"`{name}/`", role, str(step), *map(_number, values)])
        return _table(["Checkpoint", "What", "Source step", *results.names], rows) + note

    def _loading(self) -> str:
        """A snippet each for root, best and the newest single step; with an import, so that each can be run alone."""
        exports = self._exports()
        singles = [one for one in exports if one[0].startswith("step-")]
        blocks = []
        for name, role, step, _ in [one for one in exports if one not in singles[:-1]]:
            where = '"DIRECTORY"' if name == ROOT else f'"DIRECTORY", subfolder="{name}"'
            blocks.append(
                f"Step {step}{role and ', '}{role}:\n\n```python\n"
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f"model = AutoModelForCausalLM.from_pretrained({where})\n"
                f"tokenizer = AutoTokenizer.from_pretrained({where})\n```"
            )
        return "\n\n".join(blocks)

    def _limitations(self, results: Results) -> str:
        config, count = self._config, self._sources.total()
        points = [
            "The scores are training-time and validation-time metrics of one run with one seed. They are no benchmark "
            "results.",
            f"`{best_name(config)}/` was chosen by the validation questions themselves: its score there flatters it.",
            "Prompts were made with the tokenizer's chat template and `enable_thinking=False`. Other prompts and "
            "formats were not tried.",
        ]
        if curve := results.curves.get(results.names[0]):
            error = math.sqrt(curve[-1][1] * (1 - curve[-1][1]) / count)
            points.append(
                f"With {count} validation questions the standard error of the final {results.names[0]} is up to "
                f"{error:.3f}. Smaller differences between checkpoints say nothing."
            )
        if "periodic_table" in self._sources:
            points.append(NO_NEW_CHEMISTRY)
        return "\n".join(f"- {point}" for point in points)


def _front_matter(config: RunConfig) -> str:
    fields = ["library_name: transformers", "pipeline_tag: text-generation"]
    base = Path(config.model.path)
    if not base.is_dir():
        fields.append(f"base_model: {config.model.path}")
    elif (base / "README.md").is_file():
        # The licence is what the base model says of itself, and left out where it says nothing.
        front = re.match(r"---\n(.*?)\n---\n", (base / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        fields += re.findall(r"^license(?:_name|_link)?: .+$", front[1], re.MULTILINE) if front else []
    return "\n".join([*fields, f"tags: [reinforcement-learning, {config.method.name}]"])


def _trained(config: RunConfig) -> str:
    lora = config.lora
    if not lora.rank:
        return "All parameters are trained."
    return (
        f"Adapters of rank {lora.rank} (LoRA, alpha {lora.alpha:g}) are trained, on "
        f"{', '.join(lora.targets) or 'every linear layer of the blocks'}; here they are merged into the base, and "
        f"`adapter/` holds them alone."
    )


def _hyperparameters(config: RunConfig) -> str:
    has_teacher = method_of(config.method).parts.context != "none"
    keys = HYPERPARAMETERS | (TEACHER_HYPERPARAMETERS if has_teacher else {})
    rows = [[name, str(reduce(getattr, key.split("."), config)), f"`{key}`"] for name, key in keys.items()]
    generations = config.trainer.groups_per_step * config.trainer.group_size
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows += [["Generations per step", str(generations), ""], ["Device of a trainer rank", device, ""]]
    return _table(["Field", "Value", "Key in run.toml"], rows)


def _commands(config: RunConfig) -> str:
    commands = ["make setup"]
    match Path(config.data.train).parts:
        case (*_, "sciknoweval", domain, _):
            commands.append(f".venv/bin/retort prepare sciknoweval --domain {domain}")
    commands += [
        f"sha256sum {config.data.train} {config.data.validation}",
        f".venv/bin/retort run run.toml --run-dir runs/{config.name}-again --set seed={config.seed}",
    ]
    return "\n".join(commands)


def _without_addresses(config: RunConfig) -> RunConfig:
    """The run file to publish: addresses mean nothing elsewhere, and may hold a password."""
    changes = {
        "run_id": "",
        "run_dir": "",
        "redis": RedisConfig(),
        "reward": RewardConfig(deadline_s=config.reward.deadline_s),
        "rollout": config.rollout.model_copy(update={"host": "127.0.0.1", "port": 0}),
        "weight_sync": config.weight_sync.model_copy(update={"host": "127.0.0.1"}),
    }
    return config.model_copy(update=changes)


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
