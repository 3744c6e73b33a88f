import json
import os
import re
import subprocess
import sys
from pathlib import Path

from retort.telemetry import LAUNCHER_PID


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_an_event_is_one_line_with_fields() -> None:
    code = (
        "from retort.telemetry import *\nstart_logging('rollout-0')\n"
        "log_event('weights_committed', version=3, seconds=0.0451234567, reason='two words', empty='')"
    )
    line = run(code).stderr
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} INFO rollout-0 weights_committed "
        r'version=3 seconds=0\.0451235 reason="two words" empty=""\n',
        line,
    )


def test_a_library_s_warning_names_the_library() -> None:
    code = (
        "import logging\nfrom retort.telemetry import *\nstart_logging('trainer')\n"
        "logging.getLogger('vllm').warning('slow'); logging.getLogger('vllm').info('quiet')"
    )
    assert run(code).stderr[24:] == "WARNING trainer vllm message=slow\n"


def test_a_process_whose_launcher_is_gone_ends_itself() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = "from retort.telemetry import die_with_parent; die_with_parent(); print('lives')"
    assert run(code, **{LAUNCHER_PID: str(gone.pid)}).returncode == 1
    assert run(code, **{LAUNCHER_PID: str(os.getpid())}).stdout == "lives\n"


def test_a_process_with_another_parent_than_expected_ends_itself() -> None:
    assert run("from retort.telemetry import die_with_parent; die_with_parent(parent_pid=1)").returncode == 1


def json_lines(code: str) -> list[dict[str, object]]:
    start = "import asyncio, logging\nfrom retort.telemetry import *\nstart_logging('trainer')\n"
    return [json.loads(line) for line in run(start + code, LOG_FORMAT="json").stderr.splitlines()]


def test_for_machines_an_event_is_one_object_with_numbers_as_numbers() -> None:
    [line] = json_lines(
        "log_with(run='tiny')\nlog_event('step_done', step=3, loss=0.25, gap=float('nan'), why=OSError('x'))"
    )
    assert str(line.pop("time")).endswith("Z")
    assert line == {
        "level": "INFO",
        "service": "trainer",
        "event": "step_done",
        "run": "tiny",
        "step": 3,
        "loss": 0.25,
        "gap": "nan",
        "why": "x",
    }


def test_what_one_task_says_of_itself_is_not_in_the_lines_of_another() -> None:
    lines = json_lines(
        "async def work(group):\n log_with(group=group)\n await asyncio.sleep(0)\n log_event('sampled')\n"
        "async def main():\n log_with(run='tiny')\n await asyncio.gather(work('g0'), work('g1'))\n log_event('done')\n"
        "asyncio.run(main())"
    )
    assert [(line["event"], line["run"], line.get("group")) for line in lines] == [
        ("sampled", "tiny", "g0"),
        ("sampled", "tiny", "g1"),
        ("done", "tiny", None),
    ]


def test_for_people_the_run_is_left_out_and_what_the_event_says_itself_counts() -> None:
    told = "log_with(run='tiny', step=1, version=0)\nlog_event('e', step=2)"
    assert (
        run(f"from retort.telemetry import *\nstart_logging('t')\n{told}").stderr[24:] == "INFO t e step=2 version=0\n"
    )


def test_for_machines_a_crash_and_a_library_are_objects_too() -> None:
    library, crash = json_lines("logging.getLogger('vllm').warning('slow')\nraise ValueError('no such thing')")
    assert (library["event"], library["message"], library["level"]) == ("vllm", "slow", "WARNING")
    assert (crash["event"], crash["level"]) == ("crashed", "CRITICAL")
    assert str(crash["exception"]).endswith("ValueError: no such thing")


def test_sigusr1_prints_the_stacks_and_ends_nothing() -> None:
    code = (
        "import os, signal\nfrom retort.telemetry import *\nstart_logging('t')\n"
        "def here_it_hangs():\n os.kill(os.getpid(), signal.SIGUSR1)\nhere_it_hangs(); print('lives')"
    )
    ran = run(code)
    assert "in here_it_hangs" in ran.stderr
    assert ran.stdout == "lives\n"


def test_the_images_log_for_machines() -> None:
    for file in Path(__file__).parents[2].glob("services/*/Dockerfile"):
        assert "LOG_FORMAT=json" in file.read_text(), file
