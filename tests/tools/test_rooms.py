"""The rooms of the project: no circle, no arrow where none may be, and the counts that were agreed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import rooms


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert rooms.circles(rooms.imports()) == []


def test_train_export_and_serve_stay_apart() -> None:
    assert rooms.crossings(rooms.imports()) == []


@pytest.mark.parametrize(("package", "most"), rooms.MOST_ARROWS.items())
def test_rooms_have_few_arrows(package: str, most: int) -> None:
    assert 0 < len(rooms.arrows(rooms.imports(), package)) <= most


def test_no_folder_has_too_many_modules() -> None:
    assert max(rooms.folders().values()) <= rooms.MOST_MODULES


def test_a_circle_and_a_crossing_are_found() -> None:
    graph = {
        "serve.a": {"serve.b"},
        "serve.b": {"serve.c"},
        "serve.c": {"serve.a"},
        "unet.d": {"train.e"},
        "train.e": set(),
    }
    assert rooms.circles(graph) == [["serve.a", "serve.b", "serve.c"]]
    assert rooms.crossings(graph) == [("unet.d", "train.e")]
    assert rooms.arrows(graph, "serve") == {("a", "b"), ("b", "c"), ("c", "a")}


def test_long_files_and_functions_are_found_unless_they_say_why(tmp_path: Path) -> None:
    body = "".join(f"    x = {number}\n" for number in range(60))
    filler = "y = 1\n" * 300
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "short.py").write_text("def f():\n    x = 1\n")
    (folder / "function.py").write_text(
        f"def f():\n{body}\ndef g():\n    # Longer than 50 lines: said in another function.\n    pass\n"
    )
    (folder / "method.py").write_text("class A:\n    def g(self):\n" + body.replace("    ", "        "))
    (folder / "excused.py").write_text(f"def f():\n    # Longer than 50 lines: one table.\n{body}")
    (folder / "file.py").write_text(
        f"{filler}def f():\n    # Longer than 300 lines is said too late here.\n    x = 1\n"
    )
    (folder / "table.py").write_text(f"# Longer than 300 lines: one table.\n{filler}")
    assert rooms.long_pieces(tmp_path) == [
        "unet/file.py has 303 lines, more than 300",
        "unet/function.py:1 f has 61 lines, more than 50",
        "unet/method.py:2 g has 61 lines, more than 50",
    ]
