"""Image volumes in and out: stacks of equal grey slices, read and written without holding them in memory."""

from unet.volume.labels import (
    MASKS,
    NOT_ANNOTATED,
    LabelOptions,
    add_label_flags,
    label_blocks,
    label_options,
    read_labels,
)
from unet.volume.limits import IMAGE_LIMITS, LABEL_LIMITS, PROBABILITY_LIMITS, Limits, StackError, page_range
from unet.volume.metadata import StackMetadata
from unet.volume.ngff.canvas import ZarrCanvas
from unet.volume.ngff.reader import ZarrStack
from unet.volume.opening import open_volume
from unet.volume.pairs import check_pair, labels_of, load_pair, read_images, stacks_in
from unet.volume.tiff.canvas import StackCanvas
from unet.volume.tiff.reader import StackReader
from unet.volume.tiff.writer import StackWriter
from unet.volume.volume import BLOCK_PX, Volume

__all__ = [
    "BLOCK_PX",
    "IMAGE_LIMITS",
    "LABEL_LIMITS",
    "MASKS",
    "NOT_ANNOTATED",
    "PROBABILITY_LIMITS",
    "LabelOptions",
    "Limits",
    "StackCanvas",
    "StackError",
    "StackMetadata",
    "StackReader",
    "StackWriter",
    "Volume",
    "ZarrCanvas",
    "ZarrStack",
    "add_label_flags",
    "check_pair",
    "label_blocks",
    "label_options",
    "labels_of",
    "load_pair",
    "open_volume",
    "page_range",
    "read_images",
    "read_labels",
    "stacks_in",
]
