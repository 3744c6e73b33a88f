import os
import subprocess
import sys

import pytest

from retort.cli.__main__ import main


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\nfrom retort.cli.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main(['--help'])\n"
        "sys.exit(bool({'torch', 'pydantic', 'rich', 'redis'} & set(sys.modules)))"
    )
    before = os.times()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert os.times().children_user - before.children_user < 0.5  # 0.05 s on a quiet machine


def test_a_bad_run_file_is_told_in_words_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no-such.toml"]) == 2
    assert capsys.readouterr().err == "retort run: no-such.toml: no such run file. Shipped ones are in configs/.\n"


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["rum"])
    assert exit_.value.code == 2


def test_version_names_retort_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert {"retort", "torch"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
