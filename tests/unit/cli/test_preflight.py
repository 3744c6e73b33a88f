import json
import socket
from pathlib import Path

import pytest

from retort.cli import preflight
from retort.config import ConfigError, RunConfig

QUESTION = {"prompt": "Which element has 6 protons?", "answer": "C"}


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


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(QUESTION) + "\n" + '{"prompt": "Which' + "\n")
    with pytest.raises(ConfigError, match=r"train\.jsonl, line 2: not JSON"):
        preflight.check_questions(file)


def test_a_line_without_an_answer_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in (QUESTION, QUESTION, ["no", "object"])))
    with pytest.raises(ConfigError, match=r"train\.jsonl, line 3: expected a JSON object"):
        preflight.check_questions(file)


def test_a_data_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no-such\.jsonl: cannot read the data file: No such file"):
        preflight.check_questions(Path("no-such.jsonl"))


@pytest.mark.parametrize("table", ["reward", "rollout"])
def test_a_port_in_use_is_named_with_its_key(table: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{table}\.port: cannot listen on 127\.0\.0\.1:{port}: .*in use"):
            preflight.check_ports(config(**{table: {"port": port}}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_redis_url_where_nothing_listens_is_refused() -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}") as error:
        preflight.check_services(config(redis={"url": f"redis://127.0.0.1:{port}/0"}))
    assert error.value.exit_code == 2


def test_a_reward_address_where_nothing_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"reward.address = {address}: nothing listens there"):
        preflight.check_services(config(reward={"address": address}))


def test_a_missing_package_ends_with_exit_code_3_and_names_make_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(ConfigError, match=r"not installed: vllm\. Run `make setup`") as error:
        preflight.check_dependencies(config())
    assert error.value.exit_code == 3
