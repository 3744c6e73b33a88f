import json
from pathlib import Path

import pytest

from retort.cli.__main__ import main

CONFIGS = Path(__file__).parents[3] / "configs"
REFERENCE = str(CONFIGS / "qwen3-4b-sciknoweval.toml")


def test_the_plan_of_the_published_run_says_64_and_32_and_3200(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", REFERENCE]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "completions per update 64 groups per update x group size, on any ranks" in lines
    assert "updates per step 32 groups per step / groups per update" in lines
    assert "updates in the run 3,200 updates per step x steps" in lines
    assert "sent per weight sync 7.5 GiB parameters in the served type, one broadcast" in lines


def test_json_holds_every_number_with_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", REFERENCE, "--json", "--completion-tokens", "500"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["assumptions"]["completion_tokens"] == 500
    assert all(figure["formula"] for figure in plan["figures"])
    assert {f["name"]: f["value"] for f in plan["figures"]}["parameters"] == 4_022_468_096


def test_an_overridden_key_changes_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", REFERENCE, "--set", "trainer.steps=10", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {f["name"]: f["value"] for f in plan["figures"]}["updates in the run"] == 320


def test_a_mean_length_is_never_above_the_longest_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)  # model.path of the demo is relative
    assert main(["plan", "configs/tiny-cpu.toml", "--json", "--set", "sampling.max_completion_tokens=40"]) == 0
    assert json.loads(capsys.readouterr().out)["assumptions"]["completion_tokens"] == 40


def test_an_assumption_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", REFERENCE, "--tflops", "0"]) == 2
    assert "--tflops 0: expected a number above 0." in capsys.readouterr().err
