from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unet.machine import cpu_amp_dtype, instruction_sets, machine, numa_nodes, processor_name, usable_cores

ALLOWED = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, ALLOWED),
        ({"cpu.max": "max 100000\n"}, ALLOWED),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "99900000 100000\n"}, ALLOWED),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, ALLOWED),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.max": "what is this"}, ALLOWED),
    ],
)
def test_a_containers_quota_counts(files: dict[str, str], cores: int, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert usable_cores(tmp_path) == cores


def test_half_a_core_more_is_a_core_more(tmp_path: Path) -> None:
    if ALLOWED < 2:
        pytest.skip("there is one core")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert usable_cores(tmp_path) == 2


def test_memory_nodes_count_where_this_process_may_run(tmp_path: Path) -> None:
    assert numa_nodes() >= 1
    assert numa_nodes(tmp_path) == 1
    first = min(os.sched_getaffinity(0))
    for number, listing in enumerate((f"{first}", "5000-5001,5003", "", f"4000,{first}-{first + 1}")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(f"{listing}\n")
    assert numa_nodes(tmp_path) == 2


@pytest.mark.parametrize(
    ("flags", "most", "found"),
    [
        ("sse4_1 avx avx2", "", ("avx2",)),
        ("avx2 avx512bw avx512_vnni avx512_bf16 avx_vnni", "", ("avx2", "avx512", "vnni", "bf16")),
        ("avx2 avx512bw avx512_vnni avx512_bf16 avx_vnni", "AVX2", ("avx2",)),
        ("avx2 avx512bw avx512_vnni avx512_bf16 avx_vnni", "avx2_vnni", ("avx2", "vnni")),
        ("avx2 avx512bw avx512_vnni avx512_bf16", "AVX512_CORE", ("avx2", "avx512")),
        ("avx2 avx512bw avx512_vnni avx512_bf16 amx_tile", "AVX512_CORE_BF16", ("avx2", "avx512", "vnni", "bf16")),
        ("avx2 avx512bw avx512_vnni avx512_bf16 amx_tile", "ALL", ("avx2", "avx512", "vnni", "bf16", "amx")),
        ("avx2 avx512bw", "SSE41", ()),
    ],
)
def test_instructions_are_the_processors_within_the_limit(
    flags: str, most: str, found: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Some CPU: fast\nflags\t\t: fpu {flags}\n\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert instruction_sets(tmp_path / "cpuinfo") == found
    assert processor_name(tmp_path / "cpuinfo") == "Some CPU: fast"
    assert instruction_sets(tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        # The process's own group below the root, as a service manager makes it.
        ("0::/service/own\n", {"service/own/cpu.max": "50000 100000"}, 1),
        ("0::/service/own\n", {"service/cpu.max": "50000 100000", "service/own/cpu.max": "max 100000"}, 1),
        ("0::/service/own\n", {"cpu.max": "50000 100000", "service/own/cpu.max": "99900000 100000"}, 1),
        ("0::/service/own\n", {"service/other/cpu.max": "50000 100000"}, ALLOWED),
        # Version 1, alone and together with version 2; its controllers may share a folder.
        ("4:cpu:/own\n", {"cpu/own/cpu.cfs_quota_us": "50000", "cpu/own/cpu.cfs_period_us": "100000"}, 1),
        (
            "4:memory:/\n3:cpu,cpuacct:/a/b\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("4:memory:/own\n", {"cpu/own/cpu.cfs_quota_us": "50000", "cpu/own/cpu.cfs_period_us": "100000"}, ALLOWED),
        ("1:cpuset:/\n0::/own\n", {"unified/own/cpu.max": "50000 100000"}, 1),
        # Paths of the host, which a container without a namespace of its own reads: only the root is there.
        ("0::/docker/0123\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/../../other\n", {"cpu.max": "50000 100000"}, 1),
    ],
)
def test_the_quota_of_the_own_group_counts(membership: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(f"{content}\n")
    assert usable_cores(tmp_path / "cgroup", tmp_path / "membership") == cores


@pytest.mark.parametrize("quota", [0.5, None])
def test_libraries_start_no_more_threads_than_the_quota_has_cores(quota: float | None) -> None:
    """Whether they were loaded before the command begins or after, here or in a child."""
    if ALLOWED < 2:
        pytest.skip("there is one core")
    code = (
        "import json, subprocess, sys\nimport numpy, scipy.linalg, cv2\nfrom unet import machine\n"
        f"machine._quota = lambda *places: {quota}\nfrom unet.errors import command\n"
        "@command\ndef main(argv=None):\n    import threadpoolctl\n"
        "    found = [pool['num_threads'] for pool in threadpoolctl.threadpool_info()]\n"
        "    ask = 'import cv2, scipy.linalg, threadpoolctl as t; '\n"
        "    ask += 'print(cv2.getNumThreads(), *(p[\"num_threads\"] for p in t.threadpool_info()))'\n"
        "    child = subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True, check=True).stdout\n"
        "    print(json.dumps([cv2.getNumThreads(), *found, *map(int, child.split())]))\n    return 0\n"
        "sys.exit(main())"
    )
    kept = {name: value for name, value in os.environ.items() if not name.endswith(("NUM_THREADS", "THREADS_NUM"))}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    # Without a quota the largest tells: a library that was built without threads has one.
    assert max(json.loads(done.stdout)) == (ALLOWED if quota is None else 1)


@pytest.mark.parametrize("most", ["AVX2", "AVX512_CORE"])
def test_bfloat16_is_for_processors_that_have_it(most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    has = "bf16" in instruction_sets() or "amx" in instruction_sets()
    assert cpu_amp_dtype() == ("bfloat16" if has else "float32")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert cpu_amp_dtype() == "float32"


def test_a_machine_tells_what_it_is() -> None:
    here = machine()
    assert here.cores == usable_cores()
    assert str(here).startswith(f"{here.cores} core")
    assert here.cpu in str(here)
