"""The one gate that every answer passes before a pixel of it is used, whichever way it came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.errors import Action, ServerError
from unet.geometry import output_size
from unet.names import OUTPUT

if TYPE_CHECKING:
    from serve.segment.slot import Slot

# The bits of 1.0. The bits of a number from 0 to 1, read as an unsigned integer, are at most these; those of larger
# numbers, infinities, NaN and all negative numbers are above.
_BITS_OF_ONE = {np.dtype(np.float16): (np.uint16, 0x3C00), np.dtype(np.float32): (np.uint32, 0x3F800000)}


def check_probabilities(
    values: npt.NDArray[Any], shape: tuple[int, ...], dtype: npt.DTypeLike, whence: str
) -> npt.NDArray[Any]:
    """Give back probabilities that are what they must be.

    Args:
        values: what came.
        shape: that it must have.
        dtype: that it must have, float16 or float32.
        whence: where it came from, for the error.

    Raises:
        ServerError: it has another shape or dtype, or values that are not from 0 to 1.
    """
    if values.shape != shape or values.dtype != dtype:
        raise _wrong(whence, f"{values.dtype} {list(values.shape)} instead of {np.dtype(dtype)} {list(shape)}")
    kind, most = _BITS_OF_ONE[values.dtype]
    # One pass over integers. Minus zero, which is from 0 to 1 too, is rare enough for a second one.
    if values.size and values.view(kind).max() > most and not ((values >= 0) & (values <= 1)).all():
        bad = values[~((values >= 0) & (values <= 1))]
        raise _wrong(whence, f"{bad.size} values that are not from 0 to 1, {bad[0]:g} the first of them")
    return values


def probabilities(slot: Slot, answer: Any, count: int) -> npt.NDArray[np.float16]:
    """The probabilities of an answer to the first ``count`` tiles of a slot: float16 [count, 1, S - 184, S - 184].

    Raises:
        ServerError: the answer is not whole, is of another model version, or holds what are no probabilities.
    """
    connection, response = slot.connection, answer.get_response()
    if connection.model_version and response.model_version != connection.model_version:
        raise ServerError(
            f"{connection.url} answered with {connection.model_name} version {response.model_version} instead of "
            f"{connection.model_version}: see its log",
            Action.LEAVE,
        )
    side = output_size(slot.shape[-1])
    shape = (count, 1, side, side)
    said = [(output.name, output.datatype, tuple(output.shape)) for output in response.outputs]
    if said != [(OUTPUT, "FP16", shape)]:
        listed = ", ".join(f"{name} {datatype} {list(dims)}" for name, datatype, dims in said) or "nothing"
        raise _wrong(connection.url, f"{listed} instead of {OUTPUT} FP16 {list(shape)}")
    try:
        values = slot.outputs(answer, count)
    except ValueError as error:  # fewer or more bytes than the shape has
        raise _wrong(connection.url, f"pixels that do not fit their shape ({error})") from error
    check_probabilities(values, shape, np.float16, connection.url)
    return values


def _wrong(whence: str, what: str) -> ServerError:
    return ServerError(f"{whence} answered with {what}: see its log, and publish the model again", Action.LEAVE)
