from __future__ import annotations

import contextlib
import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from serve.benchmark import main
from serve.measure import tables
from serve.measure.benchmark import Bench
from serve.measure.levels import EngineLevel, Load, Sample, TritonLevel
from serve.measure.meter import Meter, ServerCounts, server_process
from serve.measure.perf_analyzer import COLUMNS, PerfRow
from serve.measure.progress import Progress
from serve.measure.rows import Row, lone_rows, refusal, summarise
from serve.measure.served import instance_threads
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.connection import Connection
from serve.segment.slot import SharedSlot, Slot
from serve.segment.slots import make_slots
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.cards import rewrite_card
from unet.files import sha256_of
from unet.files.demo import own_or_demo
from unet.machine import usable_cores
from unet.processes import free_ports

LEVELS = ["engine", "gRPC", "shared memory", "perf_analyzer"]


def test_throughput_is_images_over_wall_time_not_the_mean_of_rates() -> None:
    samples = [Sample(16, 2.0, (1.0, 1.0)), Sample(8, 6.0, (6.0,))]
    row = summarise("gRPC", Load(572, 8), samples)
    assert row.img_per_s == pytest.approx(24 / 8)
    assert row.rounds == pytest.approx((8.0, 8 / 6))
    assert (row.requests, row.p50_ms) == (3, 1000.0)
    # 572 gives 388, and four of them cover 512 x 512.
    assert row.slices_per_s == pytest.approx(row.img_per_s / 4)


# Among more than 100 a single one can lift the mean above the 99th percentile, which is refused.
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=100), st.integers(1, 16))
@example([699.5993489360038] * 3, 1)
def test_honest_measurements_are_never_refused(latencies_s: list[float], batch: int) -> None:
    sample = Sample(batch * len(latencies_s), sum(latencies_s), tuple(latencies_s))
    row = summarise("engine", Load(572, batch), [sample])
    assert row.refused == ""
    known = [one for one in (row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms, row.max_ms) if one is not None]
    assert known == sorted(known)


@pytest.mark.parametrize(
    ("requests", "known"),
    [
        *((1, [50]), (49, [50]), (50, [50, 90]), (99, [50, 90]), (100, [50, 90, 95])),
        *((999, [50, 90, 95]), (1000, [50, 90, 95, 99])),
    ],
)
def test_a_percentile_needs_enough_requests(requests: int, known: list[int]) -> None:
    latencies_s = tuple(np.linspace(0.01, 0.02, requests))
    row = summarise("gRPC", Load(572, 1), [Sample(requests, sum(latencies_s), latencies_s)])
    assert [share for share in (50, 90, 95, 99) if getattr(row, f"p{share}_ms") is not None] == known
    # perf_analyzer keeps single latencies to itself: each of its runs needs as many.
    columns = dict.fromkeys(COLUMNS, 1000.0)
    perf = [Sample(10, 1.0, perf=PerfRow(columns, count)) for count in (requests, 10_000)]
    row = summarise("perf_analyzer", Load(572, 1), perf)
    assert [share for share in (50, 90, 95, 99) if getattr(row, f"p{share}_ms") is not None] == known


def test_what_the_cache_answered_and_what_is_unstable_say_so() -> None:
    counts = ServerCounts(0, 0, 0, 0, 0, 0, 0, cached=9)
    row = summarise("gRPC", Load(572, 1), [Sample(9, 9.0, (1.0,) * 9, counts, cached=9)])
    assert row.refused == "answered from the response cache: 9 requests never came to the engine"
    assert row.images_per_pass is None
    perf = [Sample(10, 1.0, perf=PerfRow(dict.fromkeys(COLUMNS, 1.0), 100, stable)) for stable in (True, False)]
    row = summarise("perf_analyzer", Load(572, 1), perf)
    assert row.refused == "unstable: in 1 of 2 runs its windows did not agree within 10 %"


@pytest.mark.parametrize(
    ("rounds", "values", "reason"),
    [
        ((10.0,), {"mean_ms": 100.0, "p99_ms": 90.0}, "mean latency, 100.0 ms, is beyond the 99th percentile, 90.0"),
        ((10.0,), {"mean_ms": 50.0, "p99_ms": 60.0}, "10.0 img/s do not fit a mean latency of 50.0 ms"),
        ((8.0, 13.0), {"mean_ms": 100.0, "p99_ms": 110.0}, "not stable: its rounds gave 8.0 to 13.0 img/s"),
        ((10.0,), {"other_cores": 0.2 * usable_cores()}, "another load on the machine"),
        ((9.0, 11.0), {"mean_ms": 100.0, "p99_ms": 110.0, "other_cores": 0.0}, ""),
    ],
)
def test_what_contradicts_itself_is_refused(rounds: tuple[float, ...], values: dict[str, float], reason: str) -> None:
    said = refusal(Load(572, 1), 10.0, rounds, values)
    assert reason in said
    assert bool(said) == bool(reason)


def test_the_last_answers_of_many_at_a_time_come_one_by_one() -> None:
    values = {"mean_ms": 100.0, "p99_ms": 110.0}
    # Four at a time for 100 ms each make 40 a second; two requests each are too few to see it.
    assert refusal(Load(572, 1, 4), 30.0, (30.0,), values, requests=8) == ""
    assert "do not fit" in refusal(Load(572, 1, 4), 30.0, (30.0,), values, requests=100)


def test_the_engine_takes_one_at_a_time_whatever_is_asked() -> None:
    assert summarise("engine", Load(572, 1, 2), [Sample(4, 4.0, (1.0,) * 4)]).refused == ""
    counts = ServerCounts(4, 4, 4, 0, 0, 0, 0)
    assert "do not fit" in summarise("gRPC", Load(572, 1, 4), [Sample(90, 90.0, (1.0,) * 90, counts)]).refused


def row_of(level: str, batch: int, rate: float, **changes: Any) -> Row:
    values = {"mean_ms": 1.0, "p50_ms": 1.0, "p90_ms": 1.5, "p95_ms": 2.0, "p99_ms": 3.0, **changes}
    return Row(level, changes.pop("tile_size", 572), batch, 1, rate, (rate, 2 * rate), 9, **values)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_say_what_was_not_measured_and_what_was_refused() -> None:
    rows = [row_of("engine", 16, 20.0), row_of("gRPC", 16, 15.0), row_of("gRPC", 1, 7.0, refused="noise")]
    first, second = (cells(line) for line in tables.throughput_table(rows).splitlines()[2:])
    assert first == ["572", "16", "1", "20.00", "15.00", "5.00", "83.33", "out of memory"]
    assert second == ["572", "1", "1", "not measured", "refused", "-", "62.81", "34.27"]
    assert tables.refusals(rows) == ["refused: gRPC, tile 572, batch 1, 1 at a time: noise"]
    ratio = [cells(line) for line in tables.ratio_table(rows, "engine").splitlines()[2:]]
    assert [line[-1] for line in ratio] == ["0.750 (0.750-0.750)", "-"]


def test_only_a_v100_fills_the_table_of_a_v100() -> None:
    rows = [row_of("engine", 8, 321.0)]
    assert "321" not in tables.v100_table(rows, "NVIDIA A100")
    assert cells(tables.v100_table(rows, "Tesla V100-SXM2-16GB").splitlines()[3])[3:] == [
        *("321.00", "not measured", "not measured", "not measured"),
    ]


def test_tables_are_aligned() -> None:
    rows = [row_of(level, batch, 1234.5 * batch) for level in LEVELS for batch in (1, 16)]
    for text in (tables.throughput_table(rows), tables.latency_table(rows), tables.ratio_table(rows, "engine")):
        assert len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in text.splitlines()}) == 1


def test_programs_find_the_rows_that_count() -> None:
    levels = ("engine", "gRPC", "shared memory", "shared memory")
    rows: list[dict[str, Any]]
    rows = [{"level": level, "concurrency": 1, "tile_size": 572, "refused": ""} for level in levels]
    rows[-1]["tile_size"] = 700
    assert lone_rows({"rows": rows}) == [rows[2]]
    rows[2]["refused"] = rows[3]["refused"] = "noise"
    assert lone_rows({"rows": rows}) == [rows[1]]
    rows[1]["concurrency"] = 2
    assert lone_rows({"rows": rows}) == []


def test_charts_leave_out_what_was_refused(tmp_path: Path) -> None:
    rows = [row_of("engine", 1, 30.0), row_of("gRPC", 1, 1e9, refused="noise"), row_of("gRPC", 8, 25.0)]
    tables.draw(tmp_path, rows)
    # Bars and, beside the legend's, points.
    for name, least in (("throughput.png", 5000), ("latency.png", 100)):
        picture = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert picture.shape[1] > 500
        # Beside the refused one all others would be too small to see.
        assert (picture == (31, 119, 180)).all(-1).sum() > least


def test_nothing_is_drawn_where_everything_was_refused(tmp_path: Path) -> None:
    tables.draw(tmp_path, [row_of("engine", 1, 30.0, refused="noise"), row_of("gRPC", 8, 20.0, refused="noise")])
    assert list(tmp_path.iterdir()) == []


def test_the_meter_tells_our_own_work_from_others(triton_server: TritonServer) -> None:
    url = triton_server.settings.grpc_url
    assert server_process(url) is not None
    assert server_process("127.0.0.1:1") is None
    assert server_process("far.example.org:8001") is None
    code = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.5: pass"
    with Meter(url).measure() as cost:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert cost.client_cpu_s >= 0.4
    assert cost.server_rss_mib is not None
    assert cost.server_rss_mib > 10
    # The same work by somebody who is no child of ours.
    away = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)"
    with Meter(url).measure() as cost:
        subprocess.run([sys.executable, "-c", away], check=True)
        orphans = [
            one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == [sys.executable, "-c", code]
        ]
        deadline = time.monotonic() + 30
        while all(sum(one.cpu_times()[:2]) < 0.4 for one in orphans) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(orphans) == 1
    assert cost.other_cpu_s >= 0.3


@pytest.fixture(scope="module")
def own_server(tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that nobody else asks: its counts are of what is measured alone."""
    folder = tmp_path_factory.mktemp("triton")
    publish(tiny_artefacts, folder / "models", ModelSettings(max_batch_size=8))
    http, grpc, metrics = free_ports(3)
    with TritonServer(
        ServerSettings(folder / "models", folder / "log", folder / "state", http, grpc, metrics)
    ) as server:
        yield server


@pytest.fixture(scope="module")
def record(
    own_server: TritonServer, tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """What a short run on the real server left."""
    out = tmp_path_factory.mktemp("benchmark")
    flags = ["--url", own_server.settings.grpc_url, "--artefacts", str(tiny_artefacts), "--tile_sizes", "252"]
    flags += ["--batch_sizes", "1", "4", "--rounds", "1", "--seconds", "0.4", "--slices", "2", "--out", str(out)]
    assert main(flags) == 0
    return out, json.loads((out / "benchmark.json").read_text(encoding="utf-8"))


def test_every_level_is_measured(record: tuple[Path, dict[str, Any]]) -> None:
    out, values = record
    found = {(row["level"], row["batch_size"]) for row in values["rows"]}
    unstable = {tuple(name.split(", ")[::2]) for name in values["not_measured"]}
    # perf_analyzer may see nothing stable on a busy machine.
    assert {(level, f"batch {size}") for level, size in found} | unstable == {
        (level, f"batch {size}") for level in LEVELS for size in (1, 4)
    }
    assert all(name.startswith("perf_analyzer") for name in values["not_measured"])
    text = (out / "benchmark.md").read_text(encoding="utf-8")
    for heading in ("shared memory / engine", "images in a pass", "2 slices of 512 x 512 from file to file"):
        assert heading in text


@pytest.mark.parametrize("kind", [Slot, SharedSlot])
def test_what_the_server_counted_is_what_was_measured(own_server: TritonServer, kind: type[Slot]) -> None:
    """Not the first requests too, which make the connections, and not all but the last."""
    url = own_server.settings.grpc_url
    level = TritonLevel(kind, url, "unet", 60.0, Meter(url))
    for _ in range(20):
        sample = level.measure(Load(204, 1, 2), 0.01)
        assert sample.server is not None
        assert sample.server.requests == len(sample.latencies_s)


def test_a_count_waits_for_the_last_answers(own_server: TritonServer) -> None:
    connection = Connection(own_server.settings.grpc_url, "unet", "", 60.0)
    slot = make_slots(connection, 1, (8, 1, 252, 252), Slot, insist=True)[0]
    answered = threading.Event()
    before = ServerCounts.read(connection)
    inputs, outputs = slot.tensors(connection.grpc, 8)
    connection.client.async_infer("unet", inputs, lambda result, error: answered.set(), outputs=outputs)
    assert ServerCounts.read_after(connection, before, 1).since(before).requests == 1
    assert answered.wait(60)
    connection.close()


def test_the_server_counts_what_was_sent(record: tuple[Path, dict[str, Any]]) -> None:
    for row in record[1]["rows"]:
        if row["level"] not in ("gRPC", "shared memory"):
            continue
        assert row["images_per_pass"] == row["batch_size"]
        shares = [row[f"{name}_ms"] for name in ("queue", "compute_input", "compute_infer", "compute_output")]
        # Its clock stops after the answer was sent, so the sum may be a little more than the client's wait.
        assert 0 < sum(shares) < 1.5 * row["mean_ms"]
        # 252 x 252 pixels there, 68 x 68 of two bytes back.
        sent = 252 * 252 + 2 * 68 * 68
        assert (row["wire_bytes_per_img"] > sent) is (row["level"] == "gRPC")


def test_the_table_for_programs_has_perf_analyzers_columns(record: tuple[Path, dict[str, Any]]) -> None:
    out, values = record
    with (out / "benchmark.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["Level", "Tile", "Batch", *COLUMNS, "Refused"]
    for line, row in zip(rows, values["rows"]):
        assert float(line["Inferences/Second"]) == pytest.approx(row["img_per_s"], abs=1e-3)
        assert float(line["p50 latency"]) == pytest.approx(row["p50_ms"] * 1e3, abs=1)
        assert (line["p99 latency"] == "") is (row["p99_ms"] is None)


def test_counts_are_differences() -> None:
    before, after = ServerCounts(1, 2, 3, 4, 5, 6, 7), ServerCounts(11, 22, 33, 44, 55, 66, 77)
    assert after.since(before) == ServerCounts(10, 20, 30, 40, 50, 60, 70)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_sizes", "9"], "batches of 1 to 8, not of 9"),
        (["--tile_sizes", "572"], "takes tiles of 204, 252, not of 572"),
    ],
)
def test_what_the_model_does_not_take(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    common = ["--url", triton_server.settings.grpc_url, "--tile_sizes", "252", "--out", str(tmp_path)]
    assert main([*common, *flags]) == 2
    assert said in capsys.readouterr().err


def test_another_engine_than_the_served_one_is_not_measured(
    triton_server: TritonServer, tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tiny_artefacts / "card.json", other)
    rewrite_card(other, tile_sizes=[204])
    assert sha256_of(other / "card.json") != sha256_of(tiny_artefacts / "card.json")
    flags = ["--url", triton_server.settings.grpc_url, "--tile_sizes", "204", "--batch_sizes", "1", "--rounds", "1"]
    flags += ["--seconds", "0.1", "--no_perf_analyzer", "--slices", "0", "--out", str(tmp_path / "out")]
    for artefacts, reason in ((other, "does not serve"), (tmp_path / "none", "card.json does not exist")):
        assert main([*flags, "--artefacts", str(artefacts)]) == 0
        said = capsys.readouterr().out
        assert f"not measured: engine: {triton_server.settings.grpc_url}" in said or "card.json" in said
        assert reason in said
        assert "/ engine" not in said


def test_with_a_response_cache_the_engine_is_measured_all_the_same(
    settings_for: Callable[..., ServerSettings],
    tiny_artefacts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8, response_cache=True))
    with TritonServer(settings_for(tmp_path / "models", response_cache_mib=64)) as server:
        flags = ["--url", server.settings.grpc_url, "--artefacts", str(tiny_artefacts), "--tile_sizes", "252"]
        flags += ["--batch_sizes", "1", "--rounds", "1", "--seconds", "0.4", "--slices", "2"]
        assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out" / "benchmark.json").read_text(encoding="utf-8"))
    rows = {row["level"]: row for row in values["rows"]}
    # Ours sends other tiles each time. perf_analyzer repeats its own, and its row says what that comes to.
    for level in ("gRPC", "shared memory"):
        assert rows[level]["images_per_pass"] == 1
        assert "cache" not in rows[level]["refused"]
    assert "answered from the response cache" in rows["perf_analyzer"]["refused"]
    assert values["stack"]["client_slices_per_s"] > 0
    assert "refused: perf_analyzer, tile 252, batch 1, 1 at a time: answered from" in capsys.readouterr().out


def test_one_fault_does_not_cost_the_other_results(
    triton_server: TritonServer, tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """perf_analyzer is killed as soon as it runs, as the kernel does where memory runs out."""
    flags = ["--url", triton_server.settings.grpc_url, "--artefacts", str(tiny_artefacts), "--tile_sizes", "252"]
    flags += ["--batch_sizes", "1", "--rounds", "1", "--seconds", "0.3", "--slices", "0", "--out", str(tmp_path)]
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(main, flags)
        while not run.done():
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name() == "perf_analyzer":
                        child.kill()
        assert run.result() == 0
    values = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert [row["level"] for row in values["rows"]] == ["engine", "gRPC", "shared memory"]
    assert "perf_analyzer was killed by signal 9" in values["not_measured"]["perf_analyzer, tile 252, batch 1"]
    assert "not measured: perf_analyzer, tile 252, batch 1" in capsys.readouterr().out


def test_rows_are_written_as_they_come(
    triton_server: TritonServer, tiny_artefacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine fails under the second load, with an error that nobody expected; then Ctrl-C comes in the third."""
    really = EngineLevel.measure

    def measure(self: EngineLevel, load: Load, seconds: float) -> Sample:
        if load.batch_size == 2:
            raise ZeroDivisionError("one by zero")
        if load.batch_size == 3:
            raise KeyboardInterrupt
        return really(self, load, seconds)

    monkeypatch.setattr(EngineLevel, "measure", measure)
    flags = ["--url", triton_server.settings.grpc_url, "--artefacts", str(tiny_artefacts), "--tile_sizes", "252"]
    flags += ["--rounds", "1", "--seconds", "0.1", "--slices", "0", "--no-perf_analyzer", "--shared_memory", "off"]
    assert main([*flags, "--batch_sizes", "1", "2", "3", "--out", str(tmp_path)]) == 130
    values = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    found = [(row["level"], row["batch_size"]) for row in values["rows"]]
    assert found == [("engine", 1), ("gRPC", 1), ("gRPC", 2)]
    assert values["not_measured"] == {"engine, tile 252, batch 2": "ZeroDivisionError: one by zero"}


def test_a_failed_measurement_is_not_exit_code_0(
    settings_for: Callable[..., ServerSettings],
    tiny_artefacts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server ends after the first load."""
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    with TritonServer(settings_for(tmp_path / "models")) as server:
        write = Bench.write

        def stop_then_write(self: Bench) -> None:
            server.stop()
            write(self)

        monkeypatch.setattr(Bench, "write", stop_then_write)
        flags = ["--url", server.settings.grpc_url, "--artefacts", str(tiny_artefacts), "--tile_sizes", "252"]
        flags += ["--batch_sizes", "1", "2", "--rounds", "1", "--seconds", "0.1", "--slices", "0"]
        assert main([*flags, "--no_perf_analyzer", "--shared_memory", "off", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "1 of the measurements failed, the others are in" in said.err
    assert "not measured: gRPC, tile 252, batch 2: no server answers" in said.out
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["level"], row["batch_size"]) for row in rows] == [("engine", 1), ("gRPC", 1), ("engine", 2)]


def test_the_engine_alone_gets_the_threads_of_an_instance(
    settings_for: Callable[..., ServerSettings], tiny_artefacts: Path, tmp_path: Path
) -> None:
    for threads, instances, expected in ((1, 1, 1), (0, 2, max(1, usable_cores() // 2))):
        settings = ModelSettings(threads=threads, instances=instances, max_batch_size=8)
        publish(tiny_artefacts, tmp_path / str(instances), settings)
        with TritonServer(settings_for(tmp_path / str(instances))) as server:
            connection = Connection(server.settings.grpc_url, "unet", "", 60)
            assert instance_threads(connection) == expected
            connection.close()
            # What the server itself says of its instances.
            assert f", {expected} threads" in server.settings.log.read_text(encoding="utf-8")


def test_a_long_step_gives_signs_of_life(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, each=True, every_s=0.05) as progress:
        with progress.step("the first"):
            deadline = time.monotonic() + 30
            said = ""
            while "s so far" not in said and time.monotonic() < deadline:
                said += capsys.readouterr().err
        with progress.step("the second"):
            pass
    said += capsys.readouterr().err
    assert "[1/2] the first: starts" in said
    assert "[1/2] the first: 0 s so far" in said
    assert "[2/2] the second: done in 0.0 s" in said


def test_what_the_demo_made_is_taken_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert own_or_demo(Path("artefacts"), "artefacts") == Path("artefacts")
    (tmp_path / "demo" / "artefacts").mkdir(parents=True)
    assert own_or_demo(Path("artefacts"), "artefacts") == Path("demo/artefacts")
    assert own_or_demo(Path("named"), "artefacts") == Path("named")
    (tmp_path / "artefacts").mkdir()
    assert own_or_demo(Path("artefacts"), "artefacts") == Path("artefacts")


def test_a_dead_server_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "localhost:1", "--timeout_s", "2", "--out", str(tmp_path)]) == 2
    assert "no server answers at localhost:1" in capsys.readouterr().err
