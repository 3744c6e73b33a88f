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
Exit code 1: at least one item is unscorable.
"""


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
    done = _finished(args.output)
    items = [item for item in _read_items(args.input, args.checker) if item.id not in done]
    token = args.token_file.read_text().split()[0] if args.token_file else ""
    try:
        asyncio.run(_score(items, len(done), args.output, args.address, token, args.ca_file))
    except RewardServiceError as error:
        print(f"retort score: {error}. {args.output} keeps what is done; call again to go on.", file=sys.stderr)
        return 4
    with args.output.open(encoding="utf-8") as lines:
        results = [json.loads(line) for line in lines]
    rewards = [result["reward"] for result in results if "reward" in result]
    mean = f", mean reward {sum(rewards) / len(rewards):.4f}" if rewards else ""
    print(f"{len(results)} results, {len(results) - len(rewards)} unscorable{mean}: {args.output}")
    return 0 if len(rewards) == len(results) else 1


async def _score(items: list[Item], done: int, output: Path, address: str, token: str, ca_file: str) -> None:
    # By lines, so that whatever ends this process keeps what is done.
    with (
        output.open("a", buffering=1, encoding="utf-8") as lines,
        Progress(disable=not sys.stderr.isatty()) as progress,
    ):
        bar = progress.add_task("scoring", total=done + len(items), completed=done)
        async with AsyncRewardClient(address, token=token, ca_file=ca_file) as client:
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
    text = output.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(output, len(whole))
    try:
        return {json.loads(line)["id"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{output}: not a file of results: {error}. Name another, or remove it.") from None


def _read_items(source: Path, checker: str) -> list[Item]:
    try:
        # Not splitlines(): JSON may hold U+2028 and its like as they are, and they end no line of a file.
        lines = source.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: {error}.") from None
    items: list[Item] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            item = Item(
                checker=values.get("checker", checker),
                completion=values["completion"],
                answer=str(values["answer"]),
                options=values.get("options", {}),
                metadata=values.get("metadata", {}),
                id=str(values.get("id", number)),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{source}, line {number}: {type(error).__name__}: {error}.") from None
        if not item.checker:
            raise ConfigError(f"{source}, line {number}: names no checker, and there is no --checker.")
        if first.setdefault(item.id, number) != number:
            raise ConfigError(f"{source}, line {number}: id {item.id!r} is also that of line {first[item.id]}.")
        items.append(item)
    return items
