"""The error that a user can correct, and the one place where a command turns it into a sentence."""

from __future__ import annotations

import argparse
import datetime
import errno
import functools
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from unet.machine import limit_threads

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# And the number of the signal, as a shell has it.
_SIGNALLED = 128

# What a write says when nobody reads the output any more: a closed pipe, a closed terminal, a closed connection.
_READER_GONE = frozenset({errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ESHUTDOWN})

# Faults of a disk; the system names no file for a write that fails.
_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE})

# Of the libraries that only some commands need.
_EXTRAS = {
    **dict.fromkeys(("tensorflow", "cv2", "matplotlib"), "train"),
    **dict.fromkeys(("tf2onnx", "onnx", "onnxruntime", "openvino"), "export"),
    "pytriton": "serve",
    "opentelemetry": "otlp",
}

# Characters of a message; what is said of a file may hold a library's print of the whole of it.
_LONGEST = 1500

Main = Callable[[Sequence[str] | None], int]

# What each line on standard error has beside its time, level and message, once lines are JSON.
_json_fields: dict[str, str] | None = None


class UnetError(Exception):
    """Something that the user can correct.

    The message is one sentence that says what was wrong with which file or value and what to do; line ends that a
    library's or a file's own words bring along become spaces, and the middle of very long words is left out. Each area
    derives its own root from this class.
    """

    def __init__(self, message: object = "") -> None:
        line = " ".join(str(message).splitlines())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST * 2 // 3]} ... {line[-_LONGEST // 3 :]}")


def stopping_signals() -> list[signal.Signals]:
    """The signals that tell a process to end in order: SIGTERM, and the SIGHUP of a terminal that was closed.

    The second is left out where `nohup`, or a system that has none, says so.
    """
    known = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def _unwind_when_stopped() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in stopping_signals():
            signal.signal(number, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_SIGNALLED + signum)


class _Output(io.TextIOWrapper):
    """A standard stream whose text is dropped once its reader has gone away, as `head` does."""

    def write(self, text: str, /) -> int:
        """Write text; after a write that fails, all that follows goes to the null device.

        Raises:
            OSError: a write failed for another reason than a lost reader, such as a full disk.
        """
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Pass on what is buffered; failures count as in ``write``."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # The descriptor itself is redirected: libraries in C++ and child processes write to it as well.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if error.errno not in _READER_GONE:
            raise error


def _secure_output() -> None:
    """Make the standard streams ones that stop no work: neither a lost reader nor an unusual letter is an error.

    Streams that somebody else put in place, as a test does, stay.
    """
    # A descriptor that was closed before the start would be given to the next file, which then got our messages.
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif stream is not getattr(sys, f"__{name}__"):
            continue
        elif sys.platform == "win32":  # its console takes text, not bytes
            stream.reconfigure(errors="backslashreplace")
        else:
            stream.flush()
            raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
            setattr(sys, name, _Output(raw, stream.encoding, "backslashreplace", line_buffering=True))


def _complete() -> None:
    """Let the first parser answer the shell that asks for completions, instead of reading the command line."""
    try:
        import argcomplete
    except ImportError:
        return
    parse = argparse.ArgumentParser.parse_known_args

    def answer(parser: argparse.ArgumentParser, *arguments: Any, **named: Any) -> Any:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
        argcomplete.autocomplete(parser)
        return parse(parser, *arguments, **named)

    argparse.ArgumentParser.parse_known_args = answer  # type: ignore[method-assign, assignment]


def command(main: Main) -> Callable[..., int]:
    """Wrap a command's ``main(argv)`` so that faults reach the user as one sentence.

    A command whose reader has gone away (``... | head -1``) does its work to the end, and its exit code tells how that
    went. Its libraries start no more threads than the container's quota has cores.

    ``UnetError``, a library that an extra brings, a fault of a disk and other operating-system errors that name a file
    give exit code 2; Ctrl-C gives 130; SIGTERM and a closed terminal unwind the stack, so that ``finally`` blocks run,
    and give 143 and 129.
    Anything else is a bug in the program and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        if "_ARGCOMPLETE" in os.environ:
            _complete()
        global _json_fields
        _json_fields = None
        _secure_output()
        limit_threads()
        _unwind_when_stopped()
        try:
            return main(argv)
        except UnetError as error:
            complain(f"error: {error}")
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            complain("interrupted")
            return EXIT_INTERRUPTED
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get(str(error.name).split(".")[0])
            if extra is None:
                raise
            where = "" if extra == "otlp" else ", on Python 3.11"
            complain(f"error: {error.name} is not installed: `pip install '.[{extra}]'` brings it{where}")
            return EXIT_USER_ERROR
        except OSError as error:
            if error.filename is None and error.errno not in _DISK_FAULTS:
                raise
            complain(f"error: {_describe(error)}")
            return EXIT_USER_ERROR

    return wrapped


def log_as_json(**fields: str) -> None:
    """From now on each line on standard error is a JSON object: time (UTC), level, message, and these fields."""
    global _json_fields
    _json_fields = fields


def complain(text: str) -> None:
    """Write one line to standard error."""
    if _json_fields is not None:
        level, found, message = text.partition(": ")
        known = bool(found) and level in ("error", "warning")
        moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        words = {"level": level, "message": message} if known else {"level": "info", "message": text}
        text = json.dumps({"time": moment, **words, **_json_fields})
    sys.stderr.write(f"{text}\n")


def _describe(error: OSError) -> str:
    # Of a copy or a new name the file that was to come about.
    found = error.filename if error.filename2 is None else error.filename2
    name = f" {found}" if found is not None else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full while writing{name}: free some space and run the command again"
    return f"cannot use{name or ' a file'}: {error.strerror}"


_warned: set[str] = set()


def warn(text: str) -> None:
    """Tell a user once of something that does not stop the command: one line on standard error."""
    if text not in _warned:
        _warned.add(text)
        complain(f"warning: {text}")


def say(text: str) -> None:
    """Write one line of a command's own output to standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
