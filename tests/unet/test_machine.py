from __future__ import annotations

import os
from pathlib import Path

import pytest

from unet.machine import instruction_sets, numa_nodes, processor_name, usable_cores

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
