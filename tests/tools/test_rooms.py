"""The rooms of the project: no circle, no arrow where none may be, and the counts that were agreed."""

from __future__ import annotations

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
