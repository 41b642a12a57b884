"""The machine a process runs on: which process it is of several, which device and precision suit it."""

import os
import sys

import torch


def is_main_process() -> bool:
    """Whether this is the first of all processes of a run, on all machines: the one that writes.

    torchrun numbers them by RANK; by their place on one machine (LOCAL_RANK) several are the first.
    """
    names = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in (*names, "LOCAL_RANK"))


def started_by_others() -> bool:
    """Whether this is one of several processes of a run that were all started from outside (torchrun)."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


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


def pick_device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
