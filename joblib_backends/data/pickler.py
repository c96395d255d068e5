"""cloudpickle, with the bytes of arrays and of large containers out of band."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable
from typing import Any, Final

import cloudpickle
import numpy as np

from .arrays import as_memmap_reference, reduce_array
from .hashing import digest_of
from .values import LARGE_CONTAINER, has_only_leaves

__all__ = ["Pickler", "Standalone", "reduce_by"]

#: Buffers inside such a container that stay in its pickle, where one hash finds all of them together.
_INNER_BELOW: Final = 4_096

#: How objects travel that need more than their pickle, by their exact class; filled by who knows them.
_reducers: Final[dict[type, Callable[[Any], Any]]] = {}


def reduce_by(kind: type, reduce: Callable[[Any], Any]) -> None:
    """Pickle objects of exactly this class as ``reduce(obj)`` says, which is what ``__reduce__`` would return."""
    _reducers[kind] = reduce


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, with arrays reduced so that their bytes can leave the pickle."""

    def __init__(
        self,
        stream: io.BytesIO,
        take_buffer: Callable[[pickle.PickleBuffer], object],
        is_resident: Callable[[int, int], bool],
        has_path: Callable[[str], bool] = lambda path: True,
        begun: dict[int, float] | None = None,
    ) -> None:
        super().__init__(stream, protocol=5, buffer_callback=take_buffer)
        self._is_resident = is_resident
        self._has_path = has_path
        # By their ``id``, objects of which it is noted when they are come to.
        self._begun = begun

    def reducer_override(self, obj: Any) -> Any:
        if self._begun is not None and id(obj) in self._begun:
            self._begun[id(obj)] = time.perf_counter()
        reduced = self._reduce_data(obj)
        return super().reducer_override(obj) if reduced is None else reduced

    def _reduce_data(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is Standalone:
            if not obj.is_lasting:
                return _load_standalone, self._standalone(obj.value)
            if obj.parts is None or obj.digests != _digests(obj.parts[1:]):
                obj.parts = self._standalone(obj.value)
                obj.digests = _digests(obj.parts[1:])
            return _load_standalone, obj.parts
        if kind is np.memmap:
            return as_memmap_reference(obj, self._has_path)
        if kind is not np.ndarray:
            reduce = _reducers.get(kind)
            return None if reduce is None else reduce(obj)
        if not obj.dtype.hasobject:
            return reduce_array(obj, self._is_resident, self._has_path)
        if obj.size < LARGE_CONTAINER or not has_only_leaves(obj.ravel().tolist()):
            return None
        # An array of objects, by its own reduction: the array itself would only come back here.
        return _rebuild_standalone, self._standalone(obj.__reduce__())

    def _standalone(self, value: Any) -> tuple[pickle.PickleBuffer, ...]:
        """Return ``value`` as a pickle that is itself a buffer, so that it can be placed and found by content."""
        buffers: list[pickle.PickleBuffer] = []

        def take(buffer: pickle.PickleBuffer) -> bool:
            is_inner = buffer.raw().nbytes < _INNER_BELOW
            if not is_inner:
                buffers.append(buffer)
            return is_inner

        stream = io.BytesIO()
        Pickler(stream, take, self._is_resident, self._has_path).dump(value)
        return (pickle.PickleBuffer(stream.getvalue()), *buffers)


class Standalone:
    """Marks an object to be pickled on its own: of exact builtin types, pickle asks no hook.

    Parameters
    ----------
    value : object
        What is pickled in the place of this.
    is_lasting : bool, default=False
        Whether its first pickle is used from then on, until its large buffers hold something else.
    """

    __slots__ = ("digests", "is_lasting", "parts", "value")

    def __init__(self, value: Any, *, is_lasting: bool = False) -> None:
        self.value = value
        self.is_lasting = is_lasting
        self.parts: tuple[pickle.PickleBuffer, ...] | None = None
        self.digests: list[bytes] = []


def _digests(buffers: tuple[pickle.PickleBuffer, ...]) -> list[bytes]:
    return [digest_of(buffer.raw()) for buffer in buffers]


def _load_standalone(stream: Any, *buffers: Any) -> Any:
    return pickle.loads(stream, buffers=buffers)


def _rebuild_standalone(stream: Any, *buffers: Any) -> Any:
    make, args, state = pickle.loads(stream, buffers=buffers)
    array = make(*args)
    array.__setstate__(state)
    return array
