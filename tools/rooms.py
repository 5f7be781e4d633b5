"""Counts the rooms of the project and the arrows between them: ``python -m tools.rooms``.

A room is a module or a folder directly inside one of the packages; an arrow runs from one room to another that it
imports, imports for type checking included. It fails on a circle between modules, on an arrow between ``train``,
``export`` and ``serve``, and on more arrows or modules than the limits below. With ``--strict`` it also fails on long
files and functions that no comment starting with "# Longer than" explains.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unet.errors import command, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("unet", "train", "export", "serve", "tools")
# None of these may import another of them, nor may `unet` import any.
APART = ("train", "export", "serve")
MOST_ARROWS = {"serve": 20, "export": 15, "unet": 20}
MOST_MODULES = 13
MOST_FILE_LINES = 300
MOST_FUNCTION_LINES = 50
EXCUSE = "# Longer than"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Graph = dict[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the packages by its dotted name; a package's own module has the package's name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(root: Path = ROOT) -> Graph:
    """What each module imports of the project, wherever in the file the import stands."""
    known = modules(root)
    return {name: set(_imported(path, known)) - {name} for name, path in known.items()}


def _imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module)


def circles(graph: Graph) -> list[list[str]]:
    """The groups of modules that import each other in a loop (strongly connected components of more than one)."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def arrows(graph: Graph, package: str) -> set[tuple[str, str]]:
    """The arrows between the rooms of a package; its own ``__init__`` is no room."""
    pairs = set()
    for name, targets in graph.items():
        for target in targets:
            if name.startswith(f"{package}.") and target.startswith(f"{package}."):
                pairs.add((name.split(".")[1], target.split(".")[1]))
    return {(one, other) for one, other in pairs if one != other}


def crossings(graph: Graph) -> list[tuple[str, str]]:
    """Imports that run between rooms that must stay apart."""
    tops = {name: name.split(".")[0] for name in graph}
    return sorted(
        (name, target)
        for name, targets in graph.items()
        for target in targets
        if tops[target] in APART and tops[name] in (*APART, "unet") and tops[name] != tops[target]
    )


def folders(root: Path = ROOT) -> dict[str, int]:
    """How many modules lie directly in each folder, ``__init__`` left out."""
    counts: dict[str, int] = {}
    for path in modules(root).values():
        if path.name != "__init__.py":
            folder = path.parent.relative_to(root).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    return counts


def long_pieces(root: Path = ROOT) -> list[str]:
    """The files and functions that are too long and do not say why.

    A file says why in a comment before its first function or class, a function in one inside it.
    """
    faults = []
    for path in modules(root).values():
        text = path.read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        place = path.relative_to(root).as_posix()
        starts = [node.lineno for node in tree.body if isinstance(node, (*_FUNCTIONS, ast.ClassDef))]
        if len(lines) > MOST_FILE_LINES and not _excused(lines[: min(starts, default=len(lines))]):
            faults.append(f"{place} has {len(lines)} lines, more than {MOST_FILE_LINES}")
        for node in (node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)):
            body = lines[node.lineno - 1 : node.end_lineno]
            if len(body) > MOST_FUNCTION_LINES and not _excused(body):
                faults.append(
                    f"{place}:{node.lineno} {node.name} has {len(body)} lines, more than {MOST_FUNCTION_LINES}"
                )
    return faults


def _excused(lines: Sequence[str]) -> bool:
    return any(line.strip().startswith(EXCUSE) for line in lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts; 1 if a limit is broken."""
    parser = argparse.ArgumentParser(prog="tools.rooms", description=__doc__)
    parser.add_argument("--strict", action="store_true", help="fail on long files and functions too")
    chosen = parser.parse_args(argv)
    graph = imports()
    faults = [f"circle: {' <-> '.join(group)}" for group in circles(graph)]
    faults += [f"{name} imports {target}" for name, target in crossings(graph)]
    for package in PACKAGES:
        found = arrows(graph, package)
        limit = MOST_ARROWS.get(package)
        say(f"{package}: {len(found)} arrows between rooms" + (f", at most {limit}" if limit else ""))
        if limit is not None and len(found) > limit:
            faults.append(f"{package} has {len(found)} arrows: " + ", ".join(f"{a} -> {b}" for a, b in sorted(found)))
    for folder, count in folders().items():
        say(f"{folder}: {count} modules")
        if count > MOST_MODULES:
            faults.append(f"{folder} has {count} modules, more than {MOST_MODULES}")
    if chosen.strict:
        faults += long_pieces()
    for fault in faults:
        say(f"error: {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
