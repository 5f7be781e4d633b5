"""The versions in the one table are those of the images, the pins and the pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from unet.engine.targets import (
    LEAST_DRIVER,
    PARTS,
    TARGETS,
    TENSORFLOW,
    TENSORFLOW_CUDA,
    TENSORRT,
    TENSORRT_RTX,
    TRITON,
    TRITON_SERVER,
)

# What is written for readers or run; the torture's and the vendor's own files are not.
SUFFIXES = {".md", ".py", ".sh", ".yaml", ".toml", ""}


@pytest.fixture(scope="module")
def texts(project_root: Path) -> dict[str, str]:
    """Every text that names versions, by its name."""

    def paths() -> Iterator[Path]:
        yield from (project_root / name for name in ("README.md", "SECURITY.md", "Makefile", "pyproject.toml"))
        for folder in ("docs", "docker", "unet", "export", "serve", "train", "tools"):
            yield from (project_root / folder).rglob("*")

    kept = [path for path in paths() if path.is_file() and (path.suffix in SUFFIXES or "Dockerfile" in path.name)]
    return {path.relative_to(project_root).as_posix(): path.read_text(encoding="utf-8") for path in kept}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"(?:tritonserver|nvidia/tensorrt):(\d\d\.\d\d)", {TRITON}),
        (r"\btritonserver (\d\d\.\d\d)", {TRITON}),
        (r"\bTriton (\d\d\.\d\d)", {TRITON}),
        (r"\bTriton (2\.\d+)", {TRITON_SERVER.rpartition(".")[0]}),
        (r"\btritonclient(?:\[\S+\])?==(\d+\.\d+\.\d+)", {TRITON_SERVER}),
        (r"\bbranch r(\d\d\.\d\d)", {TRITON}),
        (r"\btensorrt==(\d+\.\d+\.\d+)", {TENSORRT}),
        (r"\btensorrt-rtx-cu12==([\d.]+)", {TENSORRT_RTX}),
        (r"\btensorflow(?:-cpu)?(?:\[and-cuda\])?==(\d+\.\d+\.\d+)", {TENSORFLOW}),
        (r"\bTensorFlow (\d\.\d+\.\d+)", {TENSORFLOW}),
        (r"\bTensorFlow (\d\.\d+)\b", {TENSORFLOW.rpartition(".")[0]}),
        (r"\bnvidia/cuda:(\d+\.\d+)\.", {TENSORFLOW_CUDA}),
        (r"\bTensorFlow (?:\S+ )?(?:on|with) CUDA (\d+\.\d+)", {TENSORFLOW_CUDA}),
        (r"\bdriver (\d{3})\b(?!\.)", {str(LEAST_DRIVER)}),
    ],
)
def test_every_text_names_the_versions_of_the_table(pattern: str, expected: set[str], texts: dict[str, str]) -> None:
    found = {(name, version) for name, text in texts.items() for version in re.findall(pattern, text)}
    assert {version for _, version in found} == expected, found


def test_the_pins_are_the_tables(project_root: Path) -> None:
    pins = (project_root / "constraints.txt").read_text(encoding="utf-8")
    for name, version in (
        ("tensorflow", TENSORFLOW),
        ("tensorrt", TENSORRT),
        ("tensorrt-rtx-cu12", TENSORRT_RTX),
        ("tritonclient", TRITON_SERVER),
    ):
        assert re.search(rf"^{name}=={re.escape(version)}(?: ;|$)", pins, re.MULTILINE), name


def test_the_page_shows_the_table(texts: dict[str, str]) -> None:
    rows = [f"| {' | '.join((p.name, p.version, p.cuda, p.compute_capability, p.known_from))} |" for p in PARTS]
    shown = re.findall(r"^\| .* \|$", texts["docs/gpu.md"].partition("## Train")[0], re.MULTILINE)
    assert shown[1:] == rows


def test_only_the_last_pair_is_for_a_v100() -> None:
    assert (TARGETS["v100"].triton, TARGETS["v100"].tensorrt) == ("24.09", "10.4.0")
    # A newer Triton brings TensorRT 10.5 or newer, which has no plans below 7.5.
    for target in TARGETS.values():
        newer = tuple(map(int, target.tensorrt.split("."))) >= (10, 5)
        assert not newer or float(target.compute_capability) >= 7.5, target.name
