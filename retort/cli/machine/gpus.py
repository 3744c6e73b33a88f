"""Driver, GPUs, what connects them, and whether NCCL gets a message around."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from retort.cli.machine.finding import Answer, failed, ok, skipped, warning
from retort.cli.process_table import assign_gpus, visible_gpus
from retort.config import MissingDependencyError, RunConfig

NO_GPU = "no GPU on this machine: the run uses the CPU"
OLDEST_DRIVER = 580
"""CUDA 13, of which torch's wheel is built, asks for it."""
BUSY_MIB = 1024
NCCL_DEADLINE_S = 25.0
LOOPBACK = """
import os, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
ones = torch.ones(2**20, device="cuda")
dist.all_reduce(ones)
assert bool((ones == dist.get_world_size()).all()), f"sum is {ones[0].item()}, not {dist.get_world_size()}"
dist.destroy_process_group()
"""
"""Every rank adds 4 MiB of ones up with all others."""


def driver(_: RunConfig) -> Answer:
    if not visible_gpus():
        return skipped(NO_GPU)
    version = _ask("driver_version")[0][0]
    if int(version.partition(".")[0]) < OLDEST_DRIVER:
        return failed(f"driver {version}", f"Install NVIDIA's driver {OLDEST_DRIVER} or newer.")
    return ok(f"driver {version}")


def gpus(config: RunConfig) -> Answer:
    visible = visible_gpus()
    if not visible:
        return skipped(NO_GPU)
    assign_gpus(visible, config.trainer.ranks, config.rollout)  # raises ConfigError if there are too few
    return describe_gpus(_ask("index", "name", "memory.total", "memory.used"), visible)


def describe_gpus(rows: Sequence[Sequence[str]], visible: Sequence[str]) -> Answer:
    """`rows`: index, name, total MiB, used MiB of every GPU of the machine."""
    ours = [row for row in rows if row[0] in visible] or rows  # CUDA_VISIBLE_DEVICES may also name UUIDs
    busy = [f"GPU {index} ({used} MiB)" for index, _, _, used in ours if int(used) > BUSY_MIB]
    names = ", ".join(sorted({f"{name} with {int(total) / 1024:.0f} GiB" for _, name, total, _ in ours}))
    if busy:
        return failed(
            f"used by somebody else: {', '.join(busy)}",
            "`nvidia-smi` names the process; end it, or leave the GPU out of CUDA_VISIBLE_DEVICES.",
        )
    return ok(f"{len(ours)} × {names}")


def nvlink(config: RunConfig) -> Answer:
    if config.trainer.ranks < 2 or len(visible_gpus()) < 2:
        return skipped("fewer than two GPUs train" if visible_gpus() else NO_GPU)
    training = visible_gpus()[: config.trainer.ranks]
    if not all(gpu.isdigit() for gpu in training):
        return skipped("CUDA_VISIBLE_DEVICES names GPUs otherwise than by number")
    return describe_links(_output(["nvidia-smi", "topo", "-m"]), training)


def describe_links(matrix: str, training: Sequence[str]) -> Answer:
    """`matrix`: what `nvidia-smi topo -m` prints; NV18 is a pair with 18 links."""
    plain = re.sub(r"\x1b\[\d*m", "", matrix)
    header, *rows = [line.split() for line in plain.splitlines() if "GPU" in line]
    columns = [word for word in header if word.startswith("GPU") and word[3:].isdigit()]
    links = {row[0]: dict(zip(columns, row[1:], strict=False)) for row in rows}
    pairs = itertools.combinations([f"GPU{gpu}" for gpu in training], 2)
    apart = [f"{a}-{b} ({links[a][b]})" for a, b in pairs if not links[a][b].startswith("NV")]
    if apart:
        return warning(
            f"not joined by NVLink: {', '.join(apart[:4])}{' …' if len(apart) > 4 else ''}",
            "Gradients and weights go over PCIe and steps are longer. Train on GPUs that are joined, if there are any.",
        )
    return ok("every pair of training GPUs is joined")


def nccl(config: RunConfig) -> Answer:
    """An all-reduce over the GPUs that train."""
    visible = visible_gpus()
    if not visible:
        return skipped(NO_GPU)
    ranks = min(config.trainer.ranks, len(visible))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program = [*command, "--no-python", sys.executable, "-c", LOOPBACK]
    fix = "NCCL_DEBUG=INFO tells more; look at /dev/shm, `ulimit -l`, NCCL_SOCKET_IFNAME and `dmesg` (Xid)."
    try:
        ran = subprocess.run(program, capture_output=True, text=True, timeout=NCCL_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        return failed(f"{ranks} ranks have not added 4 MiB up within {NCCL_DEADLINE_S:g} s", fix)
    if ran.returncode:
        reason = next((line for line in reversed(ran.stderr.splitlines()) if "Error" in line), "no reason given")
        return failed(f"{ranks} ranks could not add 4 MiB up: {reason.strip()}", fix)
    return ok(f"{ranks} ranks added 4 MiB up")


def _ask(*fields: str) -> list[list[str]]:
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    return [[cell.strip() for cell in line.split(",")] for line in _output(query).splitlines() if line.strip()]


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        fix = "Install NVIDIA's driver; in a container, its toolkit."
        raise MissingDependencyError(f"{command[0]}: {error}. {fix}") from None


CHECKS: Mapping[str, Callable[[RunConfig], Answer]] = MappingProxyType(
    {"driver": driver, "GPUs": gpus, "NVLink": nvlink, "NCCL": nccl}
)
