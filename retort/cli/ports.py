"""Ports for services that keep their address when they are started again."""

import errno
import random
import socket
from collections.abc import Collection
from itertools import chain, islice, repeat
from pathlib import Path

LOWEST = 10_000
KERNEL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
ELSEWHERE = 49_152
"""Where that range begins on other systems (IANA's, RFC 6335)."""


def free_ports(count: int, but: Collection[int] = ()) -> list[int]:
    """Different ports that nobody has, below those that the kernel gives to connections, and none of `but`.

    One of the kernel's own may be somebody else's connection while its service is down, so that the service cannot
    come back. It may even be a connection to that service: a client that calls the port where nothing listens, and is
    given the same port for its own end, is connected with itself.

    Raises OSError where there are not so many.
    """
    begin = int(KERNEL_RANGE.read_text().split()[0]) if KERNEL_RANGE.exists() else ELSEWHERE
    below = [port for port in range(LOWEST, begin) if port not in but]
    # Where the kernel's range leaves too few, one of it is better than none; 0 asks for that.
    candidates = chain(random.sample(below, len(below)), repeat(0, 10 * count))
    bound = list(islice(filter(None, (_bound(port, but) for port in candidates)), count))
    try:
        if len(bound) < count:
            raise OSError(errno.EADDRINUSE, f"this machine has no {count} free ports")
        return [one.getsockname()[1] for one in bound]
    finally:
        for one in bound:
            one.close()


def _bound(port: int, but: Collection[int]) -> socket.socket | None:
    """A socket at this port of all addresses; None if somebody has it at one of them, or it is one of `but`."""
    one = socket.socket()
    try:
        one.bind(("", port))
        if one.getsockname()[1] not in but:
            return one
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
    one.close()
    return None
