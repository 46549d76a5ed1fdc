import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tunesmith.core import hardware
from tunesmith.core.hardware import (
    count_cores,
    measure_machine,
    read_main_memory,
    read_peak_bytes,
    release_memory,
    reset_peak,
)


def test_the_machine_is_measured(tmp_path: Path) -> None:
    machine = measure_machine(tmp_path / "not" / "there" / "yet")
    assert machine.device in ("cpu", "cuda")
    assert machine.device_name
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert 0 < machine.available_bytes <= machine.memory_bytes
    room = os.statvfs(tmp_path)
    assert machine.disk_free_bytes == pytest.approx(room.f_bavail * room.f_frsize, rel=0.05)
    assert machine.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert machine.versions["torch"]
    assert machine.compiler is None or os.access(machine.compiler, os.X_OK)


def test_memory_is_that_of_the_system_or_less() -> None:
    total, available = read_main_memory()
    assert 2**28 < available < total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    assert total <= fields["MemTotal"]
    assert available <= 1.1 * fields["MemAvailable"]
    resident = psutil.Process().memory_info().rss
    assert available <= total - resident / 2, "what this process holds is not free"


def test_a_cgroup_limit_counts_and_cached_files_are_free(tmp_path: Path) -> None:
    version_2, version_1, unlimited = tmp_path / "two", tmp_path / "one", tmp_path / "none"
    for folder, files in (
        (
            version_2,
            {
                "memory.max": "1000\n",
                "memory.current": "700\n",
                "memory.stat": "anon 1\ninactive_file 300\n",
            },
        ),
        (
            version_1,
            {
                "memory.limit_in_bytes": "500",
                "memory.usage_in_bytes": "100",
                "memory.stat": "total_inactive_file 9",
            },
        ),
        (unlimited, {"memory.max": "max\n", "memory.current": "700\n"}),
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert hardware._read_cgroup_limits([version_2, unlimited, version_1]) == [
        (1000, 400),
        (500, 91),
    ]


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (1000, 400, (1000, 600)),
        (1000, 1400, (1000, 0)),
        (2**62, 0, None),
    ],
)
def test_memory_is_that_of_the_container(
    limit: int,
    used: int,
    expected: tuple[int, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "app.slice" / "job").mkdir(parents=True)
    (tmp_path / "app.slice" / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "app.slice" / "memory.current").write_text(f"{used}\n")
    membership = tmp_path / "membership"
    membership.write_text("5:cpuset:/other\n0::/app.slice/job\n")
    monkeypatch.setattr(hardware, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(hardware, "CGROUP_MEMBERSHIP", membership)
    if expected:
        assert read_main_memory() == expected
    else:
        total, available = read_main_memory()
        assert 2**28 < available <= total < limit


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_cores_follow_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    assert count_cores() == 1
    os.sched_setaffinity(0, before)


def test_the_peak_rises_and_can_be_reset() -> None:
    reset_peak()  # what other tests have used is not in the way
    before = read_peak_bytes()
    held = np.ones(2**25)  # 256 MiB, written
    assert read_peak_bytes() - before > 0.9 * held.nbytes - 2**26
    top = read_peak_bytes()
    del held
    assert abs(read_peak_bytes() - top) < 2**20  # the kernel counts pages in batches
    if reset_peak():
        assert read_peak_bytes() < top - 2**27


def test_measuring_imports_no_torch_without_a_gpu() -> None:
    code = "import sys; from pathlib import Path; from tunesmith.core.hardware import *"
    code += "; print(measure_machine(Path()).device); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    device, torch_loaded = done.stdout.split()
    assert device == "cuda" or torch_loaded == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_memory_between_blocks_in_use_is_returned() -> None:
    process = psutil.Process()
    blocks = [bytearray(b"x") * 100_000 for _ in range(1000)]
    kept = blocks[::50]
    del blocks
    before = process.memory_info().rss
    release_memory()
    assert before - process.memory_info().rss > 50_000_000
    assert all(len(block) == 100_000 for block in kept)
