"""Fingerprints of what has to be the same on every machine: weights, tokenizer, chat template."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from retort.cli import preflight
from retort.cli.machine.finding import Answer, failed, ok, skipped
from retort.config import RunConfig

SAMPLE = 2**20
"""Of each file of weights its size, first and last so many bytes: a few milliseconds for a model of any size."""


def weights(config: RunConfig) -> Answer:
    preflight.check_model(config.model.path)
    directory = Path(config.model.path)
    if not directory.is_dir():
        return skipped(f"{config.model.path} is on the hub; its files are checked once they are here")
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(_ends(file))
    size = sum(file.stat().st_size for file in files)
    return ok(f"{digest.hexdigest()[:16]}, {size / 2**20:,.1f} MiB (sizes, first and last MiB)")


def tokenizer(config: RunConfig) -> Answer:
    file = Path(config.model.path, "tokenizer.json")
    if not file.is_file():
        return skipped(f"{file} is not there; transformers makes the tokenizer from other files, or from the hub")
    content = file.read_bytes()
    tokens = {*json.loads(content)["model"].get("vocab", {}).values()} if content.startswith(b"{") else set()
    known = json.loads(Path(config.model.path, "config.json").read_bytes())["vocab_size"]
    if isinstance(next(iter(tokens), 0), int) and tokens and max(tokens) >= known:
        return failed(
            f"it has token {max(tokens)}, and the model knows {known} tokens",
            "The tokenizer is of another model: take all files of model.path from one source.",
        )
    return ok(f"{hashlib.sha256(content).hexdigest()[:16]}")


def chat_template(config: RunConfig) -> Answer:
    directory = Path(config.model.path)
    if not directory.is_dir():
        return skipped("comes with the tokenizer from the hub")
    file, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    text = file.read_text() if file.is_file() else ""
    if not text and settings.is_file():
        text = str(json.loads(settings.read_bytes()).get("chat_template", ""))
    if not text:
        return failed("there is none", "Take an instruction-tuned model, or put a chat_template.jinja beside it.")
    return ok(hashlib.sha256(text.encode()).hexdigest()[:16])


def _ends(file: Path) -> bytes:
    with file.open("rb") as content:
        first = content.read(SAMPLE)
        content.seek(max(0, file.stat().st_size - SAMPLE))
        return first + content.read(SAMPLE)


CHECKS: Mapping[str, Callable[[RunConfig], Answer]] = MappingProxyType(
    {"weights": weights, "tokenizer": tokenizer, "chat template": chat_template}
)
