import pytest
import torch

from retort.config import ConfigError
from services.trainer.blocks import start_compiler
from tests.training import a_config


def test_on_a_gpu_only_bfloat16_is_compiled() -> None:
    config = a_config(trainer={"compile": "inductor"})
    with pytest.raises(ConfigError, match=r"needs model\.dtype = 'bfloat16' on a GPU"):
        start_compiler(config, torch.device("cuda"))
