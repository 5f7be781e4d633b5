from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from unet.config import FlagParser, add_flags, from_flags, setting


@dataclass(frozen=True)
class Example:
    folder: Path
    steps_per_s: float = setting(0.5, "steps in a second")
    name: str = setting("unet", "which one", choices=("unet", "vnet"), flag="model_name")
    sizes: tuple[int, ...] = setting((), "of a tile", kind=int)
    key: Path | None = setting(None, "file with a key", kind=Path)
    fast: bool = setting(False, "in a hurry")
    careful: bool = setting(True, "looking twice")


def parse(*words: str, prefix: str = "") -> Example:
    parser = FlagParser(prog="example")
    add_flags(parser, Example, prefix)
    return from_flags(Example, parser.parse_args(words), prefix, folder=Path("here"))


def test_without_flags_the_defaults_count() -> None:
    assert parse() == Example(Path("here"))


def test_every_field_has_its_flag_and_the_old_spelling_is_taken() -> None:
    wanted = Example(Path("here"), 2.0, "vnet", (204, 252), Path("key-file"), fast=True, careful=False)
    words = ["--steps_per_s", "2", "--model_name", "vnet", "--sizes", "204", "252", "--key", "key-file", "--fast"]
    assert parse(*words, "--no_careful") == wanted
    dashes = ["--steps-per-s=2", "--model-name=vnet", "--sizes", "204", "252", "--key", "key-file", "--fast"]
    assert parse(*dashes, "--no-careful") == wanted


def test_a_prefix_keeps_two_dataclasses_apart() -> None:
    assert parse("--watch_steps_per_s", "3", prefix="watch_").steps_per_s == 3


def test_an_unknown_flag_or_choice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--folder", "x"], ["--model_name", "wnet"], ["--no-such-flag"]):
        with pytest.raises(SystemExit, match="2"):
            parse(*words)
        assert "usage: example" in capsys.readouterr().err
