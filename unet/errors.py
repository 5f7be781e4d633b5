"""The error that a user can mend, and the one place where a command turns it into a sentence."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn, Optional

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

Main = Callable[[Optional[Sequence[str]]], int]


class UnetError(Exception):
    """Something that the user can mend.

    The message is one sentence that says what was wrong with which file or value and what to do.
    Each area derives its own root from this class.
    """


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_TERMINATED)


def command(main: Main) -> Callable[..., int]:
    """Wrap a command's ``main(argv)`` so that faults reach the user as one sentence.

    ``UnetError``, a full disk and other operating-system errors that name a file give exit code 2;
    Ctrl-C gives 130; SIGTERM unwinds the stack, so that ``finally`` blocks run, and gives 143.
    Anything else is a bug in the program and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return main(argv)
        except UnetError as error:
            _complain(f"error: {error}")
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            _complain("interrupted")
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # The reader of our output went away, as `head` does: nothing is wrong.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            if error.filename is None and error.errno != errno.ENOSPC:
                raise
            _complain(f"error: {_describe(error)}")
            return EXIT_USER_ERROR

    return wrapped


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _describe(error: OSError) -> str:
    name = f" {error.filename}" if error.filename is not None else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full while writing{name}: free some space and run the command again"
    return f"cannot use{name}: {error.strerror}"


def say(text: str) -> None:
    """Write one line of a command's own output to standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
