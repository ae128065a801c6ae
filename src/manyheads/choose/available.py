"""How much memory a process may still take: the machine's, the container's, the shell's limit."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

__all__ = ["available_memory", "total_memory"]

# What a limit of "none" looks like in cgroup v1: the largest signed page count.
_UNLIMITED = 1 << 60


def total_memory() -> int:
    """Return the bytes of memory of the machine, or of the container if that is less."""
    limits = [_physical_memory(), *(limit for limit, _ in _cgroup_limits(Path("/")))]
    return min(limits)


def available_memory() -> int:
    """Return the bytes that can still be allocated without swapping or being killed.

    The least of what the system says is available, what is left below the limits of the
    cgroups (v1 and v2) around this process, where file cache counts as free, and what is left
    of the address-space limit.
    """
    left = [
        _system_available(),
        *(max(limit - used, 0) for limit, used in _cgroup_limits(Path("/"))),
    ]
    if (space := _address_space_left()) is not None:
        left.append(space)
    return min(left)


def _physical_memory() -> int:
    if (size := _meminfo(Path("/proc/meminfo"), "MemTotal")) is not None:
        return size
    if platform.system() == "Windows":
        return _windows_memory()[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _system_available() -> int:
    if (size := _meminfo(Path("/proc/meminfo"), "MemAvailable")) is not None:
        return size
    if platform.system() == "Windows":
        return _windows_memory()[1]
    if platform.system() == "Darwin" and (size := _vm_stat_available(_vm_stat())) is not None:
        return size
    # A system that does not say: half of what there is, which other programs rarely exceed.
    return _physical_memory() // 2


def _meminfo(path: Path, field: str) -> int | None:
    match = re.search(rf"^{field}:\s+(\d+) kB", _text(path), flags=re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """Return (limit, used) for each memory cgroup with a limit, from this process up to the root.

    Args:
        root: where /proc and /sys lie.
    """
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's and not exist: its own is then the root.
        parts = [p for p in path.split("/") if p and p != ".."]
        for depth in range(len(parts), -1, -1):
            group = base.joinpath(*parts[:depth])
            if (pair := _limit_and_use(group, *names)) is not None:
                found.append(pair)
    return found


def _limit_and_use(group: Path, limit: str, used: str, cache: str) -> tuple[int, int] | None:
    bound, usage = _number(group / limit), _number(group / used)
    if bound is None or usage is None or bound >= _UNLIMITED:
        return None
    match = re.search(rf"^{cache} (\d+)$", _text(group / "memory.stat"), flags=re.MULTILINE)
    return bound, max(usage - (int(match.group(1)) if match else 0), 0)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _address_space_left() -> int | None:
    if platform.system() != "Linux":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit in (resource.RLIM_INFINITY, -1):
        return None
    pages = _text(Path("/proc/self/statm")).split()
    used = int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0
    return max(limit - used, 0)


def _vm_stat() -> str:
    import subprocess

    try:
        return subprocess.run(
            ["vm_stat"], capture_output=True, text=True, timeout=5, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _vm_stat_available(text: str) -> int | None:
    size = re.search(r"page size of (\d+) bytes", text)
    kinds = ("free", "inactive", "speculative", "purgeable")
    pages = re.findall(rf"^Pages (?:{'|'.join(kinds)}):\s+(\d+)\.", text, flags=re.MULTILINE)
    return int(size.group(1)) * sum(map(int, pages)) if size and pages else None


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong),
            ("rest", ctypes.c_ulonglong * 5),
        ]

    status = Status(length=ctypes.sizeof(Status))
    if sys.platform == "win32":
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.total, status.available


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
