import json
import socket
from pathlib import Path

import pytest

from retort.cli import preflight
from retort.cli.ports import free_ports
from retort.config import ConfigError, RunConfig


def config(**tables: dict) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "small",
            "model": {"path": "none"},
            "data": {"train": "none", "validation": "none"},
            "trainer": {"steps": 1},
            **tables,
        }
    )


def test_a_directory_without_a_model_is_refused_and_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not a model .* \*\.safetensors, tokenizer\.json is missing") as error:
        preflight.check_model(str(tmp_path))
    assert error.value.exit_code == 2


def test_a_directory_in_hugging_face_format_is_a_model(tmp_path: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_text("")
    preflight.check_model(str(tmp_path))


def test_a_path_that_is_neither_directory_nor_hub_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.path = models/tiny/qwen: no such directory"):
        preflight.check_model("models/tiny/qwen")


def asked(directory: Path, *, train: str, validation: str) -> RunConfig:
    files = {"train": directory / "train.jsonl", "validation": directory / "validation.jsonl"}
    files["train"].write_text(train)
    files["validation"].write_text(validation)
    data = {name: str(file) for name, file in files.items()}
    return config(data=data, trainer={"steps": 1, "groups_per_step": 2, "groups_per_update": 2})


def lines(*prompts: str) -> str:
    return "".join(json.dumps({"prompt": prompt, "answer": "C"}) + "\n" for prompt in prompts)


def test_a_question_that_the_trainer_would_refuse_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.jsonl, line 2: neither `messages` nor `prompt` is there"):
        preflight.check_questions(asked(tmp_path, train=lines("a") + '{"answer": "B"}\n', validation=lines("b")))


def test_fewer_questions_than_a_step_asks_say_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.jsonl has 1 questions, fewer than .* = 2\. Set that, .* to 1 or"):
        preflight.check_questions(asked(tmp_path, train=lines("a"), validation=lines("b")))


def test_validation_questions_that_are_trained_on_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preflight.check_questions(asked(tmp_path, train=lines("a", "b", "c"), validation=lines("d", "b", "a")))
    assert "warning: 2 of 3 validation questions are training questions too" in capsys.readouterr().err
    preflight.check_questions(asked(tmp_path, train=lines("a", "b"), validation=lines("d")))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["reward.port", "rollout.port", "trainer.metrics_port"])
def test_a_port_in_use_is_named_with_its_key(key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        table, name = key.split(".")
        settings = {"steps": 1, name: port} if table == "trainer" else {name: port}
        with pytest.raises(ConfigError, match=rf"{key}: cannot listen on 127\.0\.0\.1:{port}: .*in use"):
            preflight.check_ports(config(**{table: settings}))


def test_a_port_of_an_ip_version_6_host_is_free_or_in_use_as_any_other() -> None:
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"rollout.port: cannot listen on ::1:{port}: .*in use"):
            preflight.check_ports(config(rollout={"host": "::1", "port": port}))
    preflight.check_ports(config(rollout={"host": "::1", "port": port}))


def test_a_redis_url_where_nothing_listens_is_refused() -> None:
    [port] = free_ports(1)
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}") as error:
        preflight.check_services(config(redis={"url": f"redis://127.0.0.1:{port}/0"}))
    assert error.value.exit_code == 2


def test_a_reward_address_where_nothing_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ConfigError, match=f"reward.address = {address}: nothing listens there"):
        preflight.check_services(config(reward={"address": address}))


def test_a_missing_package_ends_with_exit_code_3_and_names_make_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(ConfigError, match=r"not installed: vllm\. Run `make setup`") as error:
        preflight.check_dependencies(config())
    assert error.value.exit_code == 3
