"""`retort trace`: a run of two steps, small enough to follow every sample by eye."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from retort.cli.__main__ import main
from tests.finished_run import a_config, write_run


def a_sample(versions: list[int], reward: float, **learned: Any) -> dict[str, Any]:
    known = {"policy_versions": versions, "finish_reason": "stop", "reward": reward, "parsed": "B" if reward else "C"}
    return known | learned


def a_group(group_id: str, step: int, *samples: dict[str, Any]) -> dict[str, Any]:
    asked = {"data_index": int(group_id[-6:]), "data_source": "letters", "question": "Which\nletter?", "answer": "B"}
    took = {"sampled_by": "rollout-1", "generate_seconds": 0.5, "score_seconds": 0.25}
    return {"group_id": group_id, "step": step, "rollouts": samples} | asked | took


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """In step 2 group 7 is right in update 2 and wrong in update 1; all rewards of group 3 are equal."""
    directory = write_run(tmp_path / "run", a_config(tmp_path / "run"), [0.5, 0.5, 0.75])
    mixed = a_group(
        "0-000007",
        2,
        a_sample([0, 0, 1], 1.0, advantage=0.5, update=2, has_gradient=True),
        a_sample([1], 0.0, advantage=-0.5, update=1, has_gradient=True),
    )
    equal = [a_sample([1], 1.0, advantage=0.0, update=update, has_gradient=False) for update in (1, 2)]
    write_lines(directory / "rollouts/step-000001.jsonl", [a_group("0-000001", 1)])
    write_lines(directory / "rollouts/step-000002.jsonl", [mixed, a_group("0-000003", 2, *equal)])
    write_lines(directory / "validation/step-000002.jsonl", [a_group("v2-000000", 2, a_sample([2], 1.0))])
    times = [
        ("update", 2, 5.0, 1.5),
        ("update", 2, 7.0, 1.0),
        ("weight_sync", 2, 8.0, 0.5),
        ("weight_sync", 1, 3.0, 1.0),
    ]
    spans = [{"part": part, "step": step, "end": end, "seconds": seconds} for part, step, end, seconds in times]
    write_lines(directory / "timeline.jsonl", spans)
    return directory


def traced(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["trace", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_group_says_in_which_update_each_of_its_samples_counted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = hashlib.blake2b(b"letters/0-000007", digest_size=16).hexdigest()
    assert traced(capsys, "0-000007", run).splitlines() == [
        f"group     0-000007, trace {trace}",
        "question  7 of letters: Which letter?",
        "answer    B",
        "sampled   by rollout-1 in 0.5 s, scored in 0.25 s",
        "trained   in step 2, published as policy version 2 at 1970-01-01 00:00:08 UTC",
        "",
        "sample  versions  tokens  end   reward  parsed  advantage  update  gradient",
        "0       0,1       3       stop  1       B       0.5        2       yes",
        "1       1         1       stop  0       C       -0.5       1       yes",
    ]


def test_a_step_says_which_samples_made_each_of_its_updates(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = traced(capsys, "--step", "2", run).splitlines()
    assert [line.split()[:6] for line in lines[-5:]] == [
        ["update", "group", "replica", "versions", "samples", "gradient"],
        ["1", "0-000007", "rollout-1", "1", "1", "1"],
        ["1", "0-000003", "rollout-1", "1", "0", "-"],
        ["2", "0-000007", "rollout-1", "0,1", "0", "0"],
        ["2", "0-000003", "rollout-1", "1", "1", "-"],
    ]


def test_json_holds_the_same_with_the_times_of_the_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = json.loads(traced(capsys, "--step", "2", run, "--json"))
    assert (step["published_version"], step["published"]) == (2, 8.0)
    assert step["seconds"] == {"update": 2.5, "weight_sync": 0.5}
    assert step["groups"][0] == json.loads(traced(capsys, "0-000007", run, "--json")) | {"group_id": "0-000007"}
    assert step["groups"][0]["samples"][0]["policy_versions"] == {"0": 2, "1": 1}


def test_a_validation_group_measured_a_version_and_made_no_update(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = traced(capsys, "v2-000000", run).splitlines()
    assert "measured  policy version 2" in lines
    assert lines[-1].split() == ["0", "2", "1", "stop", "1", "B", "-", "-", "-"]


def test_a_step_whose_line_is_not_written_yet_published_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    assert "trained   in step 2, of which no version was published yet" in traced(capsys, "0-000007", run)


def test_an_unknown_group_or_step_ends_with_code_2_and_what_there_is(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, hint in (
        (["0-00007"], "Did you mean 0-000007?"),
        (["--step", "9"], "It has the groups of steps 1 to 2."),
        (["--step", "2", "a", "b"], "name a group or a step"),
    ):
        assert main(["trace", *words, str(run)]) == 2
        assert hint in capsys.readouterr().err


def test_the_trace_of_a_group_is_another_in_another_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(traced(capsys, "0-000007", run, "--json"))["trace_id"]
    config = run / "config.toml"
    config.write_text(config.read_text().replace('name = "letters"', 'name = "words"'))
    after = json.loads(traced(capsys, "0-000007", run, "--json"))["trace_id"]
    assert len(before) == len(after) == 32
    assert before != after
