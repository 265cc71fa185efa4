"""Pictures as bytes: what a figure or a page is made of."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..painting import Images

__all__ = ["contact_sheet", "eight_bit"]


def eight_bit(images: ArrayLike | Images) -> NDArray[np.uint8]:
    """Pictures [..., 3, H, W] as uint8. Those that are uint8 stay as they are; floats are cut to
    [0, 1], times 255, rounded.

    Raises ValueError for another shape or type, and for values that are not finite.

        eight_bit(np.full((3, 8, 8), 0.5)).max()  # 128
    """
    pixels = _array(images)
    if pixels.ndim < 3 or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ValueError(f"pictures are [..., 3, H, W], with at least one; got {pixels.shape}")
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "f":
        raise ValueError(f"pictures are floats in [0, 1] or uint8, not {pixels.dtype}: divide them")
    if not np.isfinite(pixels).all():
        raise ValueError("the pictures hold NaN or infinite values")
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def contact_sheet(
    images: ArrayLike | Images, columns: int | None = None, gap: int = 2
) -> NDArray[np.uint8]:
    """One picture [3, H', W'] uint8 out of many [..., 3, H, W], row by row, white gaps between.

    images: uint8 or in [0, 1]. columns: pictures in a row; by default all of them, in one row.
    gap: in pixels.

        contact_sheet(np.zeros((6, 3, 64, 64)), columns=3).shape  # (3, 130, 196)
    """
    tiles = eight_bit(images)
    tiles = tiles.reshape(-1, *tiles.shape[-3:])
    columns = len(tiles) if columns is None else columns
    if columns < 1:
        raise ValueError(f"contact_sheet: columns={columns}; give at least 1")
    count_rows = -(-len(tiles) // columns)
    height, width = tiles.shape[-2:]
    shape = (3, count_rows * (height + gap) - gap, columns * (width + gap) - gap)
    sheet = np.full(shape, 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = tile
    return sheet


def _array(images: Any) -> NDArray:
    """An array of what is given; pictures that are read when asked for are read as bytes."""
    if isinstance(images, Images):
        return np.stack([pixels.numpy() for pixels in images.bytes()]).reshape(images.shape)
    return np.asarray(images)
