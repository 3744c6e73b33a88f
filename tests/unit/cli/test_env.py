import pytest

from retort.cli.__main__ import main
from retort.cli.env import settings


def test_settings_are_shown_without_what_is_secret_in_them() -> None:
    environment = {
        "HF_TOKEN": "hf_abc",
        "HOME": "/nowhere",
        "NCCL_DEBUG": "WARN",
        "RETORT_REDIS__URL": "redis://:pass@word/1@10.0.0.1:6379/0",
    }
    assert dict(settings(environment)) == {
        "HF_TOKEN": " …",
        "NCCL_DEBUG": " WARN",
        "RETORT_REDIS__URL": " redis://…@10.0.0.1:6379/0",
    }


def test_a_machine_without_a_gpu_has_a_report_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["python"].startswith("3.")
    assert "usable" in lines["cpu"]
