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


def last_lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out.rpartition("\n\n")[2].splitlines()


def test_the_plan_ends_with_what_is_needed_and_a_quicker_split(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("trainer.ranks=1", "rollout.replicas=7", "data.train=no-such.jsonl")
    lines = last_lines(capsys, REFERENCE, *(word for setting in settings for word in ("--set", setting)))
    assert lines[0] == "GPUs: 8 (1 train, 7 sample); it fits"
    assert lines[1].startswith("time: ") and " hours for 100 steps" in lines[1]
    assert lines[2].startswith("quicker: rollout.replicas=") and "less time" in lines[2]
    assert any(line.startswith("missing: data.train = ") for line in lines)


def test_a_memory_that_is_too_small_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "it does NOT fit: a trainer rank needs " in last_lines(capsys, REFERENCE, "--gpu-gib", "20")[0]


def test_a_run_without_a_gpu_hears_nothing_about_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["plan", "configs/tiny-cpu.toml"]) == 0
    out = capsys.readouterr().out
    assert "no GPU: the CPU and " in out and "missing" not in out
    assert "GPUs" not in out and "140 GiB" not in out and "a step  " not in out
