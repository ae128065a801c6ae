"""The machine a measurement was taken on: facts for the record, free memory, its own speed."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from manyheads.choose.available import available_memory, total_memory

__all__ = [
    "available_memory",
    "keep_freed_memory",
    "machine_facts",
    "matmul_rate",
    "set_threads",
    "total_memory",
]


def machine_facts() -> dict[str, Any]:
    """Return what a result depends on, as plain JSON types.

    Processor, cores, threads, memory, versions and libraries; no host, user or path names.
    """
    import numpy

    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "usable_cores": usable_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": total_memory(),
        "available_bytes": available_memory(),
        "system": platform.system(),
        "system_release": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "threads_variables": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
            if name in os.environ
        },
        "libraries": library_versions(),
        "accelerator": accelerator_name(),
    }


def cpu_name() -> str:
    """Return the processor's name as its maker spells it, or the architecture."""
    system = platform.system()
    if system == "Linux":
        name = _name_from_cpuinfo(_read("/proc/cpuinfo"))
    elif system == "Darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        name = platform.processor()
    return name or platform.processor() or platform.machine()


def _name_from_cpuinfo(text: str) -> str:
    fields = dict(re.findall(r"^([^\t:\n]+?)\s*:\s*(.*)$", text, flags=re.MULTILINE))
    for key in ("model name", "Model", "cpu model", "Processor", "cpu"):
        if fields.get(key):
            return re.sub(r"\s+", " ", fields[key]).strip()
    # aarch64 gives numbers only: who implemented it and which part it is.
    if "CPU implementer" in fields:
        return f"implementer {fields['CPU implementer']} part {fields.get('CPU part', 'unknown')}"
    return ""


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, within the cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cpu_quota(_read("/sys/fs/cgroup/cpu.max"))
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cpu_quota(text: str) -> float | None:
    parts = text.split()
    if len(parts) != 2 or parts[0] == "max":
        return None
    return int(parts[0]) / int(parts[1])


def library_versions() -> dict[str, str]:
    """Return the numerical libraries that torch was built with, by name."""
    text = torch.__config__.show()
    patterns = {
        "blas": r"BLAS_INFO=(\w+)",
        "mkl": r"Math Kernel Library Version (\S+)",
        "onednn": r"MKL-DNN v(\S+)",
        "openmp": r"OpenMP (\d+)",
    }
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return {name: match.group(1) for name, match in found.items() if match}


def accelerator_name() -> str | None:
    """Return the name of the accelerator that torch can use, or None."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    if torch.backends.mps.is_available():
        return "mps"
    return None


def matmul_rate(dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> float:
    """Measure this machine's matrix-product rate in FLOP/s, with the threads in force.

    The best call over square products of several sizes; sizes whose first call alone would
    overrun the time are left out.

    Raises:
        ValueError: seconds is not positive, or the dtype is not a floating-point one.
    """
    if seconds <= 0:
        raise ValueError(f"seconds {seconds} must be positive")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} has no matrix-product rate here: give a floating one")
    sizes = (256, 512, 1024, 2048)
    best = 0.0
    for size in sizes:
        flops = 2 * size**3
        if best and flops / best > seconds / len(sizes):
            break
        a = torch.randn(size, size, dtype=torch.float32).to(dtype)
        b = torch.randn(size, size, dtype=torch.float32).to(dtype)
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        stop = time.perf_counter() + seconds / len(sizes)
        while True:
            begin = time.perf_counter()
            torch.mm(a, b, out=out)
            end = time.perf_counter()
            best = max(best, flops / max(end - begin, 1e-9))
            if end >= stop:
                break
    return best


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed blocks for the next allocation, for the rest of the process.

    glibc gives every block of 32 MB or more back to the system at once and gets it back page by
    page, zeroed, which takes longer than the arithmetic of a linear mechanism. With this on the
    process holds on to the most that it ever used.

    Returns:
        Whether the C library took it: glibc does, others have no such setting.
    """
    if platform.system() != "Linux":
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The numbers are M_TRIM_THRESHOLD, M_MMAP_MAX: never trim, never map a block by itself.
    return bool(mallopt(-1, (1 << 31) - 1)) and bool(mallopt(-4, 0))


@contextmanager
def set_threads(count: int | None) -> Iterator[int]:
    """Use ``count`` threads inside operators for a block, then as many as before.

    Args:
        count: threads; None leaves them as they are.

    Yields:
        The number of threads in force.

    Raises:
        ValueError: count is below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"threads {count} must be at least 1")
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _output(*command: str) -> str:
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
