import os
import re
import subprocess
import sys

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
