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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

__all__ = ["task_randomness"]

#: struct mt19937_state of NumPy: 624 words of 32 bits and a position, reached by the public ``BitGenerator.ctypes``.
_MT19937_NBYTES: Final = 624 * 4 + 4


class _Stream(ABC):
    """One global generator, in which the parent's state and the tasks' state take turns.

    Ctrl-C may come between two steps: whoever changes places next finds out from the flag what is still to be done.
    """

    is_in_place = False

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
        self._parent = random.getstate()
        self.is_in_place = True
        random.setstate(self._tasks)

    def leave(self) -> None:
        self._tasks = random.getstate()
        random.setstate(self._parent)
        self.is_in_place = False


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

    def _generator(self) -> Any:
        """Return the bit generator, or None if the user replaced it by one of another kind."""
        generator = self._random.mtrand._rand._bit_generator
        return generator if type(generator).__name__ == "MT19937" else None

    def enter(self) -> None:
        generator = self._generator()
        raw = b"" if generator is None else _copy_of(generator)
        # One raw state may be that before or after a normal number was taken that waited: only without one it is known.
        if self._parent is None or not raw or raw != self._parent_raw or not self._is_fast:
            self._parent, self._parent_raw = self._random.get_state(legacy=False), raw
        self._is_fast = bool(raw) and not self._parent["has_gauss"] and not self._have_drawn
        self.is_in_place = True
        if generator is None:
            return
        if self._is_fast:
            _overwrite(generator, self._untouched_raw)
        else:
            self._random.set_state(self._tasks)

    def leave(self) -> None:
        generator = self._generator()
        if self._is_fast and generator is not None:
            if _copy_of(generator) == self._untouched_raw:
                _overwrite(generator, self._parent_raw)
                self.is_in_place = False
                return
            self._have_drawn = True
        if generator is not None:
            self._tasks = self._random.get_state(legacy=False)
        if self._parent["bit_generator"] == type(self._random.mtrand._rand._bit_generator).__name__:
            self._random.set_state(self._parent)
        self.is_in_place = False


def _copy_of(generator: Any) -> bytes:
    """Return the raw state, whole: another thread may be drawing without the GIL."""
    with generator.lock:
        return ctypes.string_at(generator.ctypes.state_address, _MT19937_NBYTES)


def _overwrite(generator: Any, raw: bytes) -> None:
    with generator.lock:
        ctypes.memmove(generator.ctypes.state_address, raw, _MT19937_NBYTES)


class TaskRandomness:
    """The global random generators as tasks in calling threads see them.

    Thread-safe. The generators belong to the process: the tasks' streams are in place while any thread is inside and
    none has gone outside again. The lock is held while states are copied.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[object] = set()
        self._outside: set[object] = set()
        self._streams: list[_Stream] = [_PythonStream()]
        self._knows_numpy = False

    def separate(self) -> AbstractContextManager[None]:
        """Let what runs inside the block draw from the tasks' streams, and leave the parent's as they are."""
        return self._counted_among(self._inside)

    def outside(self) -> AbstractContextManager[None]:
        """Let what runs inside the block draw from the parent's streams, though a task runs in another thread.

        For the user's generator of tasks. What the task draws or seeds meanwhile, it draws and seeds there too.
        """
        return self._counted_among(self._outside)

    @contextmanager
    def _counted_among(self, group: set[object]) -> Iterator[None]:
        token = object()
        try:
            self._change(group.add, token)
            yield
        finally:
            self._change(group.discard, token)

    def _change(self, change: Callable[[object], object], token: object) -> None:
        """Note who is where, and put the streams in place that belong there now."""
        with self._lock:
            change(token)
            are_tasks = bool(self._inside) and not self._outside
            if are_tasks and not self._knows_numpy and "numpy.random" in sys.modules:
                self._streams.append(_NumpyStream())
                self._knows_numpy = True
            for stream in self._streams:
                if stream.is_in_place != are_tasks:
                    (stream.enter if are_tasks else stream.leave)()


#: The generators belong to the process, and so does this.
task_randomness = TaskRandomness()


def _start_anew_in_child() -> None:
    # A forked child must neither find the lock taken for ever nor draw its tasks' numbers from its parent's stream.
    task_randomness.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)
