"""Whether a volume's pixels are of the network's size, and the volume scaled to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.segment.errors import ClientError
from unet.errors import warn
from unet.volume.metadata import typical_pixel_nm
from unet.volume.scaled import ScaledVolume

if TYPE_CHECKING:
    from serve.segment.segmenter import Segmenter
    from unet.volume import Volume

# By more than a quarter.
_MOST_DIFFERENT = 1.25


def as_seen(segmenter: Segmenter, volume: Volume, *, resample: bool) -> Volume:
    """The volume as the network is to see it; without ``resample`` another pixel size is only said.

    Raises:
        ClientError: if it is to be scaled and a pixel size is not known.
    """
    own, trained = typical_pixel_nm([volume.metadata.pixel_size_nm]), segmenter.interface.pixel_size_nm
    if resample:
        _, height, width = volume.metadata.pixel_size_nm
        if height is None or width is None or trained is None:
            whose = (
                "the network, which does not name one" if trained is None else f"{volume.path}, which does not say it"
            )
            raise ClientError(
                f"--resample needs the pixel size of {whose}: leave it out, or write the size into the file"
            )
        rows, columns = round(volume.height * height / trained), round(volume.width * width / trained)
        if (rows, columns) == (volume.height, volume.width):
            return volume
        return ScaledVolume(volume, max(1, rows), max(1, columns))
    if own is not None and trained is not None and not 1 / _MOST_DIFFERENT < own / trained < _MOST_DIFFERENT:
        warn(
            f"{volume.path} has pixels of {own:.3g} nm and the network was trained on {trained:.3g} nm: add --resample "
            "to scale the slices to its size and the results back"
        )
    return volume
