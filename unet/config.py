"""Settings become flags in one way: a frozen dataclass gives the flags, their defaults and their help."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Settings = TypeVar("Settings")

_HELP, _KIND, _CHOICES, _FLAG = "help", "kind", "choices", "flag"


def setting(
    default: Any,
    text: str,
    *,
    kind: Callable[[str], Any] | None = None,
    choices: Sequence[str] | None = None,
    flag: str = "",
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: the field's default; a tuple makes a flag that takes several values.
        text: the flag's help.
        kind: makes the value from the flag's text. By default the default's type; needed where that is None or a tuple.
        choices: the only values.
        flag: the flag's name without the dashes, where it is not the field's.
    """
    return dataclasses.field(
        default=default,
        metadata={_HELP: text, _KIND: kind or type(default), _CHOICES: choices, _FLAG: flag},
    )


class FlagParser(argparse.ArgumentParser):
    """A parser that shows defaults in its help, and takes ``--like-this`` for ``--like_this``."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in the base class, after each dash inside a flag has become an underscore."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._with_underscores(str(word)) for word in words], namespace)

    def _with_underscores(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        changed = "--" + name[2:].replace("-", "_")
        return f"{changed}{equals}{value}" if changed in self._option_string_actions else word


def add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, settings: type, prefix: str = "") -> None:
    """Add a flag for every field that was made by `setting`; a true-or-false field also gets ``--no_NAME``.

    Args:
        parser: that takes the flags, or a group of one.
        settings: the dataclass.
        prefix: of every flag's name.
    """
    for field, name in _flags(settings, prefix):
        options = {"default": field.default, "help": field.metadata[_HELP]}
        if field.metadata[_KIND] is bool:
            parser.add_argument(f"--{name}", action="store_true", **options)
            parser.add_argument(f"--no_{name}", f"--no-{name}", dest=name, action="store_false", help=f"not --{name}")
            continue
        if isinstance(field.default, tuple):
            options["nargs"] = "+"
        parser.add_argument(f"--{name}", type=field.metadata[_KIND], choices=field.metadata[_CHOICES], **options)


def from_flags(settings: type[Settings], chosen: argparse.Namespace, prefix: str = "", **others: Any) -> Settings:
    """The settings that the parsed flags ask for.

    Args:
        settings: the dataclass whose flags were added with the same ``prefix``.
        chosen: what the parser returned.
        prefix: of every flag's name.
        **others: the fields that are no flags.

    Raises:
        whatever the dataclass raises when it checks itself.
    """
    values = {field.name: getattr(chosen, name) for field, name in _flags(settings, prefix)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return settings(**values, **others)


def fits(settings: type, name: str, value: object) -> bool:
    """Whether a value, out of JSON, is of the kind that a setting has; a whole number also fits a fraction."""
    kind = next(field.metadata[_KIND] for field in dataclasses.fields(settings) if field.name == name)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is kind


def _flags(settings: type, prefix: str) -> Iterator[tuple[dataclasses.Field[Any], str]]:
    for field in dataclasses.fields(settings):
        if _HELP in field.metadata:
            yield field, prefix + (field.metadata[_FLAG] or field.name)
