"""Each in a process of its own, because the hook stays for good."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOMB = """
class Bomb:
    def __reduce__(self):
        import os
        return os.mkdir, ("exploded",)
import io, pickle
from pickle import _Unpickler as InPython
data = pickle.dumps(Bomb())
"""
SERVICES = {
    "trainer": "services.trainer.__main__",
    "replay": "services.trainer.replay",
    "reward": "services.reward.__main__",
    "launcher": "retort.cli.run",
}


def run(code: str, place: Path) -> str:
    """The last line of what it says."""
    command = [sys.executable, "-c", f"{BOMB}from retort.unpickling import refuse_unpickling\n{code}"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=200)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize(
    "load",
    [
        "pickle.loads(data)",
        "InPython(io.BytesIO(data)).load()",
        "import torch; torch.save(Bomb(), 'f'); refuse_unpickling(); torch.load('f', weights_only=False)",
        "import numpy; numpy.save('f.npy', [Bomb()], allow_pickle=True); numpy.load('f.npy', allow_pickle=True)",
        "import os; pid = os.fork(); pid or pickle.loads(data); os.waitpid(pid, 0)",
    ],
    ids=["C", "Python", "torch.load", "numpy", "a fork"],
)
def test_a_pickle_that_names_a_function_is_refused_and_nothing_happens(load: str, tmp_path: Path) -> None:
    said = run(f"refuse_unpickling()\n{load}", tmp_path)
    assert "UnpicklingRefusedError: a pickle names " in said
    assert not (tmp_path / "exploded").exists()


def test_without_the_hook_it_would_have_run(tmp_path: Path) -> None:
    run("pickle.loads(data); print('loaded')", tmp_path)
    assert (tmp_path / "exploded").exists()


def test_numbers_and_texts_pass(tmp_path: Path) -> None:
    assert run("refuse_unpickling(); print(pickle.loads(pickle.dumps([1, 'a', None])))", tmp_path) == "[1, 'a', None]"


@pytest.mark.parametrize("service", SERVICES)
def test_every_process_that_can_do_without_refuses(service: str) -> None:
    source = (ROOT / (SERVICES[service].replace(".", "/") + ".py")).read_text()
    body = source[source.index("def main(") :]
    assert 0 < body.index("    refuse_unpickling()\n") < 900
