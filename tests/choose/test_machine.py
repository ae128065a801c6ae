"""Facts about a machine: on this one, and on others as their files describe them."""

from __future__ import annotations

import getpass
import json
import os
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from manyheads.choose import available, machine
from manyheads.choose.machine import (
    available_memory,
    machine_facts,
    matmul_rate,
    set_threads,
    total_memory,
)

torch.set_num_threads(1)

GIB = 1 << 30


def strings(tree: object) -> list[str]:
    if isinstance(tree, dict):
        return [s for pair in tree.items() for part in pair for s in strings(part)]
    return [tree] if isinstance(tree, str) else []


def test_facts_are_json_and_tell_no_names() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["cpu"]
    assert 1 <= facts["usable_cores"] <= facts["cores"]
    assert 0 < facts["available_bytes"] <= facts["memory_bytes"]
    assert facts["threads"] == 1
    private = {platform.node(), getpass.getuser(), str(Path.home()), os.getcwd()}
    private.add(tempfile.gettempdir())
    assert not private & set(strings(facts))
    assert not any(p in s for s in strings(facts) for p in private if "/" in p and len(p) > 1)


def test_facts_follow_the_threads_in_force() -> None:
    with set_threads(3):
        assert machine_facts()["threads"] == 3
    assert machine_facts()["threads"] == 1


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cgroup_v2_limits_of_all_levels(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{base}/cgroup.controllers": "memory",
            f"{base}/outer/memory.max": f"{4 * GIB}\n",
            f"{base}/outer/memory.current": f"{3 * GIB}\n",
            f"{base}/outer/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 7\n",
            f"{base}/outer/inner/memory.max": "max\n",
            f"{base}/outer/inner/memory.current": f"{GIB}\n",
        },
    )
    assert available._cgroup_limits(tmp_path) == [(4 * GIB, 2 * GIB)]
    write(tmp_path, {f"{base}/outer/inner/memory.max": f"{GIB}\n"})
    assert available._cgroup_limits(tmp_path) == [(GIB, GIB), (4 * GIB, 2 * GIB)]


def test_cgroup_v2_inside_a_container_lies_at_the_root(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../docker/abc\n",
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB // 2}\n",
        },
    )
    assert available._cgroup_limits(tmp_path) == [(2 * GIB, GIB // 2)]


def test_cgroup_v1_limit_and_its_word_for_none(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/job"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n1:cpu:/\n0::/\n",
            f"{base}/memory.limit_in_bytes": f"{3 * GIB}",
            f"{base}/memory.usage_in_bytes": f"{2 * GIB}",
            f"{base}/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{9 * GIB}",
        },
    )
    assert available._cgroup_limits(tmp_path) == [(3 * GIB, GIB)]
    assert available._cgroup_limits(tmp_path / "nothing") == []


def test_available_is_the_least_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_system_available", lambda: 10 * GIB)
    monkeypatch.setattr(available, "_physical_memory", lambda: 16 * GIB)
    monkeypatch.setattr(available, "_address_space_left", lambda: None)
    monkeypatch.setattr(available, "_cgroup_limits", lambda root: [])
    assert (available_memory(), total_memory()) == (10 * GIB, 16 * GIB)
    groups = [(8 * GIB, 7 * GIB), (12 * GIB, GIB)]
    monkeypatch.setattr(available, "_cgroup_limits", lambda root: groups)
    assert (available_memory(), total_memory()) == (GIB, 8 * GIB)
    monkeypatch.setattr(available, "_address_space_left", lambda: 5)
    assert available_memory() == 5
    groups.append((GIB, 2 * GIB))  # above its limit for a moment
    assert available_memory() == 0


def test_meminfo_and_vm_stat(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       24684092 kB\nMemAvailable:   24223280 kB\nSwapTotal: 0 kB\n")
    assert available._meminfo(path, "MemAvailable") == 24223280 * 1024
    assert available._meminfo(path, "MemFree") is None
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\n"
        "Pages active:                            999.\n"
        "Pages inactive:                           20.\n"
        "Pages speculative:                         3.\n"
        "Pages wired down:                        777.\n"
        "Pages purgeable:                           4.\n"
    )
    assert available._vm_stat_available(text) == 37 * 16384
    assert available._vm_stat_available("") is None


def test_a_system_that_says_nothing_counts_as_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_meminfo", lambda path, field: None)
    monkeypatch.setattr(available, "platform", SimpleNamespace(system=lambda: "Plan9"))
    assert available._system_available() == available._physical_memory() // 2 > 0


def test_processor_names() -> None:
    x86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD  EPYC 7543\ncpu MHz\t: 1\n"
    assert machine._name_from_cpuinfo(x86) == "AMD EPYC 7543"
    arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
    assert machine._name_from_cpuinfo(arm) == "implementer 0x41 part 0xd0c"
    board = arm + "\nModel\t\t: Raspberry Pi 4 Model B\n"
    assert machine._name_from_cpuinfo(board) == "Raspberry Pi 4 Model B"
    assert machine._name_from_cpuinfo("") == ""


def test_processor_quota() -> None:
    assert machine._cpu_quota("150000 100000\n") == 1.5
    assert machine._cpu_quota("max 100000\n") is None
    assert machine._cpu_quota("") is None


def test_threads_are_set_and_restored() -> None:
    with set_threads(2) as count:
        assert count == torch.get_num_threads() == 2
        with set_threads(None) as same:
            assert same == 2
    assert torch.get_num_threads() == 1
    with pytest.raises(KeyError), set_threads(2):
        raise KeyError
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="threads 0 must be at least 1"), set_threads(0):
        pass


def test_rate_is_work_over_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = [0.0]

    def clock() -> float:
        ticks[0] += 1e-3  # every look at the clock takes a millisecond
        return ticks[0]

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out)
    assert matmul_rate(seconds=0.04) == pytest.approx(2 * 2048**3 / 1e-3)


def test_rate_leaves_out_sizes_that_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, sizes = [0.0], []

    def clock() -> float:
        ticks[0] += 1.0
        return ticks[0]

    mm = torch.mm
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (sizes.append(len(a)), mm(a, b, out=out)))
    assert matmul_rate(seconds=0.5) == 2 * 256**3
    assert set(sizes) == {256}


def test_rate_measures_this_machine() -> None:
    assert matmul_rate(seconds=0.02) > 0
    assert matmul_rate(torch.bfloat16, seconds=0.02) > 0
    with pytest.raises(ValueError, match="seconds 0 must be positive"):
        matmul_rate(seconds=0)
    with pytest.raises(ValueError, match=r"dtype torch\.int8"):
        matmul_rate(torch.int8)
