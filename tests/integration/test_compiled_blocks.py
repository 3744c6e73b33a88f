"""Compiled blocks learn what eager ones do, from few graphs, on one rank and two; without a compiler nothing starts.

`aot_eager` is everything but the making of code, which takes inductor half a minute.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.integration.lora_programs import adapters_learnt
from tests.integration.rank_programs import Shape, a_random_step, compiled_beside_eager, one_update
from tests.integration.reference_trainer import gradients_of
from tests.integration.test_training_step import ONE_VERY_LONG, rows_of
from tests.integration.trainer_ranks import Ranks
from tests.training import a_language_model

ROOT = Path(__file__).parents[2]
COMPILING_S = 280.0
START = """
import torch
import torch.distributed as dist
from retort.config import ConfigError
from retort.unpickling import refuse_unpickling
from services.trainer.blocks import start_compiler
from tests.integration.rank_programs import compiled_beside_eager
from tests.training import a_config

refuse_unpickling()
try:
    start_compiler(a_config(trainer={"compile": "inductor"}), torch.device("cpu"))
except ConfigError as error:
    raise SystemExit(str(error))
"""
COMPARE = """
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print(compiled_beside_eager("inductor", True))
"""


def in_a_process_that_reads_no_pickle(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=COMPILING_S,
        check=False,
    )


def test_one_graph_scores_and_one_learns_in_all_blocks_for_all_lengths(tmp_path: Path) -> None:
    with Ranks(1, tmp_path, COMPILING_S) as ranks:
        assert ranks.run(compiled_beside_eager, "aot_eager", False) == [(pytest.approx(0.0, abs=1e-12), 2, 0)]


def test_compiled_checkpointed_blocks_of_two_ranks_give_the_plain_gradient(tmp_path: Path) -> None:
    with Ranks(2, tmp_path, COMPILING_S) as ranks:
        check(ranks.run, ONE_VERY_LONG)
        check(ranks.run, ONE_VERY_LONG[-2:])  # a rank has no rows


def check(run: Callable[..., list[tuple[float, dict[str, np.ndarray]]]], shapes: Sequence[Shape]) -> None:
    loss, gradients = gradients_of(a_language_model(attention="sdpa"), rows_of(a_random_step(shapes, 0))[:-1])
    for same_loss, same in run(one_update, shapes, 0, 32, True, True, "aot_eager"):
        assert same_loss == pytest.approx(loss, abs=1e-10)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(same[name], gradient.numpy(), rtol=0, atol=1e-10, err_msg=name)


def test_adapters_in_compiled_blocks_learn_what_they_learn_in_eager_ones(tmp_path: Path) -> None:
    with Ranks(1, tmp_path, COMPILING_S) as ranks:
        [eager], [compiled] = (ranks.run(adapters_learnt, how) for how in ("none", "aot_eager"))
    assert eager.keys() == compiled.keys()
    for name, values in eager.items():
        np.testing.assert_allclose(compiled[name], values, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_code_from_inductor_with_checkpointing_learns_the_same_in_a_process_that_reads_no_pickle() -> None:
    done = in_a_process_that_reads_no_pickle(START + COMPARE)
    assert done.returncode == 0, done.stderr
    far, graphs, breaks = done.stdout.splitlines()[-1].strip("()").split(", ")
    assert float(far) < 1e-10
    assert (graphs, breaks) == ("2", "0")


def test_without_a_compiler_the_start_fails_with_the_compilers_words() -> None:
    done = in_a_process_that_reads_no_pickle(START, PATH="")
    assert done.stderr.splitlines()[-1].startswith(
        "trainer.compile = 'inductor': this machine cannot compile. No working C++ compiler found"
    )
    assert done.stderr.endswith("Install g++, or set trainer.compile = 'none'.\n")
