import pytest

from services.rollout import vllm_engine


@pytest.mark.parametrize(
    ("workers", "threads", "cores", "text"),
    [(2, 1, {0, 1}, "0|1"), (2, 2, {4, 5, 6, 7}, "4,5|6,7"), (2, 1, {3}, "3|3")],
)
def test_the_workers_of_a_split_engine_share_the_cores(
    workers: int, threads: int, cores: set[int], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine.os, "sched_getaffinity", lambda _: cores)
    assert vllm_engine.cores_of_workers(workers, threads) == text
