"""What a process may not do from now on, said to the Linux kernel: no privileges, files, network or other processes.

Three parts, none of which needs root, and none of which can be undone: resource limits; Landlock (files; Linux 5.13
and later); a seccomp filter. docs/reward-security.md says what they do and do not protect from.
"""

import ctypes
import errno
import os
import platform
import resource
import socket
import struct
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from services.reward.checkers import Limits

LARGEST_FILE_BYTES = 1 << 20
"""Also the most that a program can print."""
OPEN_FILES = 64

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_PR_SET_PDEATHSIG = 1
_SECCOMP_MODE_FILTER = 2

# Number of each denied system call on x86_64 and aarch64; -1 where there is none.
_DENIED = {
    # network; io_uring would open sockets without the call
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "io_uring_setup": (425, 425),
    # other processes
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    # owners and modes of files, which Landlock leaves alone
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "fchown": (93, 55),
    "lchown": (94, -1),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
    # what outlives the process or widens what it may do
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "keyctl": (250, 219),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_TGKILL = (234, 131)
_PRLIMIT = (302, 261)
_PRCTL = (157, 167)
_FCNTL = (72, 25)
_IOCTL = (16, 29)
_SOCKETPAIR = (53, 199)
_CLONE_THREAD = 0x00010000
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_FIOSETOWN, _SIOCSPGRP = 0x8901, 0x8902

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


class SandboxError(RuntimeError):
    """The kernel refused to confine the process, which then must not run what it was to be confined for."""


def confine(limits: Limits) -> None:
    """Confine the calling process, which has one thread, for good. Raises SandboxError."""
    _limit_resources(limits)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
    _prctl(_PR_SET_DUMPABLE, 0, "dumpable")
    _close_files()
    _drop_capabilities()
    _filter_system_calls()


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 if it has none, and then a confined process can read files."""
    return max(0, int(_libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def can_confine() -> str:
    """Why this machine cannot confine a process; empty if it can."""
    if platform.system() != "Linux" or platform.machine() not in _AUDIT_ARCH:
        here = f"{platform.system()} on {platform.machine()}"
        return f"worker processes need Linux on {' or '.join(_AUDIT_ARCH)}, not {here}"
    return ""


def limit_cpu(seconds: float) -> None:
    """Let the kernel end this process once it has used so much more CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    at = int(used.ru_utime + used.ru_stime + seconds) + 2
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (at, hard))


def _limit_resources(limits: Limits) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + (limits.memory_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _prctl(option: int, value: int, name: str) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise SandboxError(f"prctl {name}: {os.strerror(ctypes.get_errno())}")


def _drop_capabilities() -> None:
    # A service that runs as root must not pass that on; without execve nothing brings the capabilities back.
    header = struct.pack("Ii", 0x20080522, 0)
    nothing = bytes(24)
    if _libc.capset(header, nothing) != 0:
        raise SandboxError(f"capset: {os.strerror(ctypes.get_errno())}")


def _close_files() -> None:
    """Landlock: read the Python installation and the system's libraries, write nothing, open nothing else."""
    abi = landlock_abi()
    if abi == 0:
        return
    rights = (1 << 13) - 1
    for since, right in ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15)):
        rights |= right if abi >= since else 0
    network = 0b11 if abi >= 4 else 0
    scopes = 0b11 if abi >= 6 else 0
    attributes = struct.pack("QQQ", rights, network, scopes)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _libc.syscall(444, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        raise SandboxError(f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}")
    try:
        for place in _readable():
            _allow_reading(ruleset, place)
        if _libc.syscall(446, ruleset, ctypes.c_uint32(0)) != 0:
            raise SandboxError(f"landlock_restrict_self: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)


def _readable() -> Iterator[str]:
    yield from {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    yield from ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/dev/null", "/dev/zero")
    yield from ("/dev/urandom", "/etc/localtime", "/etc/ld.so.cache")


def _allow_reading(ruleset: int, place: str) -> None:
    execute, read_file, read_dir = 1 << 0, 1 << 2, 1 << 3
    try:
        opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rights = execute | read_file | (read_dir if os.path.isdir(place) else 0)
        rule = struct.pack("=Qi", rights, opened)
        if _libc.syscall(445, ruleset, 1, rule, ctypes.c_uint32(0)) != 0:
            raise SandboxError(f"landlock_add_rule {place}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(opened)


def _filter_system_calls() -> None:
    program = b"".join(_filter(platform.machine(), os.getpid()))
    instructions = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog, 0, 0) != 0:
        raise SandboxError(f"seccomp: {os.strerror(ctypes.get_errno())}")


def _filter(machine: str, pid: int) -> Iterator[bytes]:
    """The filter as classic BPF. Every block ends where the next one begins, so jumps are short."""
    column = list(_AUDIT_ARCH).index(machine)
    refuse = _statement(_RET, _ERRNO | errno.EPERM)
    allow = _statement(_RET, _ALLOW)
    yield _statement(_LD, 4)  # the architecture: system calls of another one have other numbers
    yield _jump(_JEQ, _AUDIT_ARCH[machine], 1, 0)
    yield _statement(_RET, _KILL)
    yield _statement(_LD, 0)
    yield _jump(_JGE, 0x40000000, 0, 1)  # the x32 calls of x86_64
    yield refuse
    for numbers in _DENIED.values():
        if numbers[column] >= 0:
            yield _jump(_JEQ, numbers[column], 0, 1)
            yield refuse
    # "Not implemented" makes the C library fall back to clone, whose flags a filter can see: threads may start.
    yield _jump(_JEQ, _CLONE3[column], 0, 1)
    yield _statement(_RET, _ERRNO | errno.ENOSYS)
    yield _jump(_JEQ, _CLONE[column], 0, 4)
    yield _argument(0)
    yield _jump(_JSET, _CLONE_THREAD, 0, 1)
    yield allow
    yield refuse
    # A file can have an owner, whom the kernel signals for it: SIGKILL to any process of the same user.
    yield from _refuse_second(_FCNTL[column], (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX))
    yield from _refuse_second(_IOCTL[column], (_FIOSETOWN, _SIOCSPGRP))
    # Of a pair of sockets, those for datagrams could send to any other socket of this machine.
    yield _jump(_JEQ, _SOCKETPAIR[column], 0, 4)
    yield _argument(1)
    yield _jump(_JSET, socket.SOCK_DGRAM, 0, 1)
    yield refuse
    yield allow
    # abort() signals its own process; limits may be read and set for itself; its tie to its parent stays.
    for call, value, equal_is_fine in ((_TGKILL, pid, True), (_PRLIMIT, 0, True), (_PRCTL, _PR_SET_PDEATHSIG, False)):
        yield _jump(_JEQ, call[column], 0, 4)
        yield _argument(0)
        yield _jump(_JEQ, value, 0, 1)
        yield allow if equal_is_fine else refuse
        yield refuse if equal_is_fine else allow
    yield allow


def _refuse_second(call: int, values: tuple[int, ...]) -> Iterator[bytes]:
    """Refuse the system call if its second argument is one of the values."""
    yield _jump(_JEQ, call, 0, 3 + len(values))
    yield _argument(1)
    for index, value in enumerate(values):
        yield _jump(_JEQ, value, len(values) - index, 0)
    yield _statement(_RET, _ALLOW)
    yield _statement(_RET, _ERRNO | errno.EPERM)


def _statement(code: int, value: int) -> bytes:
    return struct.pack("HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _argument(index: int) -> bytes:
    """Load the low half of an argument (both architectures are little-endian)."""
    return _statement(_LD, 16 + 8 * index)
