from pathlib import Path

import pytest

from retort.cli.__main__ import main
from tests.finished_run import AVG, a_config, write_published, write_run


def test_two_runs_are_laid_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "seed-0", a_config(tmp_path / "seed-0"), [0.5, 0.75])
    second = write_run(tmp_path / "seed-1", a_config(tmp_path / "seed-1"), [0.5, 1.0])
    assert main(["compare", str(first), str(second)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["metric", "A:", "seed-0", "B:", "seed-1", "B", "-", "A"]
    assert lines[1] == [AVG, "final", "0.7500", "@1", "1.0000", "@1", "+0.2500"]


def test_a_run_is_laid_beside_a_published_one_as_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", a_config(tmp_path / "run"), [0.5, 0.6, 0.7, 0.9, 0.78])
    assert main(["compare", str(run), str(write_published(tmp_path / "card.toml")), "--html"]) == 0
    assert capsys.readouterr().out.endswith("compare.html\n")
    page = (tmp_path / "compare.html").read_text()
    assert "A: run" in page
    assert "B: Letters (card)" in page
    assert "<td>0.7800 @4</td><td>0.7900 @4</td><td>+0.0100</td>" in page


def test_a_run_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "none"), str(tmp_path / "none")]) == 2
    assert "no such run directory" in capsys.readouterr().err


def test_runs_that_logged_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "empty"), str(tmp_path / "empty")]) == 2
    assert "has a metric to compare yet" in capsys.readouterr().err
