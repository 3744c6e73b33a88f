"""A directory for the sockets between vLLM's processes, which vLLM leaves behind however it ends."""

import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "retort-engine-"


def make_socket_directory() -> Path:
    """A new one, for this process alone. Those of processes that were killed before they could remove theirs go."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*"):
        pid = left.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)  # it may be another user's, or be gone by now
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
