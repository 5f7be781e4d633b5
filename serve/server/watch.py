"""Watches a running server: a model that says it is ready and does not answer is loaded again.

Triton still calls a model ready when its python backend has died, and leaves its requests without an answer. So the
watcher looks at the backend's processes, and sends a real request, the canary, now and then. A canary that waits behind
other requests does not count as a failure as long as the server answers those.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from serve.models.backend import BACKEND_CODE_FILE
from serve.server.control import control_of, require_state
from serve.server.install import TritonError
from serve.server.regions import start_ticks
from serve.server.state import load_state
from unet.errors import say

if TYPE_CHECKING:
    from serve.server.settings import WatchSettings


class Watcher:
    """Looks after the models of one running server.

    Args:
        state_dir: that the server was started with.
        settings: how it is watched.

    Raises:
        TritonError: no server runs, or it was started without model control.
    """

    def __init__(self, state_dir: Path, settings: WatchSettings) -> None:
        self._state_dir, self._settings = state_dir, settings
        self._control, self._state = control_of(state_dir), require_state(state_dir)
        self._failed: Counter[str] = Counter()
        # The models that the server's children work for, by process number: a dead one no longer tells.
        self._workers: dict[int, str] = {}

    def run(self) -> None:
        """Watch until the server is stopped."""
        with contextlib.suppress(ProcessLookupError):
            guard = os.pidfd_open(self._state.guard_pid)
            try:
                self._workers = self._living()
                say(f"watching {', '.join(self._state.models)}")
                # Checked after opening, so that the descriptor is of that process. It is readable when that ended.
                while start_ticks(self._state.guard_pid) == self._state.guard_start:
                    self.look()
                    if select.select([guard], [], [], self._settings.interval_s)[0]:
                        return
            finally:
                os.close(guard)

    def look(self) -> None:
        """Load again every model of which a process has died, or which failed its canary often enough."""
        self._look_at_state()
        for model in self._bereaved():
            say(f"a process of {model} has died")
            self._reload(model)
        for model in self._state.models:
            try:
                self._control.canary(model, self._settings.timeout_s)
                self._failed[model] = 0
            except TritonError as error:
                self._failed[model] += 1
                say(f"canary {self._failed[model]} of {self._settings.failures} of {model} failed: {error}")
            if self._failed[model] >= self._settings.failures:
                self._reload(model)
        self._workers |= self._living()

    def _look_at_state(self) -> None:
        """Notice that the server was started again, or serves another model."""
        state = load_state(self._state_dir)
        if state is None:  # it is being stopped
            return
        if state.server_pid != self._state.server_pid:
            self._failed.clear()
            self._workers.clear()
        self._state = state

    def _living(self) -> dict[int, str]:
        """The models by the numbers of the processes that run their code: the code's path is on the command line."""
        found = {}
        for child in self._children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is none either
                for path in map(Path, child.cmdline()):
                    if path.name == BACKEND_CODE_FILE and path.parent.parent.name in self._state.models:
                        found[child.pid] = path.parent.parent.name
        return found

    def _bereaved(self) -> list[str]:
        """The models that have lost a process since the last look. Triton leaves the dead as zombies."""
        dead = set()
        for child in self._children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it went in order, as when the server stops
                if child.status() == psutil.STATUS_ZOMBIE:
                    dead.add(child.pid)
        return sorted({self._workers.pop(pid) for pid in dead & set(self._workers)})

    def _children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._state.server_pid).children()
        return []

    def _reload(self, model: str) -> None:
        started = time.monotonic()
        self._failed[model] = 0
        try:
            self._control.reload(model)
        except TritonError as error:
            say(f"{model} could not be loaded again: {error}")
        else:
            say(f"{model} was loaded again in {time.monotonic() - started:.1f} s")


def watch(state_dir: Path, settings: WatchSettings) -> None:
    """Watch the server that was started with a folder, until it is stopped.

    Raises:
        TritonError: no server runs, or it was started without model control.
    """
    Watcher(state_dir, settings).run()
