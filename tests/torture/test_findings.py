"""What the campaigns found, each in its smallest form: one sentence, and no crash."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Literal

import mrcfile
import numpy as np
import pytest
import tifffile

from tests.torture.fuzz import READERS
from tests.torture.seeds import Seed, write_seeds
from unet.errors import UnetError
from unet.volume import open_volume
from unet.volume.ngff.blosc import check_chunk

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seed]:
    return {seed.name: seed for seed in write_seeds(tmp_path_factory.mktemp("seeds"))}


def refusal(reader: str, path: Path) -> str:
    with pytest.raises(UnetError) as caught:
        READERS[reader](path)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert path.name in said
    return said


def test_every_seed_is_read_before_it_is_damaged(seeds: dict[str, Seed]) -> None:
    for seed in seeds.values():
        READERS[seed.reader](seed.path)


@pytest.mark.parametrize("text", [DEEP, '"card"', "[]"])
def test_a_card_nested_too_deeply(text: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(text)
    refusal("card", tmp_path)


def test_a_card_whose_format_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"artefacts": {}, "format": [0] * 1000}))
    assert len(refusal("card", tmp_path)) < 300


@pytest.mark.parametrize(
    "text",
    [
        DEEP, "{}", '{"settings": [[1, 2]]}', '{"settings": {"batch_size": {}}}', '{"settings": {"batch_size": 1.5}}',
        '{"settings": {"learning_rate": NaN}}', '{"settings": {"base_filters": -1}}',
        '{"settings": {"augment": "no"}}', '{"settings": {"seed": 1e999}}',
    ],
)  # fmt: skip
def test_settings_of_another_kind(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    refusal("settings", path)


@pytest.mark.parametrize("line", [DEEP, '"text"', "7", '{"page": 1e999, "row": 0, "crc": 0}', '{"page": 0}'])
@pytest.mark.parametrize("place", [0, 2])
def test_a_journal_line_that_no_run_wrote(line: str, place: int, seeds: dict[str, Seed]) -> None:
    journal = seeds["run.partial"].path / "journal.jsonl"
    whole = journal.read_text()
    lines = whole.splitlines()
    lines[place] = line
    journal.write_text("\n".join(lines) + "\n")
    try:
        refusal("journal", seeds["run.partial"].path)
    finally:
        journal.write_text(whole)


def test_an_n5_attribute_nested_too_deeply(seeds: dict[str, Seed]) -> None:
    words = seeds["volume.n5"].path / "attributes.json"
    whole = words.read_text()
    words.write_text(DEEP)
    try:
        refusal("volume", seeds["volume.n5"].path)
    finally:
        words.write_text(whole)


def test_hdf5_with_damage_behind_its_first_block(seeds: dict[str, Seed], tmp_path: Path) -> None:
    content = seeds["volume.h5"].path.read_bytes()
    path = tmp_path / "volume.h5"
    said = set()
    for place in range(96, min(len(content), 2048), 8):
        path.write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
        try:
            READERS["volume"](path)
        except UnetError as error:
            said.add(str(error).partition("(")[0])
    assert any("truncated or damaged" in sentence for sentence in said)


@pytest.mark.parametrize("order", ["little", "big"])
def test_an_mrc_file_whose_extended_header_is_longer_than_itself(
    order: Literal["little", "big"], tmp_path: Path
) -> None:
    path = tmp_path / "volume.mrc"
    with mrcfile.new(path) as file:
        file.set_data(np.zeros((2, 20, 30), np.uint16 if order == "little" else np.dtype(">u2")))
    content = bytearray(path.read_bytes())
    READERS["volume"](path)
    for length in (2**31 - 1, 2**32 - 1, len(content) - 1023):
        content[92:96] = length.to_bytes(4, order)
        path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert f"extended header of {length} bytes goes beyond its end" in refusal("volume", path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_blosc_chunk_that_says_it_is_longer(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "volume.zarr"
    blosc = pytest.importorskip("numcodecs").Blosc()
    array = zarr.create_array(
        path, shape=(2, 64, 64), chunks=(1, 64, 64), dtype="uint8", zarr_format=2, compressors=blosc
    )
    array[:] = np.arange(2 * 64 * 64, dtype=np.uint8).reshape(2, 64, 64)
    chunk = next(path.rglob("1.0.0"))
    content = bytearray(chunk.read_bytes())
    assert struct.unpack_from("<I", content, 12)[0] == len(content), "the array is not in Blosc's format"
    struct.pack_into("<I", content, 12, 0x63190000)
    chunk.write_bytes(content)
    said = refusal("volume", path)
    assert "says that it has 1662582784" in said
    with open_volume(path) as volume:
        assert volume.rows(0, 0, 64).shape == (64, 64)


@pytest.mark.parametrize(
    ("sizes", "words"), [((4096, 4096), "shorter"), ((4096, 4096, 99), "says that it has 99"), ((10, 11, 16), "blocks")]
)
def test_headers_that_lie(sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_chunk(memoryview(b"\2\1\1\1" + struct.pack(f"<{len(sizes)}I", *sizes)))


def test_a_page_that_begins_where_no_file_has_a_byte(tmp_path: Path) -> None:
    path = tmp_path / "volume.tif"
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8), photometric="minisblack", bigtiff=True)
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].tags["StripOffsets"].valueoffset
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, place, 2**63 - 1)
    path.write_bytes(content)
    refusal("volume", path)


def test_words_of_a_library_on_several_lines_become_one_sentence() -> None:
    assert str(UnetError("a.tif is damaged (first\nsecond\r\nthird)")) == "a.tif is damaged (first second third)"


@pytest.mark.parametrize("way", ["storage", "link", "virtual"])
def test_an_hdf5_file_that_names_another_files_bytes_as_its_pixels(way: str, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    other, path = tmp_path / "other.h5", tmp_path / "volume.h5"
    with h5py.File(other, "w") as file:
        file["raw"] = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    with h5py.File(path, "w") as file:
        if way == "storage":
            file.create_dataset("raw", (3, 8, 8), np.uint8, external=[(str(other), 0, 192)])
        elif way == "link":
            file["raw"] = h5py.ExternalLink(str(other), "raw")
        else:
            layout = h5py.VirtualLayout((3, 8, 8), np.uint8)
            layout[:] = h5py.VirtualSource(str(other), "raw", (3, 8, 8))
            file.create_virtual_dataset("raw", layout)
    with pytest.raises(UnetError, match=f"takes pixels from {other}: name that file"):
        READERS["volume"](Path(f"{path}:/raw"))
