"""How NumPy arrays enter a pickle, where NumPy's own way would copy their bytes into it.

NumPy hands out a buffer for contiguous arrays of plain numbers only. Here the rest joins in: strided views of
memory that is resident already, dates, and memmaps, which travel by file name.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .files import Fingerprint, check_file

__all__ = ["address_of", "as_memmap_reference", "owns_all", "reduce_array", "root_owner"]

Array = np.ndarray[Any, Any]

#: Bytes below which an array is left to NumPy: a special way saves less than it costs.
_SMALL: Final = 4_096

#: A strided view is sent as the memory it spans when that is at most so many times its own size.
_MAX_SPAN: Final = 64


def reduce_array(
    array: Array, is_resident: Callable[[int, int], bool], has_path: Callable[[str], bool] = lambda path: True
) -> Any:
    """Return the reduction of an exact ndarray without objects, or None to leave it to NumPy.

    ``is_resident(low, high)`` tells whether the memory between two addresses was placed as a whole, ``has_path(path)``
    whether workers have the file.
    """
    reference = as_memmap_reference(array, has_path)
    if reference is not None or array.nbytes < _SMALL:
        return reference
    if array.dtype.kind in "mM":
        # Dates export no buffer; the same bytes as integers do.
        return _view_as, (array.view(np.int64), array.dtype)
    if array.flags.forc:
        return None
    low, high = _byte_bounds(array)
    span = _memory_between(array, low, high) if high - low <= _MAX_SPAN * array.nbytes else None
    if span is not None and is_resident(low, high):
        return _strided, (span, array.dtype, array.shape, array.strides, address_of(array) - low)
    # The order of the axes stays: numerical libraries may add up in another order along another axis.
    copied = array.copy(order="K")
    return _same, (copied if copied.flags.forc else np.ascontiguousarray(copied),)


def as_memmap_reference(array: Array, has_path: Callable[[str], bool] = lambda path: True) -> Any:
    """Return the reduction of an array over a user's memmap to file name and offset, or None if it has no file.

    Changes made through mode "c" are not in the file, so such an array travels by content.
    """
    backing = _backing_memmap(array)
    path = None if backing is None or not _is_file(backing.filename) else os.path.abspath(backing.filename)
    if path is None or backing.mode == "c" or not array.size or not has_path(path):
        # A memmap without a file of its own (a copy, an anonymous mapping), or of nothing, is an ordinary array.
        return (_same, (np.asarray(array),)) if type(array) is np.memmap else None
    low, high = _byte_bounds(array)
    mode = "r" if backing.mode == "r" else "r+"
    file_offset = backing.offset + low - address_of(backing)
    layout = (array.dtype, array.shape, array.strides, address_of(array) - low)
    fingerprint = Fingerprint.of(path, is_written=mode == "r+")
    return _open_memmap, (path, mode, file_offset, high - low, *layout, fingerprint)


def root_owner(exporter: Any) -> Any:
    """Return the array at the end of the chain of bases: as long as it lives, so does the memory."""
    while isinstance(exporter, np.ndarray) and isinstance(exporter.base, np.ndarray):
        exporter = exporter.base
    return exporter


def owns_all(owner: Any, nbytes: int) -> bool:
    """Return whether ``nbytes`` are the whole memory of ``owner`` and not a window of it."""
    return bool(getattr(owner, "nbytes", None) == nbytes)


def address_of(buffer: Any) -> int:
    """Return the address of the first element of an array, or of the first byte of a buffer."""
    array = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)
    return int(array.__array_interface__["data"][0])


def _byte_bounds(array: Array) -> tuple[int, int]:
    """Return the lowest address and the one after the highest (numpy.lib.array_utils.byte_bounds needs NumPy 2)."""
    low = high = address_of(array)
    for length, stride in zip(array.shape, array.strides, strict=True):
        reach = (length - 1) * stride
        low, high = (low + reach, high) if reach < 0 else (low, high + reach)
    return low, high + array.itemsize


def _memory_between(array: Array, low: int, high: int) -> Array | None:
    """Return the bytes from ``low`` to ``high`` of the memory that ``array`` is a view of, as a flat array."""
    root = root_owner(array)
    flat = root if root.flags.c_contiguous else root.T
    start = low - address_of(root)
    if not flat.flags.c_contiguous or root.dtype.hasobject or start < 0 or start + high - low > root.nbytes:
        return None
    between: Array = flat.reshape(-1).view(np.uint8)[start : start + high - low]
    return between


def _backing_memmap(array: Any) -> Any:
    """Return the memmap that opened the file behind ``array``, or None."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
            return array
        array = array.base
    return None


def _is_file(filename: Any) -> bool:
    return filename is not None and os.path.isfile(filename)


def _same(array: Array) -> Array:
    return array


def _view_as(array: Array, dtype: Any) -> Array:
    return array.view(dtype)


def _strided(span: Array, dtype: Any, shape: Any, strides: Any, offset: int) -> Array:
    return np.ndarray(shape, dtype, buffer=span, offset=offset, strides=strides)


def _open_memmap(
    path: str,
    mode: Any,
    file_offset: int,
    nbytes: int,
    dtype: Any,
    shape: Any,
    strides: Any,
    offset: int,
    fingerprint: Fingerprint,
) -> Array:
    check_file(path, fingerprint)
    span = np.memmap(path, np.uint8, mode, file_offset, (nbytes,))
    return np.ndarray.__new__(np.memmap, shape, dtype, span, offset, strides)
