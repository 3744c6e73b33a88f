"""Ports for services that keep their address when they are started again."""

import contextlib
import errno
import random
import socket
from itertools import chain, repeat
from pathlib import Path

LOWEST = 10_000
KERNEL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
ELSEWHERE = 49_152
"""Where that range begins on other systems (IANA's, RFC 6335)."""


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 that nobody has, below those that the kernel gives to connections.

    One of the kernel's own may be somebody else's connection while its service is down, so that the service cannot
    come back. It may even be a connection to that service: a client that calls the port where nothing listens, and is
    given the same port for its own end, is connected with itself.
    """
    begin = int(KERNEL_RANGE.read_text().split()[0]) if KERNEL_RANGE.exists() else ELSEWHERE
    below = range(LOWEST, begin)
    # Where the kernel's range leaves too few, one of it is better than none; 0 asks for that.
    candidates = chain(random.sample(below, len(below)), repeat(0))
    with contextlib.ExitStack() as stack:
        bound: list[socket.socket] = []
        while len(bound) < count:
            one = stack.enter_context(socket.socket())
            try:
                one.bind(("127.0.0.1", next(candidates)))
                bound.append(one)
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
        return [one.getsockname()[1] for one in bound]
