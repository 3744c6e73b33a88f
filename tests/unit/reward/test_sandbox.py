"""The filter of system calls, read as the kernel would read it; what it achieves is in test_program."""

import errno
import struct

import pytest

from services.reward.isolation.sandbox import _filter

ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, ABSENT = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(machine: str, number: int, argument: int = 0, second: int = 0, architecture: int | None = None) -> int:
    """Interprets the classic BPF for one system call."""
    program = [struct.unpack("HBBI", one) for one in _filter(machine, pid=42)]
    words = {0: number, 4: architecture or ARCHITECTURE[machine], 16: argument, 24: second}
    position = accumulator = 0
    while True:
        code, if_true, if_false, value = program[position]
        position += 1
        match code:
            case 0x20:
                accumulator = words[value]
            case 0x06:
                return value
            case 0x15 | 0x35 | 0x45:
                taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}
                position += if_true if taken[code] else if_false


@pytest.mark.parametrize(
    ("machine", "read", "socket", "execve", "clone", "clone3", "tgkill", "prlimit", "prctl"),
    [("x86_64", 0, 41, 59, 56, 435, 234, 302, 157), ("aarch64", 63, 198, 221, 220, 435, 131, 261, 167)],
)
def test_what_is_allowed_and_what_is_not(
    machine: str, read: int, socket: int, execve: int, clone: int, clone3: int, tgkill: int, prlimit: int, prctl: int
) -> None:
    assert verdict(machine, read) == ALLOW
    assert verdict(machine, socket) == verdict(machine, execve) == REFUSE
    assert verdict(machine, clone3) == ABSENT
    assert (verdict(machine, clone, 17), verdict(machine, clone, 0x3D0F00)) == (REFUSE, ALLOW)  # a process, a thread
    assert (verdict(machine, tgkill, 42), verdict(machine, tgkill, 43)) == (ALLOW, REFUSE)
    assert (verdict(machine, prlimit, 0), verdict(machine, prlimit, 1)) == (ALLOW, REFUSE)
    assert (verdict(machine, prctl, 1), verdict(machine, prctl, 15)) == (REFUSE, ALLOW)
    assert verdict(machine, read, architecture=0x40000003) == KILL


@pytest.mark.parametrize(
    ("machine", "fcntl", "ioctl", "socketpair", "connect", "bind"),
    [("x86_64", 72, 16, 53, 42, 49), ("aarch64", 25, 29, 199, 203, 200)],
)
def test_no_file_gets_an_owner_to_signal_and_no_socket_another_end(
    machine: str, fcntl: int, ioctl: int, socketpair: int, connect: int, bind: int
) -> None:
    get_flags, set_owner, set_signal, set_owner_ex = 3, 8, 10, 15
    assert verdict(machine, fcntl, second=get_flags) == ALLOW
    assert {verdict(machine, fcntl, second=one) for one in (set_owner, set_signal, set_owner_ex)} == {REFUSE}
    assert verdict(machine, ioctl, second=0x5401) == ALLOW
    assert verdict(machine, ioctl, second=0x8901) == verdict(machine, ioctl, second=0x8902) == REFUSE
    stream, datagram, raw, packets = (kind | 0o2004000 for kind in (1, 2, 3, 5))  # not blocking, closed by exec
    assert verdict(machine, socketpair, second=stream) == verdict(machine, socketpair, second=packets) == ALLOW
    assert verdict(machine, socketpair, second=datagram) == verdict(machine, socketpair, second=raw) == REFUSE
    assert verdict(machine, connect) == verdict(machine, bind) == REFUSE
