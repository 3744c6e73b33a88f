import stat
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.cli.credentials import ROLES, operator_url
from retort.config import ConfigError


def test_each_who_has_to_know_a_secret_has_a_directory_and_no_other_can_read_it(tmp_path: Path) -> None:
    place = tmp_path / "secrets"
    assert main(["secrets", str(place), "--redis", "redis:6379"]) == 0
    said = {path.relative_to(place).as_posix(): path.read_text().strip() for path in place.glob("*/*")}
    assert set(said) == {
        "redis/users.acl",
        "reward/reward-token",
        *(f"{role}/redis-{what}" for role in ROLES for what in ("url", "password")),
        "trainer/control-token",
        "rollout/control-token",
        "rollout/reward-token",
    }  # fmt: skip
    assert said["rollout/control-token"] == said["trainer/control-token"]
    assert said["rollout/reward-token"] == said["reward/reward-token"] != said["trainer/control-token"]
    assert said["rollout/redis-url"] == f"redis://rollout:{said['rollout/redis-password']}@redis:6379/0"
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o700}
    secret = [path for path in place.glob("*/*") if path.name != "users.acl"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


def test_another_address_changes_no_password(tmp_path: Path) -> None:
    for address in ("redis:6379", "10.0.0.1:6379"):
        assert main(["secrets", str(tmp_path), "--redis", address]) == 0
        password = (tmp_path / "operator" / "redis-password").read_text().strip()
        assert operator_url(tmp_path) == f"redis://operator:{password}@{address}/0"


def test_a_run_of_somebody_else_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"operator/redis-url: No such file or directory\. Only who started the run"):
        operator_url(tmp_path)
