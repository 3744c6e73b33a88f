"""`retort prepare sciknoweval`: the questions of the published run, split as there and verified by checksum.

Upstream is the data set `hicai-zju/SciKnowEval` (MIT). Filter, wording and split are those of lasgroup/SDPO
(Apache-2.0), whose files the published run used. What is written equals those files byte for byte, so a checksum
decides whether the questions are the right ones, wherever they came from.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retort.config import ConfigError, MissingDependencyError

Row = dict[str, Any]

DOMAINS = ("biology", "chemistry", "material", "physics")
HUB_REPOSITORY = "hicai-zju/SciKnowEval"
HUB_FILE = "data/v2/sciknoweval_test_v2.jsonl"
LEVEL = "L3"
TYPES = ("mcq-4-choices", "mcq-2-choices")
TEST_SHARE = 0.1
SPLIT_SEED = 42
TRAIN_FILE, TEST_FILE = "train.jsonl", "test.jsonl"

CHECKSUMS = {
    "chemistry": {
        TRAIN_FILE: "dc841dc92a16a6af3944336ecd887e80907bc9244f2bd51cd2e3869959a84029",
        TEST_FILE: "772adb9f2bdb1bbc2a542f350b55a1b23091fa98e793f5e24c5dba410ce299bf",
    }
}
"""sha256 of the published run's files, for the domains where they are known."""

SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing else. \
Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""
"""The system message, the line breaks at its ends included."""

FIELDS = ("idx", "kind", "dataset", "answer", "elo", "prompt", "description", "tests", "embedding", "system")
UPSTREAM_FIELDS = ("question", "choices", "answerKey", "type", "domain", "details")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=["sciknoweval"], help="which data set")
    parser.add_argument("--domain", choices=DOMAINS, default="chemistry", help="default: chemistry")
    parser.add_argument(
        "--source",
        default="hub",
        metavar="FILE|DIR|hub",
        help="a directory with train.json and test.json; a file with all questions of the domain, or of the upstream "
        f"data set; or `hub` (default), which downloads {HUB_REPOSITORY}",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: data/sciknoweval/DOMAIN")


def main(args: argparse.Namespace) -> int:
    train, test = read_split(args.source, args.domain)
    files = {TRAIN_FILE: encode(train), TEST_FILE: encode(test)}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if problem := checksum_problem(sums, args.domain):
        raise ConfigError(f"--source {args.source}: {problem} Nothing was written.")
    out = args.out or Path("data/sciknoweval", args.domain)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    (out / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    for name, rows in ((TRAIN_FILE, train), (TEST_FILE, test)):
        print(f"{out / name}  {len(rows):,} questions  sha256 {sums[name]}")
    if args.domain in CHECKSUMS:
        print("Verified: these are the questions of the published run.")
    else:
        print(f"Not verified: no checksum is known for {args.domain}. The ones above are kept in SHA256SUMS.")
    return 0


def checksum_problem(sums: Mapping[str, str], domain: str) -> str:
    """Why these are not the published run's files, or an empty string."""
    wrong = [
        f"{name} has sha256 {sums[name]} instead of {expected}"
        for name, expected in CHECKSUMS.get(domain, {}).items()
        if sums[name] != expected
    ]
    return f"not the {domain} questions of the published run: {'; '.join(wrong)}." if wrong else ""


def read_split(source: str, domain: str) -> tuple[list[Row], list[Row]]:
    """Training and test questions. Raises ConfigError when the source cannot be read or holds something else."""
    path = _download() if source == "hub" else Path(source)
    if path.is_dir():
        train, test = (_columns(file, _read(file), FIELDS) for file in (_either(path, "train"), _either(path, "test")))
        return train, test
    rows = _read(path)
    if "choices" not in rows[0]:
        return split(_columns(path, rows, FIELDS))
    questions = convert(_columns(path, rows, UPSTREAM_FIELDS), domain)
    if not questions:
        raise ConfigError(f"{path}: no multiple-choice question of {domain}, level {LEVEL}.")
    return split(questions)


def convert(upstream: Sequence[Row], domain: str) -> list[Row]:
    """The domain's multiple-choice questions of level L3, as the published run asks them."""
    chosen = [
        row
        for row in upstream
        if row["domain"].lower() == domain and row["details"]["level"] == LEVEL and row["type"] in TYPES
    ]
    return [_question(index, row) for index, row in enumerate(chosen)]


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Training and test questions, dealt as the `datasets` library's `train_test_split(0.1, seed=42)` deals them."""
    try:
        import numpy as np
    except ImportError:
        raise MissingDependencyError("splitting the questions needs numpy. Run `make setup`.") from None
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    num_test = math.ceil(TEST_SHARE * len(rows))
    return [rows[i] for i in order[num_test:]], [rows[i] for i in order[:num_test]]


def encode(rows: Sequence[Row]) -> bytes:
    """JSON Lines in the spelling of pandas, which wrote the published run's files."""
    lines = (json.dumps(row, separators=(",", ":")).replace("/", "\\/") for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


def _question(index: int, row: Row) -> Row:
    choices = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    options = "\n".join(f"{label}: {text}" for label, text in choices)
    return {
        "idx": index,
        "kind": "mcq",
        "dataset": "sciknoweval",
        "answer": row["answerKey"],
        "elo": 1500,
        "prompt": f"{row['question']}\n\n{options}\nPlease reason step by step.",
        "description": f"{row['question']} The solution will be evaluated in a mcq environment.",
        "tests": "-",
        "embedding": [],
        "system": SYSTEM,
    }


def _either(directory: Path, name: str) -> Path:
    files = [file for ending in ("json", "jsonl") if (file := directory / f"{name}.{ending}").is_file()]
    if not files:
        raise ConfigError(f"{directory}: neither {name}.json nor {name}.jsonl is there.")
    return files[0]


def _read(path: Path) -> list[Row]:
    """The objects of a JSON array or of JSON Lines; at least one."""
    try:
        text = path.read_text(encoding="utf-8")
        # Not splitlines: a question may hold a line separator of Unicode.
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path}: neither a JSON array nor JSON Lines: {error}.") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: expected JSON objects, one for each question.")
    return list(rows)


def _columns(path: Path, rows: Sequence[Row], fields: Sequence[str]) -> list[Row]:
    """The rows with these fields, in this order."""
    for number, row in enumerate(rows, start=1):
        if lacking := [field for field in fields if field not in row]:
            raise ConfigError(f"{path}, question {number}: not of SciKnowEval: {', '.join(lacking)} missing.")
    return [{field: row[field] for field in fields} for row in rows]


def _download() -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingDependencyError("--source hub needs huggingface_hub. Run `make setup`.") from None
    try:
        return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--source hub: cannot get {HUB_FILE} of {HUB_REPOSITORY}: {reason} "
            "Name a local copy: that file, or train.json and test.json of github.com/lasgroup/SDPO."
        ) from None
