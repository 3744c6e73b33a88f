import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from services.trainer.packing import pack
from services.trainer.work import Work, work_metrics

CPU = torch.device("cpu")


def test_room_counts_passes_without_rows_and_what_a_long_sequence_needed() -> None:
    work = Work()
    work.add(pack([0], [[1, 2]], [[3]], CPU), operations=5.0, token_budget=4)
    work.add(pack([], [], [], CPU), operations=0.0, token_budget=4)
    work.add(pack([0], [[1, 2]], [[3, 4, 5, 6]], CPU), operations=7.0, token_budget=4)
    assert (work.tokens, work.room, work.operations) == (9, 4 + 4 + 6, 12.0)


def test_a_shared_prompt_fills_the_room_of_each_completion() -> None:
    work = Work()
    work.add(pack([0, 1], [[1, 2]] * 2, [[3], [4, 5]], CPU), operations=5.0, token_budget=8)
    assert (work.tokens, work.room) == (3 + 4, 8)


def test_the_work_of_the_ranks_adds_up(mesh: DeviceMesh) -> None:
    work = Work(tokens=3, room=4, operations=8.0, optimizer_seconds=0.5).of_all_ranks(CPU, peak_rate=100.0)
    assert (work.tokens, work.room, work.operations, work.optimizer_seconds) == (3, 4, 8.0, 0.5)
    assert (work.peak_rate, work.ranks) == (100.0, 1)
    # A Python process with torch has more than 50 MB, and this test does not fill 100 GB.
    assert 50e6 < work.peak_bytes < 100e9


def test_mfu_is_what_was_computed_over_what_could_have_been() -> None:
    work = Work(tokens=3, room=4, operations=100.0, optimizer_seconds=0.5, peak_bytes=2e9, peak_rate=50.0, ranks=2)
    seconds = {"old_logprobs": 1.0, "teacher": 1.0, "update": 2.0, "weight_sync": 9.0}
    assert work_metrics(work, seconds) == pytest.approx(
        {
            "perf/trainer_ranks": 2,
            "perf/max_memory_allocated_gb": 2.0,
            "perf/packing_efficiency": 0.75,
            "perf/mfu": 100.0 / 4.0 / 50.0,
            "timing_s/optimizer": 0.5,
            "timing_s/forward_backward": 1.5,
        }
    )


def test_a_step_without_a_gradient_has_neither_mfu_nor_packing() -> None:
    assert set(work_metrics(Work(peak_rate=1.0), {})) == {
        "perf/trainer_ranks",
        "perf/max_memory_allocated_gb",
        "timing_s/optimizer",
        "timing_s/forward_backward",
    }
