"""Keep tasks that run in the calling thread away from its global random generators.

In a worker process ``np.random.seed(i)`` in a task leaves the parent's generator alone, from which the generator that
yields the tasks may well draw. With ``tier="auto"`` it depends on timing which tasks the calling thread runs, so the
two streams are kept apart there too: tasks see a stream of their own, which starts from the system's entropy as that
of a new worker does, and goes on from one task to the next.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["task_randomness"]

#: struct mt19937_state of NumPy: 624 words of 32 bits and a position, reached by the public ``BitGenerator.ctypes``.
_MT19937_NBYTES: Final = 624 * 4 + 4


class _Stream(ABC):
    """One global generator, in which the parent's state and the tasks' state take turns."""

    @abstractmethod
    def enter(self) -> None:
        """Put the tasks' state in the place of the parent's."""

    @abstractmethod
    def leave(self) -> None:
        """Put the parent's state back."""


class _PythonStream(_Stream):
    """The generator of the module ``random``."""

    def __init__(self) -> None:
        self._parent: Any = None
        self._tasks: Any = random.Random().getstate()

    def enter(self) -> None:
        parent = random.getstate()
        self._parent = parent
        random.setstate(self._tasks)

    def leave(self) -> None:
        if self._parent is not None:
            self._tasks = random.getstate()
            random.setstate(self._parent)
            self._parent = None


class _NumpyStream(_Stream):
    """The legacy generator of ``numpy.random``.

    NumPy's own get_state and set_state take 35 µs each, many tasks 1 µs, and few draw. While no task has drawn yet, the
    raw state, half a microsecond to copy, tells whether one did now, and only then the former are called: no task comes
    back by itself to a state that was taken from the system's entropy. The raw state lacks the second of two normal
    numbers that are made at a time: where the parent has one waiting, NumPy's own functions are called.
    """

    def __init__(self) -> None:
        from numpy import random as numpy_random

        self._random: Any = numpy_random
        self._parent: Any = None
        self._parent_raw = b""
        self._tasks: Any = numpy_random.RandomState().get_state(legacy=False)
        key, position = self._tasks["state"]["key"], int(self._tasks["state"]["pos"])
        self._untouched_raw = bytes(key.tobytes() + position.to_bytes(4, sys.byteorder))
        self._have_drawn = False
        self._is_fast = False

    def _address(self) -> int | None:
        """Return where the raw state is, or None if the user replaced the generator by one of another kind."""
        generator = self._random.mtrand._rand._bit_generator
        return int(generator.ctypes.state_address) if type(generator).__name__ == "MT19937" else None

    def enter(self) -> None:
        address = self._address()
        raw = b"" if address is None else ctypes.string_at(address, _MT19937_NBYTES)
        # One raw state may be that before or after a normal number was taken that waited: only without one it is known.
        if self._parent is None or not raw or raw != self._parent_raw or not self._is_fast:
            self._parent, self._parent_raw = self._random.get_state(legacy=False), raw
        self._is_fast = bool(raw) and not self._parent["has_gauss"] and not self._have_drawn
        if address is None:
            return
        if self._is_fast:
            ctypes.memmove(address, self._untouched_raw, _MT19937_NBYTES)
        else:
            self._random.set_state(self._tasks)

    def leave(self) -> None:
        address = self._address()
        if self._is_fast and address is not None:
            if ctypes.string_at(address, _MT19937_NBYTES) == self._untouched_raw:
                ctypes.memmove(address, self._parent_raw, _MT19937_NBYTES)
                return
            self._have_drawn = True
        if address is not None:
            self._tasks = self._random.get_state(legacy=False)
        if self._parent["bit_generator"] == type(self._random.mtrand._rand._bit_generator).__name__:
            self._random.set_state(self._parent)


class TaskRandomness:
    """The global random generators as tasks in calling threads see them.

    Thread-safe. The generators belong to the process: the tasks' streams are in place while any thread is inside, and
    the parent's come back with the last. The lock is held while states are copied.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[object] = set()
        self._streams: list[_Stream] = [_PythonStream()]
        self._knows_numpy = False

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Let what runs inside the block draw from the tasks' streams, and leave the parent's as they are."""
        token = self.enter()
        try:
            yield
        finally:
            self.leave(token)

    def enter(self) -> object:
        """Put the tasks' streams in place until the object that is returned is given to :meth:`leave`."""
        token = object()
        with self._lock:
            self._inside.add(token)
            if len(self._inside) > 1:
                return token
            if not self._knows_numpy and "numpy.random" in sys.modules:
                self._streams.append(_NumpyStream())
                self._knows_numpy = True
            for stream in self._streams:
                stream.enter()
        return token

    def leave(self, token: object) -> None:
        """Put the parent's streams back, if nobody else is inside."""
        with self._lock:
            was_inside = token in self._inside
            self._inside.discard(token)
            if was_inside and not self._inside:
                for stream in self._streams:
                    stream.leave()


#: The generators belong to the process, and so does this.
task_randomness = TaskRandomness()


def _start_anew_in_child() -> None:
    # A forked child must neither find the lock taken for ever nor draw its tasks' numbers from its parent's stream.
    task_randomness.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)
