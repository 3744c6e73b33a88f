import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.config import RunConfig, load_config
from services.trainer.export import Exported, write_model
from services.trainer.model_card import HYPERPARAMETERS, TEACHER_HYPERPARAMETERS, ModelCard
from tests.training import a_config

ROOT = Path(__file__).parents[3]
TINY = ROOT / "models" / "tiny"
CARD_OF_THE_PUBLISHED_RUN = {
    "Base model": "Qwen/Qwen3-4B",
    "Training steps": "100",
    "Train batch size": "256",
    "Rollouts per prompt": "8",
    "Generations per step": "2048",
    "PPO mini batch size": "8",
    "Learning rate": "1e-06",
    "LR warmup steps": "10",
    "Weight decay": "0.01",
    "Grad clip": "1.0",
    "Max prompt length": "2048",
    "Max response length": "8192",
    "Max model length": "10240",
    "Train temperature": "1.0",
    "Train top_p": "1.0",
    "Validation generations": "16",
    "Validation temperature": "0.6",
    "Validation top_p": "0.95",
    "vLLM GPU memory utilization": "0.8",
    "Save frequency (steps)": "10",
    "Validation frequency (steps)": "10",
    "Token reweight lambda": "0.5",
    "Token reweight eps_w": "0.2",
    "Token reweight decay steps": "0",
    "Teacher update rate": "0.05",
    "Max reprompt length": "10240",
    "Rollout correction threshold": "2.0",
}


def questions(path: Path, count: int, source: str) -> str:
    row = {"messages": [{"role": "user", "content": "Au?"}], "answer": "A", "data_source": source}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((json.dumps(row) + "\n") * count)
    return str(path)


def a_run(directory: Path, *, source: str = "toy", **sections: Any) -> RunConfig:
    """Sixteen validation questions, four samples each, three steps."""
    return a_config(
        directory,
        **{
            "model": {"path": str(TINY)},
            "data": {
                "train": questions(directory / "train.jsonl", 5, source),
                "validation": questions(directory / "validation.jsonl", 20, source),
            },
            "validation": {"samples": 4, "max_questions": 16},
            "method": {},
            **sections,
        },
    )


def measured(config: RunConfig, scores: dict[int, float], source: str = "toy") -> None:
    avg, best, maj = (f"val-core/{source}/acc/{name}" for name in ("mean@4", "best@4/mean", "maj@4/mean"))
    lines = [
        {"step": step, "critic/score/mean": score / 2, avg: score, best: score + 0.125, maj: score - 0.125}
        for step, score in scores.items()
    ]
    (config.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_model(config: RunConfig, place: str, step: int, score: float | None, factor: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    tensors = {name: (tensor * factor).detach() for name, tensor in model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    write_model(config.directory / "hf" / place, tensors, config, tokenizer, Exported(step, score))


def card_of(config: RunConfig) -> str:
    ModelCard(config).write()
    return (config.directory / "hf" / "README.md").read_text()


def section(card: str, title: str) -> str:
    return card.partition(f"## {title}\n")[2].partition("\n## ")[0]


def cells(card: str, title: str) -> list[list[str]]:
    """The rows of a section's tables."""
    rows = [line for line in section(card, title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_snippets_of_the_card_load_what_they_say(tmp_path: Path) -> None:
    config = a_run(tmp_path)
    places = {
        ".": (3, None, 3.0),
        "best_avg4": (2, 0.75, 2.0),
        "step-000001": (1, None, 9.0),
        "step-000002": (2, 0.75, 2.0),
    }
    for place, (step, score, factor) in places.items():
        a_model(config, place, step, score, factor)
    snippets = re.findall(r"```python\n(.*?)```", section(card_of(config), "Loading"), re.DOTALL)
    untrained = AutoModelForCausalLM.from_pretrained(TINY).get_input_embeddings().weight
    loaded = []
    for snippet in snippets:
        names: dict[str, Any] = {}
        exec(snippet.replace("DIRECTORY", str(tmp_path / "hf")), names)
        assert len(names["tokenizer"]) == 614
        weight = names["model"].get_input_embeddings().weight
        loaded.append(next(factor for factor in (2.0, 3.0, 9.0) if torch.equal(weight, untrained * factor)))
    assert loaded == [3.0, 2.0, 2.0]
    assert [re.findall(r'subfolder="(.*?)"', snippet) for snippet in snippets] == [
        [],
        ["best_avg4"] * 2,
        ["step-000002"] * 2,
    ]


def test_the_hyperparameters_of_the_published_run_are_those_of_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = load_config(ROOT / "configs" / "qwen3-4b-sciknoweval.toml", [f"run_dir={tmp_path}"], env={})
    monkeypatch.chdir(tmp_path)
    questions(Path(published.data.train), 256, "sciknoweval")
    questions(Path(published.data.validation), 2, "sciknoweval")
    card = card_of(published)
    values = {name: value for name, value, _ in cells(card, "Hyperparameters")}
    assert values | CARD_OF_THE_PUBLISHED_RUN == values
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\nbase_model: Qwen/Qwen3-4B\n"
    )
    assert ".venv/bin/retort prepare sciknoweval --domain chemistry\n" in section(card, "How to reproduce")
    assert "best_avg16" in card
    assert "no new chemistry" not in card


def test_a_method_without_teacher_has_no_settings_of_one(tmp_path: Path) -> None:
    names = {row[0] for row in cells(card_of(a_run(tmp_path, method={"name": "grpo"})), "Hyperparameters")}
    assert names & TEACHER_HYPERPARAMETERS.keys() == set()
    assert HYPERPARAMETERS.keys() - names == set()


def test_metrics_stand_in_the_card_with_their_steps(tmp_path: Path) -> None:
    config = a_run(tmp_path)
    measured(config, {0: 0.25, 2: 0.75, 3: 0.5})
    a_model(config, ".", 3, None, 1.0)
    a_model(config, "best_avg4", 2, 0.75, 1.0)
    card = card_of(config)
    rows = cells(card, "Metrics")
    assert ["Final validation avg@4", "0.500000", "3"] in rows
    assert ["Peak validation avg@4", "0.750000", "2"] in rows
    assert ["Peak validation best@4", "0.875000", "2"] in rows
    assert ["Final validation maj@4", "0.375000", "3"] in rows
    assert ["Final critic/score/mean", "0.250000", "3"] in rows
    assert ["2", "0.750000", "0.875000", "0.625000", "0.375000"] in rows
    assert cells(card, "Checkpoints")[2:] == [
        ["Root", "the last policy", "3", "0.500000", "0.625000", "0.375000"],
        ["`best_avg4/`", "highest validation avg@4", "2", "0.750000", "0.875000", "0.625000"],
    ]
    # sqrt(0.5 x 0.5 / 16)
    assert "up to 0.125" in section(card, "Limitations")
    assert "trained with Retort for 3 of 3 steps" in card
    assert "![Validation over training steps](validation.svg)" in card
    assert (tmp_path / "hf" / "validation.svg").read_text().startswith("<svg")


def test_a_best_from_before_an_interruption_shows_its_own_score(tmp_path: Path) -> None:
    config = a_run(tmp_path)
    measured(config, {0: 0.25, 2: 0.5})
    a_model(config, "best_avg4", 2, 0.75, 1.0)
    shown = section(card_of(config), "Checkpoints")
    assert "| `best_avg4/` | highest validation avg@4 | 2 | 0.750000 | – | – |" in shown
    assert "trained again after an interruption" in shown


def test_the_run_file_beside_the_card_makes_the_same_run_and_names_no_address(tmp_path: Path) -> None:
    config = a_run(tmp_path, redis={"url": "redis://:secret@10.0.0.1"}, reward={"address": "10.0.0.2:1"})
    card = card_of(config)
    text = (tmp_path / "hf" / "run.toml").read_text()
    again = load_config(tmp_path / "hf" / "run.toml", env={})
    assert (again.trainer, again.method, again.data, again.seed) == (config.trainer, config.method, config.data, 0)
    assert not [word for word in ("secret", "10.0.0") if word in text + card]
    assert again.run_dir == ""
    assert ".venv/bin/retort run run.toml --run-dir runs/test-again --set seed=0" in card


def test_questions_are_counted_and_named_by_digest(tmp_path: Path) -> None:
    rows = cells(card_of(a_run(tmp_path)), "Data")
    assert [row[2] for row in rows[2:]] == ["5", "16"]
    assert all(re.fullmatch("`[0-9a-f]{64}`", row[3]) for row in rows[2:])


def test_a_card_says_whether_validation_asks_what_was_trained_on(tmp_path: Path) -> None:
    config = a_run(tmp_path)
    assert "16 of the 16 validation questions are training questions too." in section(card_of(config), "Data")
    other = Path(config.data.validation)
    other.write_text(other.read_text().replace("Au?", "Ag?"))
    assert "No validation question is a training question." in section(card_of(config), "Data")


def test_the_periodic_table_teaches_no_new_chemistry(tmp_path: Path) -> None:
    card = card_of(a_run(tmp_path, source="periodic_table"))
    assert "**teach no new chemistry**" in section(card, "Limitations")


def test_a_licence_is_the_base_models_or_left_out(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = a_run(tmp_path, model={"path": str(base)})
    assert "license" not in card_of(config)
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n\nlicense: of something else\n")
    front = card_of(config).split("---\n")[1]
    assert re.findall("license.*", front) == ["license: apache-2.0"]


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({}, "All parameters are trained."),
        (
            {"rank": 8, "alpha": 16.0},
            "Adapters of rank 8 (LoRA, alpha 16) are trained, on every linear layer of the blocks;",
        ),
        ({"rank": 8, "targets": ["q_proj", "v_proj"]}, "are trained, on q_proj, v_proj; here they are merged"),
    ],
)
def test_the_card_says_what_was_trained(tmp_path: Path, lora: dict[str, Any], said: str) -> None:
    config = a_run(tmp_path, lora=lora)
    measured(config, {0: 0.25})
    a_model(config, ".", 3, None, 1.0)
    assert said in section(card_of(config), "Method").replace("\n", " ")
