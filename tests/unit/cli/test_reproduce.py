"""How a run is judged by what was published. The runs are synthetic; their files are those of real ones."""

from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.cli.published import read_published
from retort.cli.reproduce import check_settings, judge
from retort.config import ConfigError, RunConfig, dump_config, load_config
from tests.finished_run import AVG, a_config, write_published, write_run

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def pinned(tmp_path: Path) -> RunConfig:
    config = a_config(tmp_path / "run")
    (tmp_path / "letters.toml").write_text(dump_config(config))
    write_published(tmp_path / "card.toml")
    return config


def reproduce(folder: Path) -> int:
    return main(["reproduce", "letters", f"--config={folder}/letters.toml", f"--card={folder}/card.toml"])


def test_a_final_value_inside_its_band_is_a_reproduction(
    pinned: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", pinned, [0.5, 0.6, 0.7, 0.82, 0.78])
    assert reproduce(tmp_path) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == [AVG, "final", "0.7900", "@4", "0.7800", "@4", "-0.0100", "0.74", "to", "0.84", "inside"]
    assert lines[2] == ["peak", "0.8000", "@3", "0.8200", "@3", "+0.0200"]
    assert lines[-1][0] == "Reproduced:"


@pytest.mark.parametrize("final", [0.73, 0.85])
def test_a_final_value_outside_its_band_is_none(
    final: float, pinned: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", pinned, [0.5, 0.6, 0.7, 0.79, final])
    assert reproduce(tmp_path) == 1
    output = capsys.readouterr().out
    assert "OUTSIDE" in output
    assert output.endswith("Not reproduced: a final value lies outside its band.\n")


def test_both_ends_belong_to_the_band(pinned: RunConfig, tmp_path: Path) -> None:
    published = read_published(tmp_path / "card.toml")
    for name, final in (("low", 0.74), ("high", 0.84)):
        assert judge(write_run(tmp_path / name, pinned, [0.5, 0.6, 0.7, 0.8, final]), published).reproduced


def test_a_run_that_ended_early_is_none_however_good(
    pinned: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", pinned, [0.5, 0.6, 0.79])
    assert reproduce(tmp_path) == 1
    assert capsys.readouterr().out.endswith("Not reproduced: the run has 2 of 4 steps.\n")


def test_a_validation_before_the_last_step_is_not_the_final_one(pinned: RunConfig, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", pinned, [0.5, 0.6, 0.7, 0.79])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "critic/score/mean": 0.9}\n')
    assert not judge(run, read_published(tmp_path / "card.toml")).reproduced


def test_a_run_with_other_settings_is_not_judged(
    pinned: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", a_config(tmp_path / "run", learning_rate=1e-5), [0.5, 0.6, 0.7, 0.8, 0.79])
    assert reproduce(tmp_path) == 2
    assert "trainer.learning_rate = 1e-05 instead of 1e-06" in capsys.readouterr().err


def test_other_settings_from_the_environment_are_refused_before_anything_starts(
    pinned: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_TRAINER__GROUP_SIZE", "4")
    assert reproduce(tmp_path) == 2
    assert "trainer.group_size = 4 instead of 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_where_a_run_is_deployed_does_not_matter() -> None:
    file = CONFIGS / "qwen3-4b-sciknoweval.toml"
    elsewhere = load_config(file, ["trainer.ranks=12", "rollout.replicas=4", "redis.url=redis://r", "seed=7"], env={})
    check_settings(elsewhere, load_config(file, env={}))


def test_a_key_of_the_method_does_matter() -> None:
    file = CONFIGS / "qwen3-4b-sciknoweval.toml"
    with pytest.raises(ConfigError, match=r"method.reweight_lambda = 0.0 instead of 0.5"):
        check_settings(load_config(file, ["method.reweight_lambda=0.0"], env={}), load_config(file, env={}))


def test_without_a_finished_run_the_pinned_one_is_started(
    pinned: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The model of this run file does not exist, and `retort run` is the one to say so.
    assert reproduce(tmp_path) == 2
    assert "model.path = no-such-model: no such directory" in capsys.readouterr().err


def test_the_wrong_questions_are_refused_before_anything_starts(
    pinned: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.toml"
    card.write_text('sciknoweval_domain = "chemistry"\n' + card.read_text())
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "Which letter?", "answer": "B"}\n')
    data = {"train": str(questions), "validation": str(questions)}
    config = pinned.model_copy(update={"data": pinned.data.model_copy(update=data)})
    (tmp_path / "letters.toml").write_text(dump_config(config))
    assert reproduce(tmp_path) == 2
    assert "Make them with `retort prepare sciknoweval --domain chemistry`" in capsys.readouterr().err


def test_a_published_run_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "no-such-run"]) == 2
    assert "reference/no-such-run.toml: cannot read the published run" in capsys.readouterr().err
