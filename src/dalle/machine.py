"""The machine a process runs on: which process it is of several, which device and precision suit it."""

import os
import statistics
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.errors import UserError


def is_main_process() -> bool:
    """Whether this is the first of all processes of a run, on all machines: the one that writes.

    torchrun numbers them by RANK; by their place on one machine (LOCAL_RANK) several are the first.
    """
    names = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in (*names, "LOCAL_RANK"))


def started_by_others() -> bool:
    """Whether this is one of several processes of a run that were started from outside (torchrun, srun)."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1")) > 1
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_PORT")


def check_ranks() -> None:
    """Raises UserError where the environment, which says which process this is, holds no numbers."""
    for name in RANKS:
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={os.environ[name]!r} is no number: unset it, or leave it to torchrun")


def fast_in_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware (AVX512-BF16 or AMX on a CPU)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def peak_memory() -> int:
    """The most bytes that this process has had in main memory; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


WITHOUT_FLOAT64 = {"mps"}  # kinds of devices


def precise(values: Tensor, device: torch.device | None = None) -> Tensor:
    """In float64, on the device; in float32 where it has no float64."""
    device = device or values.device
    return values.to(device, torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64)


def cores() -> int:
    """Processor cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def pick_device(name: str) -> str:
    """Of auto, cpu or cuda. Raises UserError where there is no GPU that was asked for."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("device=cuda was asked for but PyTorch sees no GPU; use device=cpu")
    return ("cuda" if there else "cpu") if name == "auto" else name


def settle_threads() -> None:
    """Uses fewer threads of a CPU where other processes work on it, as few as are fastest now.

    Threads wait for each other at the end of each small operation. One that has lost its core lets all others
    wait, so that two threads beside one busy process are slower than one. Nothing is tried, and nothing
    changes, on a quiet machine or where OMP_NUM_THREADS says how many there shall be.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg") or os.getloadavg()[0] < 0.5:
        return
    best = seconds_of_small_operations()
    while threads > 1:
        torch.set_num_threads(threads // 2)
        if (seconds := seconds_of_small_operations()) > best / 1.2:  # 1.2: worth other last bits
            torch.set_num_threads(threads)
            return
        threads, best = threads // 2, seconds


def seconds_of_small_operations(tries: int = 5) -> float:
    """What a layer of a small network takes, by the median."""
    image, weight = torch.zeros(16, 32, 32, 32), torch.zeros(32, 32, 3, 3)
    times = []
    with torch.inference_mode():
        for _ in range(tries):
            started = time.perf_counter()
            for _ in range(4):  # longer than a core is taken away for
                F.silu(F.group_norm(F.conv2d(image, weight, padding=1), 8)).mul_(2).mean((2, 3))
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def pick_compile(name: str, device: str) -> str:
    """How drawing is sped up: CUDA graphs cost a second, compiling up to minutes."""
    return ("graphs" if device == "cuda" else "none") if name == "auto" else name
