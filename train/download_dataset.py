"""Fetch the slices of the ISBI 2012 challenge: ``python train/download_dataset.py --data_dir data``.

They are free for generating or testing non-commercial image segmentation software; cite Cardona et al. 2010, PLoS
Biology e1000502.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from train.errors import TrainError
from unet.errors import UnetError, command, say
from unet.files import atomic_file, naming, sha256_of
from unet.volume import StackReader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIRRORS = (
    "https://downloads.imagej.net/ISBI-2012-challenge.zip",
    "http://downloads.imagej.net/ISBI-2012-challenge.zip",
)
# Of the pages' uint8 pixels one after another: the same slices may be packed into a TIFF in several ways.
PIXELS_SHA256 = {
    "train-volume.tif": "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760",
    "train-labels.tif": "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36",
    "test-volume.tif": "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9",
}
_TIMEOUT_S = 30.0
_BLOCK = 1 << 20


class _MirrorError(Exception):
    """Why a mirror did not give the archive."""


class _BrokenOffError(Exception):
    """Why an answer broke off."""


def pixels_sha256(path: Path) -> str:
    """The SHA-256 of a stack's pixels, page after page, in hexadecimal.

    Raises:
        StackError: if the file is not a whole stack of slices.
    """
    digest = hashlib.sha256()
    with StackReader(path) as reader:
        for page in reader:
            digest.update(np.ascontiguousarray(page).tobytes())
    return digest.hexdigest()


def download(folder: Path, mirrors: Sequence[str] = MIRRORS, expected: Mapping[str, str] = PIXELS_SHA256) -> list[Path]:
    """Fetch the stacks that ``folder`` does not hold yet; each appears whole and checked, or not at all.

    What has arrived of the archive is kept when it breaks off, and the next call resumes there.

    Args:
        folder: where the stacks go, and meanwhile the archive.
        mirrors: addresses of the same ZIP archive, tried in this order.
        expected: the stacks' names, and the SHA-256 of their pixels.

    Returns:
        The stacks that were fetched; none where all are there.

    Raises:
        TrainError: if no mirror gives an archive with these stacks, or one in ``folder`` has other pixels.
    """
    missing = {name: digest for name, digest in expected.items() if not (folder / name).exists()}
    for name in expected.keys() - missing.keys():
        if pixels_sha256(folder / name) != expected[name]:
            raise TrainError(f"{folder / name} is there but has other pixels: move it away, or fetch to another folder")
    if not missing:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".download.zip.part"
    reasons = []
    for mirror in mirrors:
        try:
            _fetch(mirror, part)
            fetched = _unpack(part, folder, missing)
        except _MirrorError as reason:
            reasons.append(f"{mirror}: {reason}")
            continue
        part.unlink()
        return fetched
    raise TrainError(
        f"the slices could not be fetched ({'; '.join(reasons)}): try again later, it resumes from what "
        f"has arrived, or put {', '.join(missing)} into {folder} yourself"
    )


def _fetch(mirror: str, part: Path) -> None:
    """Complete ``part``, going on as long as each attempt brings more."""
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_more(mirror, part):
                return
            reason = "it breaks off"
        except urllib.error.HTTPError as error:
            raise _MirrorError(f"it answers {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise _MirrorError(f"it cannot be reached, {error.reason}") from error
        except (http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # this machine's fault, not the mirror's
            reason = f"it breaks off, {error or type(error).__name__}"
        except _BrokenOffError as error:
            reason = f"it breaks off, {error}"
        if not part.exists() or part.stat().st_size <= before:
            raise _MirrorError(reason)


def _fetch_more(mirror: str, part: Path) -> bool:
    """Add to ``part`` what one answer brings; whether it is whole then."""
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(mirror, headers={"Range": f"bytes={have}-"} if have else {})
    except ValueError as error:
        raise _MirrorError(f"it is no address, {error}") from error
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return True  # nothing is left to send
        raise
    with answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the mirror starts anew
        length: int | None = getattr(answer, "length", None)  # a file has none
        with (
            naming(part),
            part.open("ab" if have else "wb") as stream,
            tqdm(
                total=None if length is None else have + length, initial=have, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            while block := _read(answer):
                stream.write(block)
                bar.update(len(block))
    return length is None or part.stat().st_size == have + length


def _read(answer: Any) -> bytes:
    """The next block of an answer; its faults are the mirror's, others those of this machine's disk."""
    try:
        return bytes(answer.read(_BLOCK))
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error


def _unpack(archive: Path, folder: Path, wanted: Mapping[str, str]) -> list[Path]:
    """Take the wanted stacks out of an archive, wherever in it they are."""
    fetched = []
    try:
        with zipfile.ZipFile(archive) as opened:
            places = {Path(item.filename).name: item for item in opened.infolist() if "__MACOSX" not in item.filename}
            for name, digest in wanted.items():
                if name not in places:
                    raise _MirrorError(f"its archive has no {name}")
                with atomic_file(folder / name) as aside:
                    with opened.open(places[name]) as packed, aside.open("wb") as plain:
                        shutil.copyfileobj(packed, plain, _BLOCK)
                    if pixels_sha256(aside) != digest:
                        raise _MirrorError(f"its {name} has other pixels than the challenge's")
                fetched.append(folder / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, UnetError) as error:
        archive.unlink()
        raise _MirrorError(f"its archive is damaged, {error}") from error
    except _MirrorError:
        archive.unlink()
        raise
    return fetched


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the challenge's slices."""
    parser = argparse.ArgumentParser(
        prog="train/download_dataset.py",
        description="Fetch the slices of the ISBI 2012 challenge (free for non-commercial segmentation software; cite "
        "Cardona et al. 2010, PLoS Biology e1000502).",
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where they go (default: data)")
    parser.add_argument(
        "--mirror", action="append", help="address of ISBI-2012-challenge.zip, instead of the known ones; repeatable"
    )
    chosen = parser.parse_args(argv)
    fetched = download(chosen.data_dir, chosen.mirror or MIRRORS)
    for path in fetched:
        say(f"{path}: sha256 {sha256_of(path)}")
    if not fetched:
        say(f"{', '.join(PIXELS_SHA256)} are in {chosen.data_dir} already, and whole")
    return 0


if __name__ == "__main__":
    sys.exit(main())
