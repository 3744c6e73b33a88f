import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from retort.config import ConfigError
from services.reward.checkers import Example
from services.reward.checkers.mcq import MultipleChoice
from services.reward.discovery import GROUP, load_checkers

ROOT = Path(__file__).parents[3]
BUILT_IN = [
    *("composite", "exact_match", "json_schema", "math", "mcq", "mcq_lenient", "numeric", "python_tests", "regex"),
]
MCQ = "services.reward.checkers.mcq:MultipleChoice"


def test_the_built_in_checkers_need_no_entry_points() -> None:
    assert list(load_checkers([])) == BUILT_IN


def test_a_built_in_checker_that_is_declared_as_well_is_the_same_one() -> None:
    assert list(load_checkers([EntryPoint("mcq", MCQ, GROUP)])) == BUILT_IN


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mcq", "other.package:Mcq", "two checkers are named 'mcq': .*MultipleChoice and other.package:Mcq"),
        ("mine", "no_such_module:Mine", r"checker 'mine' \(no_such_module:Mine\) does not load"),
        ("mine", "services.reward.checkers.mcq:Nothing", "does not load: .*Nothing"),
        ("mine", MCQ, "calls itself 'mcq'"),
        ("mine", "builtins:dict", "does not derive from services.reward.checkers.Checker"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_checkers([EntryPoint(name, value, GROUP)])


@pytest.mark.parametrize("line", ["raise ValueError('broken')", "import sys; sys.exit(0)", "def"])
def test_a_module_that_cannot_be_imported_is_named(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cannot_be_imported.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"checker 'mine' \(cannot_be_imported:Mine\) does not load: \w+: "):
        load_checkers([EntryPoint("mine", "cannot_be_imported:Mine", GROUP)])


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("version", 1),
        ("accepts", None),
        ("options", ["mode"]),
        ("options", {"mode": 1}),
        ("limits", None),
        ("examples", ["B"]),
        ("examples", None),
        ("examples", [Example("B", "B", "1")]),  # type: ignore[arg-type]
        ("examples", [Example("B", 1, 1.0)]),  # type: ignore[arg-type]
    ],
)
def test_a_checker_that_would_fail_when_it_is_asked_is_refused(
    attribute: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MultipleChoice, attribute, value)
    with pytest.raises(ConfigError, match=rf"checker 'mcq' .* needs .*{attribute}"):
        load_checkers([])


def test_the_service_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, services.reward.__main__ as m; m.load_checkers(()); "
        "print({'torch', 'vllm', 'numpy', 'redis', 'sympy'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "set()\n")
