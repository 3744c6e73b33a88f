"""The compose files agree with the code and with one another: variables, ports, files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort.config import ENV_PREFIX, RunConfig

ROOT = Path(__file__).parents[2]
BASE = ROOT / "docker-compose.yml"
FILES = [BASE, *sorted((ROOT / "deploy" / "compose").glob("*.yaml"))]


def services_of(file: Path) -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())["services"]
    return services


def is_key_of_the_run_file(variable: str) -> bool:
    table, _, key = variable.removeprefix(ENV_PREFIX).removesuffix("_FILE").lower().partition("__")
    field = RunConfig.model_fields.get(table)
    return field is not None and (not key or key in getattr(field.annotation, "model_fields", {}))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_variable_is_a_key_of_the_run_file(file: Path) -> None:
    variables = {name for service in services_of(file).values() for name in service.get("environment", {})}
    ours = {name for name in variables if name.startswith(ENV_PREFIX)}
    assert ours
    assert {name for name in ours if not is_key_of_the_run_file(name)} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_everything_that_is_mounted_or_built_is_there(file: Path) -> None:
    # An overlay's paths count from the first file, a file of its own from itself.
    start = file.parent if file.name == "rollout-node.yaml" else ROOT
    for name, service in services_of(file).items():
        mounted = [volume.partition(":")[0] for volume in service.get("volumes", [])]
        there = [path for path in mounted if path.startswith(".") and "/secrets/" not in path]  # those the user brings
        assert [path for path in there if not (start / path).exists()] == [], name
        build = service.get("build", {})
        assert (start / build.get("context", ".") / build.get("dockerfile", ".")).exists(), name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_rollout_servers_look_for_the_reward_service_where_it_listens(file: Path) -> None:
    listens = services_of(BASE)["reward"]["environment"]["RETORT_REWARD__PORT"]
    assert services_of(file)["rollout"]["environment"]["RETORT_REWARD__ADDRESS"].endswith(f":{listens}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_container_may_change_itself_gain_privileges_or_show_a_secret(file: Path) -> None:
    for name, service in services_of(file).items():
        if file.parent.name != "compose" or file.name == "rollout-node.yaml":  # not an overlay
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
        # `docker inspect` shows what is in the environment and on the command line.
        said = json.dumps([service.get("environment", {}), service.get("command", []), service.get("entrypoint", [])])
        assert re.findall(r"PASSWORD|TOKEN(?!_FILE)|requirepass", said) == [], name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_container_sees_its_own_secrets_alone(file: Path) -> None:
    for name, service in services_of(file).items():
        mounted = {volume.split(":")[1] for volume in service.get("volumes", []) if "/secrets" in volume}
        assert name == "secrets" or mounted <= {f"/retort/secrets/{name}"}, name
        named = [value for variable, value in service.get("environment", {}).items() if variable.endswith("_FILE")]
        assert [value for value in named if not value.startswith(f"/retort/secrets/{name}/")] == [], name


def test_every_variable_that_a_user_may_set_is_in_the_example() -> None:
    example = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    used = {name for file in FILES for name in re.findall(r"(?<!\$)\$\{(\w+)", file.read_text())}
    assert used - {"GPUS"} <= example
    assert {name for name in example - used if not is_key_of_the_run_file(name)} == {"HF_TOKEN"}


def test_the_images_share_their_first_layers() -> None:
    def start_of(service: str) -> str:
        text = (ROOT / "services" / service / "Dockerfile").read_text()
        code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        return code.partition("COPY requirements/torch-${ACCELERATOR}.txt /tmp/\nRUN ")[0]

    assert start_of("trainer") == start_of("rollout")
    assert start_of("reward").partition("AS wheel")[0] == start_of("rollout").partition("AS wheel")[0]
