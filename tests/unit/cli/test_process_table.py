import pytest

from retort.cli.process_table import assign_gpus
from retort.config import ConfigError, RolloutConfig


def test_every_process_has_gpus_of_its_own_and_the_trainer_the_first() -> None:
    shares = assign_gpus(list("01234567"), 4, RolloutConfig(replicas=2, tensor_parallel=2))
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0,1,2,3", "4,5", "6,7"]


def test_without_gpus_nobody_is_told_anything() -> None:
    assert assign_gpus([], 1, RolloutConfig(replicas=2)) == [{}, {}, {}]


def test_too_few_gpus_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"need 3 GPUs, and there are 2"):
        assign_gpus(["0", "1"], 1, RolloutConfig(replicas=2))
