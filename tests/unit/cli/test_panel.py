import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from retort.cli.panel import Screen, View, clock, is_shown, panel, step_line, validation_line
from retort.metrics_file import MetricsFile, accuracy

STEP = {
    "step": 12,
    "time": 1000.0,
    "policy_version": 12,
    "critic/score/mean": 0.7125,
    "perf/throughput": 5210.4,
    "timing_s/weight_sync": 0.045,
    "timing_s/wait_groups": 1.5,
    "timing_s/step": 3.25,
}
VIEW = View(
    run="tiny", steps=40, step=12, phase="train", last_step=STEP, accuracy=[(0, 0.47), (10, 0.61)], seconds_left=91.0,
    waiting_for="groups from rollout-0", waiting_s=2.0, services=[("rollout-0", "running", 1)],
)  # fmt: skip


def test_a_step_is_one_line_with_units() -> None:
    assert step_line(STEP, VIEW) == (
        "step 12/40  reward 0.713  avg@16 0.610 (version 10)  speed 5,210 tokens/s  weight sync 0.04 s  "
        "waited for rollouts 1.50 s  step time 3.2 s  version 12  left 1:31"
    )


def test_a_figure_that_was_not_measured_is_left_out() -> None:
    assert step_line({"step": 1, "policy_version": 1}, View(run="tiny", steps=40)) == "step 1/40  version 1"


def test_validation_before_training_and_after_a_version() -> None:
    assert validation_line(0, 0.47, 0.47, 16) == "validation before training: avg@16 0.470"
    assert validation_line(10, 0.61, 0.47, 16) == "validation of version 10: avg@16 0.610 (+0.140 since the start)"


def test_seconds_as_a_clock_shows_them() -> None:
    assert [clock(5), clock(65), clock(3723)] == ["0:05", "1:05", "1:02:03"]


def test_a_terminal_shows_the_panel_and_a_pipe_only_lines() -> None:
    terminal, pipe = io.StringIO(), io.StringIO()
    for file, is_terminal in ((terminal, True), (pipe, False)):
        with Screen(Console(file=file, force_terminal=is_terminal, width=100)) as screen:
            screen.say("trainer ready")
            screen.show(VIEW)
            assert screen.live is is_terminal
    assert "trainer waits for groups from rollout-0 (2 s)" in terminal.getvalue()
    assert "rollout-0 running (restarts: 1)" in terminal.getvalue()
    assert pipe.getvalue() == "trainer ready\n"


def drawn(view: View, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(panel(view, width))
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [60, 100])
def test_the_panel_has_one_size_whatever_there_is_to_show(width: int) -> None:
    long = "groups " * 40
    services = [(f"rollout-{i}", "running", 0) for i in range(16)] + [("reward", "starting", 2)]
    full = dataclasses.replace(VIEW, waiting_for=long, services=services)
    sizes = {
        (len(lines), *{len(line) for line in lines})
        for view in (View(run="tiny", steps=40), VIEW, full)
        if (lines := drawn(view, width))
    }
    assert len(sizes) == 1 and next(iter(sizes))[1:] == (width,)
    assert any("services" in line and "reward starting (restarts: 2)" in line for line in drawn(full, width))


def test_a_run_that_is_stopping_says_nothing_about_the_time_to_its_last_step() -> None:
    assert "left 1:31" in step_line(STEP, VIEW)
    assert "left" not in step_line(STEP, dataclasses.replace(VIEW, phase="stopping"))


def test_the_time_of_a_step_is_told_apart_from_that_of_a_validation_beside_it() -> None:
    line = step_line({**STEP, "timing_s/step": 12.0, "timing_s/validation": 8.75}, VIEW)
    assert "step time 3.2 s and 8.8 s of validation  " in line


def write(file: Path, *lines: dict) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_only_whole_new_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = MetricsFile(file)
    assert tail.read() == []
    file.write_text('{"step": 0, "time": 1.0}\n{"step": 1, "ti')
    assert [line["step"] for line in tail.read()] == [0]
    with file.open("a") as more:
        more.write('me": 2.0}\n')
    assert [line["step"] for line in tail.read()] == [1]
    assert tail.read() == []


def test_a_file_that_the_trainer_cut_back_is_read_on_from_there(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = MetricsFile(file)
    write(file, *({"step": step, "time": 1.0} for step in range(4)))
    tail.read()
    write(file, *({"step": step, "time": 1.0} for step in range(2)))
    assert tail.read() == []
    assert sorted(tail.by_step) == [0, 1]
    with file.open("a") as more:
        more.write('{"step": 2, "time": 9.0}\n')
    assert [line["time"] for line in tail.read()] == [9.0]
    assert tail.by_step[2]["time"] == 9.0


def test_what_is_not_kept_of_a_step_is_read_all_the_same_and_is_not_new_after_a_cut_back(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = MetricsFile(file, keep=is_shown)
    step = {"step": 1, "time": 1.0, "timing_s/step": 2.0, "actor/entropy": 0.5}
    validation = {"step": 1, "time": 2.0, "val-core/a/acc/mean@16": 0.5, "val-aux/a/acc/std@16": 0.25}
    write(file, step, validation, {"step": 2, "time": 3.0, "actor/entropy": 0.5})
    assert [len(line) for line in tail.read()] == [4, 4, 3]
    kept = {"step": 1, "time": 1.0, "timing_s/step": 2.0, "val-core/a/acc/mean@16": 0.5}
    assert tail.by_step == {1: kept, 2: {"step": 2, "time": 3.0}}
    write(file, step, validation)
    assert tail.read() == []
    assert tail.by_step == {1: kept}


def test_a_validation_on_a_line_of_its_own_joins_its_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = MetricsFile(file)
    step = {"step": 10, "time": 5.0, "timing_s/step": 2.0}
    write(file, step, {"step": 11, "time": 7.0, "timing_s/step": 2.0})
    tail.read()
    with file.open("a") as more:
        more.write('{"step": 10, "time": 8.0, "val-core/a/acc/mean@16": 0.5}\n')
    assert [line["step"] for line in tail.read()] == [10]
    assert tail.by_step[10] == {**step, "val-core/a/acc/mean@16": 0.5}
    assert tail.accuracy(16) == [(10, 0.5)]


def test_after_a_cut_back_a_step_with_a_validation_of_its_own_is_not_new_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = MetricsFile(file)
    step = {"step": 10, "time": 5.0, "timing_s/step": 2.0}
    validation = {"step": 10, "time": 8.0, "val-core/a/acc/mean@16": 0.5}
    write(file, step, validation, {"step": 11, "time": 9.0, "timing_s/step": 2.0})
    tail.read()
    write(file, step, validation)
    assert tail.read() == []
    assert tail.accuracy(16) == [(10, 0.5)]


def test_the_time_left_is_the_recent_pace_times_the_steps_that_remain(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = MetricsFile(file)
    write(file, {"step": 0, "time": 0.0}, {"step": 1, "time": 100.0})
    tail.read()
    assert tail.seconds_left(steps=10) is None
    with file.open("a") as more:
        more.write('{"step": 2, "time": 103.0}\n{"step": 3, "time": 106.0}\n')
    tail.read()
    assert tail.seconds_left(steps=10) == pytest.approx(21.0)
    with file.open("a") as more:
        more.write('{"step": 4, "time": 5000.0}\n')  # resumed the next day
    tail.read()
    assert tail.seconds_left(steps=10) == pytest.approx(18.0)


def test_accuracy_is_the_mean_over_data_sources_at_the_run_s_number_of_samples() -> None:
    line = {"val-core/a/acc/mean@16": 0.5, "val-core/b/acc/mean@16": 0.7, "val-core/b/acc/mean@8": 0.1}
    assert accuracy(line, 16) == pytest.approx(0.6)
    assert accuracy({"critic/score/mean": 0.5}, 16) is None
