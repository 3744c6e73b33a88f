"""`retort score`: files of items in, files of results out, through the real service."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from tests.reward_service import ROOT, Service, reward_service

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with reward_service() as running:
        yield running


def score_file(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retort.cli", "score", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_file_is_scored_and_an_interrupted_one_resumed(service: Service, tmp_path: Path) -> None:
    lines = [{"checker": "mcq", "completion": "ABCD"[n % 4], "answer": "B"} for n in range(1000)]
    source, output = tmp_path / "items.jsonl", tmp_path / "results.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["score", str(source), str(output), "--address", service.address]) == 0
    whole = output.read_text().splitlines()
    assert len(whole) == 1000

    output.write_text("\n".join(whole[:400]) + "\n" + whole[400][:20])
    assert main(["score", str(source), str(output), "--address", service.address]) == 0
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [json.loads(line) for line in whole[:400]] == results[:400]
    assert len({result["id"] for result in results}) == len(results) == 1000
    assert sum(result["reward"] for result in results) == 250.0


def test_an_unscorable_line_is_written_and_ends_with_1(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text('{"completion": "B", "answer": ""}\n')
    arguments = ["score", str(tmp_path / "in"), str(tmp_path / "out"), "--checker", "mcq", "--address", service.address]
    assert main(arguments) == 1
    assert json.loads((tmp_path / "out").read_text())["unscorable"]["reason"].startswith("answer is empty")
    assert capsys.readouterr().out == f"1 results, 1 unscorable: {tmp_path / 'out'}\n"


def test_only_a_line_feed_ends_a_line_and_blank_lines_are_none(service: Service, tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\u0085d", "e"]
    items = [
        json.dumps({"checker": "exact_match", "completion": text, "answer": text}, ensure_ascii=False) for text in texts
    ]
    (tmp_path / "in").write_text(f"{items[0]}\n\n{items[1]}\r\n{items[2]}\n \n", encoding="utf-8")
    # Called again it finds every result that it wrote.
    for _ in range(2):
        assert main(["score", str(tmp_path / "in"), str(tmp_path / "out"), "--address", service.address]) == 0
    results = [json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").split("\n")[:-1]]
    assert sorted((result["id"], result["parsed"]) for result in results) == [
        ("1", "a\u2028b"),
        ("3", "c\u0085d"),
        ("4", "e"),
    ]


def test_numbers_are_taken_as_they_are_written(service: Service, tmp_path: Path) -> None:
    lines = [
        '{"id": 7, "checker": null, "completion": 1.50, "answer": "1.50"}',
        '{"checker": "numeric", "completion": "1.05", "answer": 1, "options": {"relative": 0.1}}',
    ]
    (tmp_path / "in").write_text("\n".join(lines))
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--checker", "exact_match", "--address", service.address]
    assert main(["score", *arguments]) == 0
    results = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert sorted((result["id"], result["checker"], result["reward"]) for result in results) == [
        ("2", "numeric@1", 1.0),
        ("7", "exact_match@1", 1.0),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: Expecting property name"),
        ("[" * 100_000, "line 1: maximum recursion depth exceeded"),
        ("[]", "line 1: no JSON object"),
        ('{"checker": "mcq"}', "line 1: has no completion"),
        ('{"completion": "", "answer": ""}', "line 1: names no checker"),
        ('{"completion": "", "answer": null}', "line 1: answer is null; give a text or a number"),
        ('{"completion": "", "answer": true}', "line 1: answer is true; give a text or a number"),
        ('{"completion": ["a"], "answer": ""}', 'line 1: completion is ["a"]; give a text or a number'),
        ('{"completion": "\\ud800", "answer": ""}', "line 1: completion has a lone surrogate"),
        ('{"completion": "", "answer": "", "id": null}', "line 1: id is null"),
        ('{"completion": "", "answer": "", "id": ""}', "line 1: id is empty"),
        ('{"completion": "", "answer": "", "options": null}', "line 1: options is null; give an object of texts"),
        ('{"completion": "", "answer": "", "metadata": {"a": []}}', "line 1: metadata.a is []"),
    ],
    ids=range(13),
)
def test_a_line_that_is_no_item_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, problem: str
) -> None:
    (tmp_path / "in").write_text(line + "\n")
    checker = [] if "names no checker" in problem else ["--checker", "mcq"]
    assert main(["score", str(tmp_path / "in"), str(tmp_path / "out"), *checker]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "output", "authority"),
    [("none/in", "out", ""), ("in", "none/out", ""), ("in", "out", "none/ca.pem")],
    ids=["input", "output", "ca-file"],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    output: str,
    authority: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").write_text("")
    assert main(["score", source, output, "--ca-file", authority]) == 2
    (missing,) = [name for name in (source, output, authority) if name.startswith("none")]
    assert capsys.readouterr().err == f"retort score: {missing}: No such file or directory.\n"


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text("")
    arguments = ["score", str(tmp_path / "in"), str(tmp_path / "out"), "--token-file", str(tmp_path / "token")]
    assert main(arguments) == 2
    assert f"{tmp_path / 'token'}: No such file or directory." in capsys.readouterr().err
    (tmp_path / "token").write_text("\n")
    assert main(arguments) == 2
    assert "is empty" in capsys.readouterr().err


def test_a_file_for_nobody_ends_with_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retort.cli.score.CONNECT_S", 0.5)
    (tmp_path / "in").write_text('{"checker": "mcq", "completion": "B", "answer": "B"}\n')
    address = f"127.0.0.1:{unused_port}"
    assert main(["score", str(tmp_path / "in"), str(tmp_path / "out"), "--address", address]) == 4
    assert f"reward service at {address}: UNAVAILABLE: " in capsys.readouterr().err


@pytest.mark.parametrize("torn", ['{"id": "2", "rew', '{"id": "2", "rew\n'], ids=["without line feed", "with it"])
def test_a_torn_last_line_is_scored_again(service: Service, tmp_path: Path, torn: str) -> None:
    line = json.dumps({"checker": "mcq", "completion": "B", "answer": "B"})
    (tmp_path / "in").write_text(f"{line}\n{line}\n")
    (tmp_path / "out").write_text('{"id": "1", "reward": 1.0}\n' + torn)
    assert main(["score", str(tmp_path / "in"), str(tmp_path / "out"), "--address", service.address]) == 0
    results = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(result["id"], result["reward"]) for result in results] == [("1", 1.0), ("2", 1.0)]


@pytest.mark.parametrize("text", ["notes", "notes\n", '{"id": "1"\n{"id": "2"}\n', '{"id": "1"}\n\n'], ids=range(4))
def test_a_file_that_holds_something_else_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "in").write_text("")
    (tmp_path / "out").write_text(text)
    assert main(["score", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "not a file of results" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == text


@pytest.fixture
def children_heed_ctrl_c() -> Iterator[None]:
    """A shell that runs the tests in the background lets them ignore Ctrl-C, and their children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("children_heed_ctrl_c")
def test_ctrl_c_leaves_a_file_that_can_be_continued(service: Service, tmp_path: Path) -> None:
    source, output = tmp_path / "items.jsonl", tmp_path / "results.jsonl"
    line = json.dumps({"checker": "python_tests", "completion": "import time; time.sleep(0.3)", "answer": "assert 1"})
    source.write_text(f"{line}\n" * 90)
    command = [sys.executable, "-m", "retort.cli", "score", str(source), str(output), "--address", service.address]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and not (output.exists() and output.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    process.communicate()
    done = score_file(str(source), str(output), "--address", service.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("90 results, 0 unscorable, mean reward 1.0000")
