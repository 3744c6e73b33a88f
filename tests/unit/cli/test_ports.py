"""Ports for services that keep their address."""

import socket
from pathlib import Path

import pytest

from retort.cli import ports


@pytest.fixture
def kernel_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ports, "KERNEL_RANGE", tmp_path / "ip_local_port_range")
    return tmp_path / "ip_local_port_range"


def test_they_are_different_and_none_is_the_kernels_to_give(kernel_range: Path) -> None:
    kernel_range.write_text("20000\t60999\n")
    found = ports.free_ports(50)
    assert len(set(found)) == 50
    assert all(10_000 <= port < 20_000 for port in found)


def test_one_that_somebody_has_is_left_to_them(kernel_range: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_range.write_text("30000 60999")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.free_ports(1)[0]))
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "LOWEST", port)
        kernel_range.write_text(f"{port + 1} 60999")
        [other] = ports.free_ports(1)
    assert other != port


def test_those_that_a_run_file_names_are_left_out(kernel_range: Path) -> None:
    kernel_range.write_text("10003 60999")
    assert not {10_000, 10_001} & {port for _ in range(30) for port in ports.free_ports(1, but=[10_000, 10_001])}


def test_they_are_left_out_of_what_the_kernel_gives_too(kernel_range: Path) -> None:
    kernel_range.write_text("1024 65535")
    with pytest.raises(OSError, match="no 1 free ports"):
        ports.free_ports(1, but=range(65_536))


def test_a_machine_without_so_many_says_so(kernel_range: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_range.write_text("10000 60999")
    monkeypatch.setattr(ports, "_bound", lambda _, but: None)
    with pytest.raises(OSError, match="this machine has no 3 free ports"):
        ports.free_ports(3)


def test_where_the_kernel_gives_all_it_gives_these_too(kernel_range: Path) -> None:
    kernel_range.write_text("1024 65535")
    assert all(port >= 1024 for port in ports.free_ports(3))


def test_without_linux_the_range_begins_where_rfc_6335_has_it(kernel_range: Path) -> None:
    assert not kernel_range.exists()
    assert all(10_000 <= port < 49_152 for port in ports.free_ports(3))
