"""`retort preflight`: what each check makes of what it finds, and that none holds up the others."""

import json
import threading
import time
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.cli.machine import examine, lines
from retort.cli.machine.finding import Finding, State, failed, ok
from retort.cli.machine.gpus import describe_gpus, describe_links
from retort.cli.machine.model_files import chat_template, tokenizer, weights
from retort.cli.machine.redis_server import describe, describe_skew
from retort.cli.machine.resources import disk
from retort.config import ConfigError, RunConfig
from tests.unit.cli.test_preflight import config

TOPOLOGY = """\x1b[4m\tGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tNV18\t0-47\t0\t\tN/A
GPU2\tSYS\tNV18\t X \t0-47\t0\t\tN/A

Legend:
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def a_model(directory: Path, **files: object) -> RunConfig:
    known = {
        "config.json": {"model_type": "qwen3", "vocab_size": 10},
        "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 9}}},
        "tokenizer_config.json": {"chat_template": "{{ messages }}"},
    }
    for name, content in (known | files).items():
        (directory / name).write_text(json.dumps(content))
    (directory / "model.safetensors").write_bytes(bytes(100))
    return config(model={"path": str(directory)})


def test_the_demo_is_fit_for_this_machine_and_says_so_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert main(["preflight", "configs/tiny-cpu.toml", "--json"]) == 0
    assert time.monotonic() - started < 30
    findings = json.loads(capsys.readouterr().out)
    assert {"driver", "NCCL", "memory", "disk", "Redis", "clock", "tokenizer"} <= {f["name"] for f in findings}


def test_what_is_red_carries_its_fix_and_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "configs/tiny-cpu.toml", "--set", "data.train=no-such.jsonl"]) == 2
    out = capsys.readouterr().out
    assert "✗ questions      no-such.jsonl: cannot read the data file: No such file or directory\n" in out
    assert "fix: Correct [data], or make the file" in out


def test_a_check_that_hangs_is_red_and_the_others_are_told() -> None:
    released = threading.Event()
    checks = {"quick": lambda: ok("fine"), "stuck": lambda: ok(str(released.wait(10)))}
    quick, stuck = examine(checks, deadline_s=0.2)
    released.set()
    assert (quick.state, quick.text) == (State.OK, "fine")
    assert (stuck.state, stuck.text) == (State.FAILED, "no answer within 0.2 s")


def test_a_configuration_error_is_what_happened_and_what_to_do() -> None:
    def check() -> tuple[State, str, str]:
        raise ConfigError("trainer.ranks = 6 needs 6 GPUs, and there are 2. Lower it.")

    [finding] = examine({"GPUs": check}, deadline_s=1)
    assert finding == Finding("GPUs", State.FAILED, "trainer.ranks = 6 needs 6 GPUs, and there are 2", "Lower it.")


def test_lines_can_be_told_apart_without_colour() -> None:
    shown = lines([Finding("disk", *ok("plenty")), Finding("clock", *failed("2 s", "chrony"))], colour=False)
    assert shown[0].startswith("✓ disk")
    assert shown[1].startswith("✗ clock")
    assert shown[2].split() == ["fix:", "chrony"]
    assert "\x1b[31m✗" in lines([Finding("clock", *failed("2 s", "chrony"))], colour=True)[0]


def test_gpus_that_somebody_else_uses_are_named() -> None:
    rows = [["0", "NVIDIA H200", "143771", "4"], ["1", "NVIDIA H200", "143771", "20000"]]
    assert describe_gpus(rows, ["0"]) == ok("1 × NVIDIA H200 with 140 GiB")
    state, text, fix = describe_gpus(rows, ["0", "1"])
    assert (state, text) == (State.FAILED, "used by somebody else: GPU 1 (20000 MiB)")
    assert "CUDA_VISIBLE_DEVICES" in fix


def test_pairs_without_nvlink_are_named() -> None:
    assert describe_links(TOPOLOGY, ["0", "1"])[0] is State.OK
    state, text, _ = describe_links(TOPOLOGY, ["0", "1", "2"])
    assert (state, text) == (State.WARNING, "not joined by NVLink: GPU0-GPU2 (SYS)")


def test_a_redis_in_cluster_mode_or_a_replica_is_red_and_one_that_forgets_is_yellow() -> None:
    info = {"redis_version": "7.4.0", "role": "master", "maxmemory": 2**30, "maxmemory_policy": "noeviction"}
    durable = {"appendonly": "yes", "appendfsync": "everysec"}
    assert describe(info, durable) == ok("7.4.0, 1.0 GiB at most, noeviction, append-only file")
    assert describe(info | {"cluster_enabled": 1}, durable)[0] is State.FAILED
    assert describe(info | {"role": "slave"}, durable)[0] is State.FAILED
    assert describe(info, durable | {"appendonly": "no"})[0] is State.WARNING
    assert describe(info | {"maxmemory": 0}, durable)[0] is State.WARNING


def test_a_clock_two_seconds_off_is_red() -> None:
    assert describe_skew(0.25) == ok("250 ms behind Redis")
    assert describe_skew(-2.0)[:2] == (State.FAILED, "2000 ms before Redis")


def test_another_byte_of_the_weights_is_another_fingerprint(tmp_path: Path) -> None:
    run = a_model(tmp_path)
    first = weights(run)[1]
    assert weights(run)[1] == first
    (tmp_path / "model.safetensors").write_bytes(bytes(99) + b"\1")
    assert weights(run)[1] != first


def test_a_tokenizer_with_more_tokens_than_the_model_is_red(tmp_path: Path) -> None:
    assert tokenizer(a_model(tmp_path))[0] is State.OK
    state, text, _ = tokenizer(a_model(tmp_path, **{"tokenizer.json": {"model": {"vocab": {"a": 10}}}}))
    assert (state, text) == (State.FAILED, "it has token 10, and the model knows 10 tokens")


def test_a_model_without_a_chat_template_is_red(tmp_path: Path) -> None:
    assert chat_template(a_model(tmp_path))[0] is State.OK
    assert chat_template(a_model(tmp_path, **{"tokenizer_config.json": {}}))[0] is State.FAILED


def test_a_run_that_the_disk_cannot_hold_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    # Qwen3-4B: 4.02e9 parameters, three checkpoints of 16 bytes and three exports of 2.
    run = config(model={"path": "Qwen/Qwen3-4B"})
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    state, text, _ = disk(run)
    assert state is State.FAILED
    assert text.endswith("want about 202.3 GiB")
