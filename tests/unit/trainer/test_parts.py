import gc
import subprocess
import sys

import pytest

from services.trainer.parts import freeze_heap


def test_what_exists_when_the_heap_is_frozen_is_not_looked_at_again() -> None:
    kept = [object()]
    freeze_heap()
    try:
        assert gc.get_freeze_count() > 1000
        assert not any(one is kept for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_a_process_whose_heap_was_frozen_ends_in_silence() -> None:
    """Triton's bindings would name everything that is still there, in lines that bury the trainer's last words."""
    pytest.importorskip("triton", reason="Triton is not installed")
    program = "import services.trainer.update, triton; from services.trainer.parts import freeze_heap; freeze_heap()"
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
