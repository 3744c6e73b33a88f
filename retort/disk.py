"""What happens when the disk is full: one line that names the file and what is free, and an exit code of its own."""

import errno
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Nothing is free, the user's share is used up, or the file may not grow further."""


class DiskFullError(Exception):
    """A file could not be written for want of room. Exit code 6: to start again would not help."""

    exit_code = 6


class writing(AbstractContextManager[None]):  # a verb, as in `with writing(file)`
    """What is done inside writes the file, or the files of the directory, `path`. Raises DiskFullError.

    What lies at `draft` then is deleted, so that there is room for the log to say so.
    """

    def __init__(self, path: Path, draft: Path | None = None) -> None:
        self._path = path
        self._draft = draft

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and _is_full(error):
            place = next(parent for parent in self._path.absolute().parents if parent.exists())
            free = shutil.disk_usage(place).free / 2**20
            if self._draft and self._draft.is_dir():
                shutil.rmtree(self._draft)
            elif self._draft:
                self._draft.unlink(missing_ok=True)
            raise DiskFullError(
                f"disk full: {self._path} could not be written ({error}); {free:.1f} MiB are free there. What was "
                "saved before is whole. Make room, then go on with --resume."
            ) from error


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    # safetensors and tokenizers, which write in Rust, raise types of their own that say it in words.
    said = re.search(r"\(os error (\d+)\)", str(error))
    return said is not None and int(said[1]) in FULL
