"""Keep tasks that run in the calling thread away from its global random generators.

In a worker process ``np.random.seed(i)`` in a task leaves the parent's generator alone, from which the generator that
yields the tasks may well draw. With ``tier="auto"`` it depends on timing which tasks the calling thread runs, so the
two streams are kept apart there too: tasks see a stream of their own, which starts from the system's entropy as that
of a new worker does, and goes on from one task to the next.
"""

from __future__ import annotations

import ctypes
import random
import sys
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
        self._parent = random.getstate()
        random.setstate(self._tasks)

    def leave(self) -> None:
        self._tasks = random.getstate()
        random.setstate(self._parent)


class _NumpyStream(_Stream):
    """The legacy generator of ``numpy.random``.

    NumPy's own get_state and set_state take 35 µs each, many tasks 1 µs, and few draw. The raw state, half a
    microsecond to copy, tells whether somebody drew since the last look, and only then the former are called. It does not
    hold the second of two normal numbers that are made at a time: while the parent has one waiting, the slow way is taken.
    """

    def __init__(self) -> None:
        from numpy import random as numpy_random

        self._random: Any = numpy_random
        self._parent: Any = None
        self._parent_raw = b""
        self._tasks: Any = numpy_random.RandomState().get_state(legacy=False)
        self._tasks_raw = self._raw_of(self._tasks)
        self._is_fast = False

    @staticmethod
    def _raw_of(state: Any) -> bytes:
        return bytes(state["state"]["key"].tobytes() + int(state["state"]["pos"]).to_bytes(4, sys.byteorder))

    def _address(self) -> int | None:
        """Return where the raw state is, or None if the user replaced the generator by one of another kind."""
        generator = self._random.mtrand._rand._bit_generator
        return int(generator.ctypes.state_address) if type(generator).__name__ == "MT19937" else None

    def enter(self) -> None:
        address = self._address()
        raw = b"" if address is None else ctypes.string_at(address, _MT19937_NBYTES)
        if self._parent is None or raw != self._parent_raw or not raw or self._parent["has_gauss"]:
            self._parent, self._parent_raw = self._random.get_state(legacy=False), raw
        self._is_fast = address is not None and not self._parent["has_gauss"]
        if self._is_fast and address is not None:
            ctypes.memmove(address, self._tasks_raw, _MT19937_NBYTES)
        elif address is not None:
            self._random.set_state(self._tasks)

    def leave(self) -> None:
        address = self._address()
        if address is not None and self._is_fast:
            raw = ctypes.string_at(address, _MT19937_NBYTES)
            if raw == self._tasks_raw:
                ctypes.memmove(address, self._parent_raw, _MT19937_NBYTES)
                return
        if address is not None:
            # Without a normal number that waits: it would make the next turn slow, and is as good as a fresh one.
            self._tasks = {**self._random.get_state(legacy=False), "has_gauss": 0, "gauss": 0.0}
            self._tasks_raw = self._raw_of(self._tasks)
        if self._parent["bit_generator"] == type(self._random.mtrand._rand._bit_generator).__name__:
            self._random.set_state(self._parent)


class TaskRandomness:
    """The global random generators as tasks in the calling thread see them. For one thread at a time."""

    def __init__(self) -> None:
        self._python = _PythonStream()
        self._numpy: _NumpyStream | None = None

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Let what runs inside the block draw from the tasks' streams, and leave the parent's as they are."""
        if self._numpy is None and "numpy.random" in sys.modules:
            self._numpy = _NumpyStream()
        streams: list[_Stream] = [self._python] if self._numpy is None else [self._python, self._numpy]
        for stream in streams:
            stream.enter()
        try:
            yield
        finally:
            for stream in streams:
                stream.leave()


#: The generators belong to the process, and so does this.
task_randomness = TaskRandomness()
