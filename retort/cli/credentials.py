"""`retort secrets DIR --redis HOST:PORT`: the passwords and tokens of a run, a directory for each who has to know them.

    redis/     users.acl                              what each role may do, and the SHA-256 of its password
    trainer/   redis-url redis-password control-token
    rollout/   redis-url redis-password control-token reward-token
    reward/    reward-token
    operator/  redis-url redis-password               `retort status`, `doctor`, `dead` and `fleet`
    scaler/    redis-url redis-password               KEDA, which may ask how much work waits and nothing else

`retort run` does the same in its run directory. What is there already stays, so doing it again changes no password.
"""

import argparse
import hashlib
import os
import secrets
from importlib.resources import files
from pathlib import Path

from retort.config import ConfigError

ROLES = ("trainer", "rollout", "operator", "scaler")
REDIS_URL, CONTROL_TOKEN, REWARD_TOKEN = "redis-url", "control-token", "reward-token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="where they go; readable by its owner alone")
    parser.add_argument("--redis", required=True, metavar="HOST:PORT", help="where the services find Redis")


def main(args: argparse.Namespace) -> int:
    make_tokens(args.directory)
    make_redis_users(args.directory, args.redis)
    print(f"{args.directory}: one directory for each of redis, reward, {', '.join(ROLES)}")
    return 0


def make_tokens(directory: Path) -> None:
    """What the trainer shows to replicas, and they to the reward service."""
    control = _secret(directory / "trainer" / CONTROL_TOKEN)
    _write(directory / "rollout" / CONTROL_TOKEN, control)
    reward = _secret(directory / "reward" / REWARD_TOKEN)
    _write(directory / "rollout" / REWARD_TOKEN, reward)


def make_redis_users(directory: Path, address: str) -> None:
    """A password for each role, the URL in which it uses it, and the file for the server at `address`."""
    users = files("retort").joinpath("queues", "users.acl").read_text(encoding="utf-8")
    for role in ROLES:
        password = _secret(directory / role / "redis-password")
        _write(directory / role / REDIS_URL, f"redis://{role}:{password}@{address}/0")
        users = users.replace(f" >{role} ", f" #{hashlib.sha256(password.encode()).hexdigest()} ")
    # The digests tell nobody the passwords, and in containers the server is another user.
    _write(directory / "redis" / "users.acl", users, mode=0o644)


def operator_url(directory: Path) -> str:
    """How a command line reaches the Redis whose users were made there. Raises ConfigError."""
    file = directory / "operator" / REDIS_URL
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}. Only who started the run may look into its Redis.") from None


def _secret(file: Path) -> str:
    """What is in the file; a new secret if there is none."""
    if not file.exists():
        # Hexadecimal, so that it is a word in a URL, in a file of users and for a shell.
        _write(file, secrets.token_hex(24))
    return file.read_text(encoding="utf-8").strip()


def _write(file: Path, text: str, mode: int = 0o600) -> None:
    """The whole file or none, at no time readable for more than `mode` says."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.part")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as out:
        out.write(f"{text.rstrip()}\n")
    os.replace(draft, file)
