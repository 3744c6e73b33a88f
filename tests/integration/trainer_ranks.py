"""Trainer ranks that live through many tests: real processes with a gloo group, which run what they are handed."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0


class Ranks:
    """`size` processes of one process group. Use as a context."""

    def __init__(self, size: int, directory: Path, deadline_s: float = DEADLINE_S) -> None:
        # A fork server has imported torch and transformers once; every rank starts from there in a moment.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.training"])
        self.size = size
        self._deadline_s = deadline_s
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, other = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(other, rank, size, directory / "rendezvous", deadline_s / 2),
                name=f"rank-{rank}",
                daemon=True,
            )
            process.start()
            other.close()
            self._ends.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call the function (importable by name) on every rank; the results in the order of ranks."""
        for end in self._ends:
            end.send((function, arguments))
        answers = [self._answer(rank) for rank in range(self.size)]
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        end = self._ends[rank]
        try:
            return end.recv() if end.poll(self._deadline_s) else (True, f"no answer within {self._deadline_s:g} s")
        except EOFError:
            return True, "the process is gone"

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(requests: Connection, rank: int, size: int, rendezvous: Path, patience_s: float) -> None:
    import torch
    import torch.distributed as dist

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=patience_s),
    )
    while True:
        try:
            function, arguments = requests.recv()
        except EOFError:
            return
        try:
            requests.send((False, function(*arguments)))
        except Exception:  # noqa: BLE001  whatever it is, the test that asked must show it
            requests.send((True, traceback.format_exc()))
