"""`retort score`: a file of items through the reward service, a file of results out."""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.progress import Progress

from retort.client import AsyncRewardClient, Item, Result, RewardServiceError
from retort.config import ConfigError

EPILOG = """\
Each line of INPUT is {"id": "1", "checker": "mcq", "completion": "...", "answer": "B"}, with "options" and
"metadata" if wanted; without "id" the number of the line is the id. Each line of OUTPUT is the item's id and
its result. An interrupted call is resumed by calling again: lines of OUTPUT are kept and their items skipped.
Numbers are taken as they are written: 1.50 is the text 1.50. Blank lines are skipped.
Exit code 1: at least one item is unscorable; 2: a line or a file is wrong; 4: the service cannot be reached, or
ended the call.
"""


CONNECT_S = 10.0
RESULT = b'{"id": '
"""How a line of OUTPUT begins."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("input", type=Path, help="JSON Lines file of items")
    parser.add_argument("output", type=Path, help="JSON Lines file of results, written or continued")
    parser.add_argument("--address", default="127.0.0.1:50051", help="of the reward service (default %(default)s)")
    parser.add_argument("--checker", default="", help="for the items that name none")
    parser.add_argument("--token-file", type=Path, help="file whose first line is the bearer token")
    parser.add_argument("--ca-file", default="", help="PEM file for TLS")


def main(args: argparse.Namespace) -> int:
    try:
        done = _finished(args.output)
        items = [item for item in _read_items(args.input, args.checker) if item.id not in done]
        token = _token(args.token_file) if args.token_file else ""
        asyncio.run(_score(items, len(done), args.output, args.address, token, args.ca_file))
    except RewardServiceError as error:
        print(f"retort score: {error}. {args.output} keeps what is done; call again to go on.", file=sys.stderr)
        return 4
    except OSError as error:
        raise ConfigError(f"{error.filename or args.output}: {error.strerror}.") from None
    with args.output.open(encoding="utf-8") as lines:
        results = [json.loads(line) for line in lines]
    rewards = [result["reward"] for result in results if "reward" in result]
    mean = f", mean reward {sum(rewards) / len(rewards):.4f}" if rewards else ""
    print(f"{len(results)} results, {len(results) - len(rewards)} unscorable{mean}: {args.output}")
    return 0 if len(rewards) == len(results) else 1


def _token(file: Path) -> str:
    words = file.read_bytes().split()
    if not words:
        raise ConfigError(f"{file}: is empty; its first word is the token.")
    return words[0].decode(errors="replace")


async def _score(items: list[Item], done: int, output: Path, address: str, token: str, ca_file: str) -> None:
    # By lines, so that whatever ends this process keeps what is done.
    with (
        output.open("a", buffering=1, encoding="utf-8") as lines,
        Progress(disable=not sys.stderr.isatty()) as progress,
    ):
        bar = progress.add_task("scoring", total=done + len(items), completed=done)
        async with AsyncRewardClient(address, timeout_s=CONNECT_S, token=token, ca_file=ca_file) as client:
            async for result in client.stream(items):
                lines.write(json.dumps(_line(result), ensure_ascii=False) + "\n")
                progress.advance(bar)


def _line(result: Result) -> dict[str, Any]:
    outcome: dict[str, Any] = {"unscorable": {"reason": result.unscorable}}
    if result.reward is not None:
        outcome = {
            "reward": result.reward,
            "correct": result.correct,
            "parsed": result.parsed,
            "format_ok": result.format_ok,
            "rule": result.rule,
            "explanation": result.explanation,
        }
    return {"id": result.id, **outcome, "checker": result.checker, "seconds": result.seconds}


def _finished(output: Path) -> set[str]:
    """Ids that have a result already. A last line that an interruption cut short is removed."""
    if not output.exists():
        return set()
    ids: set[str] = set()
    whole = 0
    *lines, last = output.read_bytes().split(b"\n")
    for line in lines:
        try:
            ids.add(json.loads(line)["id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if line is not lines[-1] or last or not line.startswith(RESULT):
                raise ConfigError(f"{output}: not a file of results: {error}. Name another, or remove it.") from None
            break
        whole += len(line) + 1
    if not last.startswith(RESULT[: len(last)]):
        raise ConfigError(f"{output}: not a file of results: its last line has no end. Name another, or remove it.")
    os.truncate(output, whole)
    return ids


def _read_items(source: Path, checker: str) -> list[Item]:
    try:
        # Not splitlines(): JSON may hold U+2028 and its like as they are, and they end no line of a file.
        lines = source.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: {error}.") from None
    items: list[Item] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(line, number, checker)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source}, line {number}: {error}.") from None
        if first.setdefault(item.id, number) != number:
            raise ConfigError(f"{source}, line {number}: id {item.id!r} is also that of line {first[item.id]}.")
        items.append(item)
    return items


def _item(line: str, number: int, checker: str) -> Item:
    """Raises ValueError for what is no item. Numbers are taken as they are written: 1.50 is the text 1.50."""
    values = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    for field in ("completion", "answer"):
        if field not in values:
            raise ValueError(f"has no {field}")
    item = Item(
        checker=_text(values.get("checker") or checker, "checker"),
        completion=_text(values["completion"], "completion"),
        answer=_text(values["answer"], "answer"),
        options=_texts(values.get("options", {}), "options"),
        metadata=_texts(values.get("metadata", {}), "metadata"),
        id=_text(values.get("id", str(number)), "id"),
    )
    if not item.checker:
        raise ValueError("names no checker, and there is no --checker")
    if not item.id:
        raise ValueError("id is empty; leave it out to have the number of the line")
    return item


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field} is {json.dumps(value)[:40]}; give a text or a number")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field} has a lone surrogate, which is no text") from None
    return value


def _texts(values: Any, field: str) -> dict[str, str]:
    if not isinstance(values, dict):
        raise ValueError(f"{field} is {json.dumps(values)[:40]}; give an object of texts")
    return {_text(key, field): _text(value, f"{field}.{key}") for key, value in values.items()}
