"""A plug-in of pytest (`-p tests.chaos.again`): everything that was selected runs 20 times, in one process."""

import pytest

TIMES = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Collected anew each time: an item that has run cannot run again.
    items[:] = [
        again for one in items for _ in range(TIMES) for again in one.parent.collect() if again.nodeid == one.nodeid
    ]
