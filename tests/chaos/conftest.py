"""A model of ten thousand parameters, a run that takes seconds, and the undisturbed run that every other must equal."""

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from retort.config import RunConfig
from tests.chaos.forked import MODEL
from tests.chaos.run import ChaosRun
from tests.chaos.tally import Tally
from tests.e2e.launched_run import ROOT
from tests.training import a_config, a_language_model

MakeRun = Callable[..., ChaosRun]
TALLY = pytest.StashKey[Tally]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Tally()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[TALLY].runs:
        terminalreporter.write_sep("=", f"chaos, RETORT_CHAOS_SEED={chaos_seed()}")
        terminalreporter.write("".join(f"{line}\n" for line in config.stash[TALLY].lines()))


def chaos_seed() -> int:
    """Of every fault plan of this session; printed, and taken from the environment to see a failure again."""
    if "RETORT_CHAOS_SEED" not in os.environ:
        os.environ["RETORT_CHAOS_SEED"] = str(random.SystemRandom().randrange(10**6))
    return int(os.environ["RETORT_CHAOS_SEED"])


@pytest.fixture(scope="session")
def context(small_model: Path) -> ForkServerContext:
    """Where processes come from that have torch loaded, and the model."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ[MODEL] = str(small_model)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.chaos.warm"])
    return server


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 13,000 random parameters that reads the tokens of the shipped model."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
    a_language_model(vocabulary=len(tokenizer), attention="sdpa").float().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def few_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the shipped questions: a trainer that starts reads them all."""
    directory = tmp_path_factory.mktemp("data")
    for name in ("train.jsonl", "validation.jsonl"):
        lines = (ROOT / "data" / "periodic_table" / name).read_text().splitlines(keepends=True)
        (directory / name).write_text("".join(lines[:48]))
    return directory


@pytest.fixture(scope="session")
def chaos_config(small_model: Path, few_questions: Path) -> Callable[..., RunConfig]:
    """A deterministic run of so many steps; `sections` change single keys."""

    def config(steps: int, **sections: dict[str, object]) -> RunConfig:
        values: dict[str, dict[str, object]] = {
            "model": {"path": str(small_model)},
            "data": {
                "train": str(few_questions / "train.jsonl"),
                "validation": str(few_questions / "validation.jsonl"),
            },
            "trainer": {
                "steps": steps,
                "group_size": 4,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "update_order": "shuffle",
                "max_logprob_gap": 0.01,
                "deterministic": True,
            },
            "validation": {"every": 8, "max_questions": 2, "samples": 2},
            "checkpoint": {"every": 2},
            "rollout": {"replicas": 2, "concurrent_groups": 4, "lease_s": 2.0},
            "weight_sync": {"bucket_mib": 0.02, "max_probe_gap": 1e-3, "deadline_s": 4.0},
            "timeouts": {"startup_s": 60, "stall_s": 60, "max_restarts": 10_000},
        }
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys}
        return a_config(**values)

    return config


@pytest.fixture(scope="session")
def undisturbed(chaos_config, context, tmp_path_factory) -> Callable[[RunConfig], dict[str, str]]:
    """The results of the run to which nothing happened."""
    known: dict[str, dict[str, str]] = {}

    def results(config: RunConfig) -> dict[str, str]:
        key = config.model_dump_json()
        if key not in known:
            run = ChaosRun(tmp_path_factory.mktemp("undisturbed") / "run", config, context)
            run.start()
            assert run.finish(400) == 0, run.tails()
            run.check_exactly_once()
            known[key] = run.results()
        return known[key]

    return results


@pytest.fixture
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash[TALLY]


@pytest.fixture
def make_run(tmp_path: Path, context: ForkServerContext) -> Iterator[MakeRun]:
    """Runs whose processes are gone after the test; should it fail, pytest shows their logs."""
    made: list[ChaosRun] = []

    def make(config: RunConfig, name: str = "run") -> ChaosRun:
        run = ChaosRun(tmp_path / name, config, context)
        made.append(run)
        return run

    yield make
    for run in made:
        if not run.is_closed:
            run.close()
            print(run.tails())
