"""`retort timeline`: a run of one step and one group, whose times can be followed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from retort.cli.__main__ import main
from tests.finished_run import a_config, write_run


def write_line(file: Path, line: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The group is sampled from second 100 to 102 and scored until 102.5; the update takes from 103 to 104."""
    directory = write_run(tmp_path / "run", a_config(tmp_path / "run"), [0.5, 0.5])
    write_line(directory / "timeline.jsonl", {"part": "update", "step": 1, "end": 104.0, "seconds": 1.0})
    sample = {"policy_versions": [0, 0], "finish_reason": "stop", "reward": 1.0, "parsed": "B"}
    asked = {"data_index": 7, "data_source": "letters", "question": "Which letter?", "answer": "B"}
    took = {"sampled_by": "rollout-1", "generate_seconds": 2.0, "score_seconds": 0.5, "began": 100.0}
    group = {"group_id": "0-000007", "step": 1, "rollouts": [sample]} | asked | took
    write_line(directory / "rollouts/step-000001.jsonl", group)
    return directory


def events_of(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["traceEvents"]


def test_every_service_has_its_track_and_times_start_at_the_first_event(run: Path) -> None:
    assert main(["timeline", str(run)]) == 0
    events = events_of(run / "timeline.json")
    tracks = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert tracks == {1: "trainer", 2: "reward", 3: "rollout-1"}
    times = [(event["ph"], tracks[event["pid"]], event["name"], event["ts"]) for event in events if event["ph"] != "M"]
    assert times == [
        ("b", "rollout-1", "0-000007", 0),
        ("e", "rollout-1", "0-000007", 2_000_000),
        ("b", "reward", "0-000007", 2_000_000),
        ("e", "reward", "0-000007", 2_500_000),
        ("X", "trainer", "update", 3_000_000),
    ]
    assert next(event["dur"] for event in events if event["ph"] == "X") == 1_000_000


def test_one_step_alone_goes_to_a_file_of_ones_own(run: Path, tmp_path: Path) -> None:
    write_line(run / "timeline.jsonl", {"part": "teacher", "step": 2, "end": 106.0, "seconds": 1.0})
    assert main(["timeline", str(run), "--step", "2", "--output", str(tmp_path / "two.json")]) == 0
    assert [event["name"] for event in events_of(tmp_path / "two.json")[2:]] == ["teacher"]


def test_a_step_without_events_is_an_error_and_writes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(run), "--step", "9"]) == 2
    assert "has nothing of step 9" in capsys.readouterr().err
    assert not (run / "timeline.json").exists()
