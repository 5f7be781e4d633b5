"""The volumes of one command as a list of jobs: checked first, then done one after the other."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from serve.segment.errors import Action, ClientError, ServerError
from serve.volume.run import check_volume, is_done
from serve.volume.space import require_space
from unet.errors import UnetError, complain
from unet.files import remove_abandoned
from unet.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serve.volume.request import Request


class State(Enum):
    """Where a job stands."""

    PLANNED = "planned"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass
class VolumeJob:
    """One volume that is to be segmented.

    Attributes:
        source: the volume.
        state: where it stands.
        fault: why it failed.
    """

    source: Path
    state: State = State.PLANNED
    fault: UnetError | None = None


class JobList:
    """All volumes of a command; one that fails is reported and does not stop the others.

    Attributes:
        jobs: in their order.
    """

    def __init__(self, sources: Sequence[Path], request: Request, *, tta: bool = False) -> None:
        """Check what was asked for, before any work.

        Args:
            sources: the volumes.
            request: what is wanted of each.
            tta: whether the mean of several views is.

        Raises:
            ClientError: results would go over an input or over each other, or there is too little room for them.
        """
        self.jobs, self._request = [VolumeJob(source) for source in sources], request
        self._refuse_clashes()
        with contextlib.ExitStack() as stack:
            wanted = []
            for job in self.jobs:
                try:
                    volume = stack.enter_context(open_volume(job.source))
                    check_volume(volume, request)
                    if request.resume and is_done(volume, request, tta=tta):
                        self._note_done(job)
                    else:
                        wanted.append((volume, request))
                except UnetError as error:
                    self._note_failed(job, error)
            require_space(wanted, tta=tta)

    def _refuse_clashes(self) -> None:
        """Check that nothing is lost: no input, and no result of this very command."""
        request = self._request
        taken = {job.source.resolve(): job.source for job in self.jobs}
        for source in [job.source for job in self.jobs]:
            for path in (
                *request.files(source),
                request.partial_folder(source),
                request.shards_folder(source),
            ):
                other = taken.setdefault(path.resolve(), source)
                if other is not source or path.resolve() == source.resolve():
                    raise ClientError(
                        f"what is found in {source} would be written to {path}, over what belongs to {other}: choose "
                        "another --output_dir"
                    )

    def _note_done(self, job: VolumeJob) -> None:
        job.state = State.DONE
        # What a kill at the very end has left.
        shutil.rmtree(self._request.partial_folder(job.source), ignore_errors=True)
        shards = self._request.shards_folder(job.source)
        remove_abandoned(shards.parent, shards.name)
        if not self._request.quiet:
            complain(f"{job.source} is done already: {', '.join(map(str, self._request.targets(job.source).values()))}")

    def _note_failed(self, job: VolumeJob, error: UnetError) -> None:
        job.state, job.fault = State.FAILED, error
        if len(self.jobs) > 1:
            complain(f"error: {error}")

    @property
    def planned(self) -> list[VolumeJob]:
        """What is still to be done."""
        return [job for job in self.jobs if job.state is State.PLANNED]

    def run(self, work: Callable[[Path], None]) -> None:
        """Do what is planned.

        Args:
            work: does one volume. A fault of the servers, which the next volume would meet too, ends the list.

        Raises:
            BaseException: what stops the whole command, such as Ctrl-C or a full disk.
        """
        for job in self.planned:
            job.state = State.RUNNING
            try:
                work(job.source)
                job.state = State.DONE
            except UnetError as error:
                self._note_failed(job, error)
                if isinstance(error, ServerError) and error.action is not Action.STOP:
                    return

    def check(self) -> None:
        """Say what was not done.

        Raises:
            UnetError: the only volume's own error, or how many of several failed and were not begun.
        """
        failed = [job.fault for job in self.jobs if job.fault is not None]
        if not failed:
            return
        if len(self.jobs) == 1:
            raise failed[0]
        left = len(self.planned)
        rest = f"{left} were not begun; run the same command with --resume" if left else "the others are done"
        raise ClientError(f"{len(failed)} of {len(self.jobs)} volumes failed, for the reasons above; {rest}")
