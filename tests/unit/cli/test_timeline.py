"""The timeline: spans from the times of a step, events from the logs."""

import time
from pathlib import Path

from retort.cli.report.run_files import read_run
from retort.cli.report.timeline import read_events, timeline
from tests.unit.cli.test_report import write_lines

START = 1_000_000.0


def parts(*lengths: tuple[str, float]) -> list[dict[str, object]]:
    """Parts of step 3, one after the other from START on."""
    lines, end = [], START
    for name, seconds in lengths:
        end += seconds
        lines.append({"part": name, "step": 3, "end": end, "seconds": seconds})
    return lines


def test_a_part_that_comes_twice_in_a_step_is_two_spans(tmp_path: Path) -> None:
    write_lines(tmp_path / "timeline.jsonl", parts(("wait_groups", 4.0), ("update", 2.0), ("wait_groups", 1.0)))
    spans = [(span.part, span.start - START, span.end - START) for span in read_run(tmp_path).spans]
    assert spans == [("wait_groups", 0.0, 4.0), ("update", 4.0, 6.0), ("wait_groups", 6.0, 7.0)]


def test_a_lane_says_its_share_of_the_time_and_which_service_works(tmp_path: Path) -> None:
    write_lines(tmp_path / "timeline.jsonl", parts(("wait_groups", 4.0), ("update", 2.0), ("weight_sync", 1.0)))
    page = timeline(read_run(tmp_path))
    assert "waiting for rollouts <b>57%</b><small>rollout</small>" in page
    assert "updates <b>29%</b><small>trainer</small>" in page


def test_warnings_and_what_begins_or_ends_are_read_from_the_logs(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "trainer.log"
    log.parent.mkdir()
    log.write_text(
        "2026-03-01T12:00:00.500 INFO trainer took_over epoch=1\n"
        "2026-03-01T12:00:01.000 INFO trainer replica_serves replica=rollout-0 version=0\n"
        '2026-03-01T12:00:02.000 ERROR trainer replica_evicted phase=probe reason="<b>gap"\n'
        "2026-03-01T12:00:03.000 WARNING trainer vllm.cpu message=slow\n"
        "half a li"
    )
    took_over, evicted = read_events(log.parent)
    assert (took_over.name, took_over.is_bad) == ("took_over", False)
    assert (evicted.name, evicted.is_bad, evicted.service) == ("replica_evicted", True, "trainer")
    assert time.strftime("%H:%M:%S", time.localtime(took_over.at)) == "12:00:00"
    page = timeline(read_run(tmp_path))
    assert "⚠ replica_evicted" in page
    assert "&lt;b&gt;gap" in page


def test_a_run_without_steps_has_a_timeline_that_says_so(tmp_path: Path) -> None:
    assert "has not finished any part" in timeline(read_run(tmp_path))
