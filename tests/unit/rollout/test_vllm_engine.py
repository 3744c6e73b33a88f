import pytest

from services.rollout import vllm_engine


@pytest.mark.parametrize(("workers", "cores", "threads"), [(1, 8, 7), (2, 8, 3), (4, 16, 3), (8, 2, 1)])
def test_the_engine_workers_of_a_host_share_all_its_cores_but_one(
    workers: int, cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert vllm_engine.engine_threads(workers) == threads
