"""Which requests are well-formed, and how large they may be. The same for both faces."""

from collections.abc import Mapping, Sequence

from services.reward.scoring import Item

MAX_ITEMS = 4096
MAX_REQUEST_BYTES = 16 << 20
LONGEST_NAME = 256
"""Characters of an id and of the name of a checker."""
MAX_ENTRIES = 64
"""Of the metadata and of the options of an item, each."""
LONGEST_KEY = 256
LONGEST_VALUE = 65_536


def malformed(items: Sequence[Item]) -> str:
    """The field of the request that is wrong and why; empty if none is."""
    if not items:
        return "items: empty; send at least one item"
    if len(items) > MAX_ITEMS:
        return f"items: {len(items)} are more than {MAX_ITEMS}; send several batches"
    ids = [item.id for item in items]
    if len(set(ids)) == len(ids) and all(ids) and max(map(len, ids)) <= LONGEST_NAME:
        return ""
    first: dict[str, int] = {}
    for index, item_id in enumerate(ids):
        if not item_id:
            return f"items[{index}].id: empty; give every item an id"
        if len(item_id) > LONGEST_NAME:
            return f"items[{index}].id: longer than {LONGEST_NAME} characters"
        if first.setdefault(item_id, index) != index:
            return f"items[{index}].id: {item_id!r} is also the id of items[{first[item_id]}]"
    raise AssertionError("one of them was wrong above")


def too_large(checker: str, metadata: Mapping[str, str], options: Mapping[str, str]) -> str:
    """The field of an item that is too large and why; empty if none is."""
    if len(checker) > LONGEST_NAME:
        return f"checker: longer than {LONGEST_NAME} characters"
    for field, entries in (("metadata", metadata), ("options", options)):
        if len(entries) > MAX_ENTRIES:
            return f"{field}: {len(entries)} entries are more than {MAX_ENTRIES}"
        for key, value in entries.items():
            if len(key) > LONGEST_KEY or len(value) > LONGEST_VALUE:
                limits = f"{LONGEST_KEY} (its key) or {LONGEST_VALUE} characters (its value)"
                return f"{field}: an entry is longer than {limits}"
    return ""
