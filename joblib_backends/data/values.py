"""What tasks of a batch may share, and what a container may lose by being pickled alone: values that cannot change.

Tasks that share a batch must not share an object that one of them could change, and a large container may travel on
its own only if no task can tell its items from equal copies.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import chain
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final

import numpy as np

__all__ = [
    "LARGE_CONTAINER",
    "Task",
    "cannot_change",
    "has_only_leaves",
    "is_large",
    "is_pickled_whole",
    "is_small_and_immutable",
]

Task = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

#: Values that tasks may share, since nobody can change them: such tasks travel in one pickle.
_IMMUTABLE: Final = frozenset({int, float, complex, bool, str, bytes, type(None), FunctionType, BuiltinFunctionType})

#: The part of them that needs no second look; a function may have captured what can change.
_ATOMS: Final = frozenset({int, float, complex, bool, type(None)})

#: Values inside a container that nobody tells from an equal copy; NumPy's void is the one scalar that can change.
_LEAVES: Final = _IMMUTABLE.union(
    {date, datetime, time, timedelta, Decimal}, frozenset(np.sctypeDict.values()) - {np.void, np.object_}
)

#: Builtin containers that, as a direct argument, are pickled on their own and placed when they are large.
_CONTAINERS: Final = frozenset({list, tuple, dict, set, frozenset, str, bytes, bytearray})

#: Packages whose objects are made of buffers, which leave the pickle.
_OF_DATA: Final = frozenset({"numpy", "scipy", "pandas", "pyarrow", "polars"})

#: Items (or characters) from which such a container is worth a look: below it, a pickle has under 1 MiB anyway.
LARGE_CONTAINER: Final = 1_000


def is_large(value: Any, threshold: int) -> bool:
    return type(value) in _CONTAINERS and len(value) >= min(LARGE_CONTAINER, threshold)


def is_pickled_whole(value: Any) -> bool:
    """Return whether an object is pickled bit by bit, as models and containers of them are: no atom, and no table."""
    kind = type(value)
    package = getattr(kind, "__module__", "").partition(".")[0]
    return kind not in _LEAVES and package not in _OF_DATA and not (kind in _CONTAINERS and has_only_leaves(value))


def has_only_leaves(value: Any) -> bool:
    """Return whether nothing inside ``value`` can be told from an equal copy; one level of tuples is looked into."""
    kind = type(value)
    if kind in _LEAVES:
        return kind not in _IMMUTABLE or cannot_change(value)
    if kind is bytearray:
        return True
    if kind not in _CONTAINERS:
        return False
    items = chain(value, value.values()) if kind is dict else value
    return all(type(item) in _LEAVES or (type(item) is tuple and _all_leaves(item)) for item in items)


def _all_leaves(items: tuple[Any, ...]) -> bool:
    return all(type(item) in _LEAVES for item in items)


def is_small_and_immutable(task: Task) -> bool:
    function, args, kwargs = task
    return (
        cannot_change(function)
        and all(cannot_change(value) and not is_large(value, LARGE_CONTAINER) for value in args)
        and all(cannot_change(value) and not is_large(value, LARGE_CONTAINER) for value in kwargs.values())
    )


def cannot_change(value: Any) -> bool:
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is FunctionType:
        # What a closure captured can change, and then the next task must get it as it was sent.
        return value.__closure__ is None
    if kind is BuiltinFunctionType:
        # abs belongs to its module, but stack.pop to a list.
        return isinstance(value.__self__, ModuleType | type)
    return kind in _IMMUTABLE
