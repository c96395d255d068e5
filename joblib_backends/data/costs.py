"""What the time to encode tasks goes into, argument by argument.

While a task is pickled it is noted when the pickler comes to each of its arguments; what lies between two of them
belongs to the first. That costs nothing for tasks which are quick to pickle: nobody notes anything for those.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from .pickler import Standalone

__all__ = ["ArgumentCosts"]

#: Seconds to encode a batch from which on its arguments are looked at, in the batches that follow.
_SLOW_S: Final = 2e-3

#: Tasks that are looked at.
_ENOUGH: Final = 50

#: Items of a container that may take long to pickle.
_MANY: Final = 100


class ArgumentCosts:
    """What encoding the tasks of one call goes into. Used under the lock of who encodes."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        # By their names, the last object, and whether it came again. Weakly: a task's data goes with the task.
        self._last: dict[str, weakref.ref[Any]] = {}
        self._again: set[str] = set()
        self._n_seen = 0
        self._is_slow = True

    def note_batch(self, seconds: float) -> None:
        """Note what the last batch took: it decides whether the next is looked at."""
        self._is_slow = seconds > _SLOW_S

    def begun(self, values: Sequence[Any]) -> dict[int, float] | None:
        """Return where to note when the arguments of a task are come to, by their ``id``; None where nobody does."""
        if not self._is_slow or self._n_seen >= _ENOUGH:
            return None
        return dict.fromkeys(map(id, values), 0.0)

    def add(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], begun: dict[int, float]) -> None:
        """Add a task that was pickled just now."""
        ended = time.perf_counter()
        self._n_seen += 1
        values = (*args, *kwargs.values())
        if any(not begun.get(id(value)) and _may_take_long(value) for value in values):
            # The pickler does not tell when it comes to a builtin container: its time would be that of another.
            return
        names = [*_names_of(function, len(args)), *kwargs]
        starts = [
            (begun[id(value)], name, value) for name, value in zip(names, values, strict=True) if begun.get(id(value))
        ]
        starts.sort(key=lambda start: start[0])
        ends = [start for start, _, _ in starts[1:]] + [ended]
        for (start, name, value), end in zip(starts, ends, strict=False):  # of builtin types, no start is known
            title = f"`{name}`, a {_kind_of(value)}"
            self._seconds[title] += end - start
            last = self._last.get(title)
            if last is not None and last() is (value.value if type(value) is Standalone else value):
                self._again.add(title)
            # Builtin containers cannot be held so: large ones are found by content, whoever brings them.
            with contextlib.suppress(TypeError):
                self._last[title] = weakref.ref(value.value if type(value) is Standalone else value)

    @property
    def costliest(self) -> str:
        """The argument that took more than half of the time that is known of, and its type.

        Empty if none did, or each task has another object there: that must travel.
        """
        whole = sum(self._seconds.values())
        costliest = (name for name, seconds in self._seconds.items() if seconds > whole / 2)
        return next((name for name in costliest if name in self._again), "")


def _may_take_long(value: Any) -> bool:
    return isinstance(value, list | tuple | dict | set | frozenset) and len(value) > _MANY


def _names_of(function: Any, n_args: int) -> list[str]:
    """Return what a function calls its positional arguments."""
    try:
        parameters = inspect.signature(getattr(function, "function", function)).parameters.values()
    except Exception:  # the user's own __signature__, too: a name is no reason to fail
        parameters = ()  # type: ignore[assignment]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [one.name for one in parameters if one.kind in positional][:n_args]
    return names + [f"argument {position}" for position in range(len(names), n_args)]


def _kind_of(value: Any) -> str:
    # Of what is pickled apart, it is the object itself that people know.
    return type(value.value if type(value) is Standalone else value).__name__
