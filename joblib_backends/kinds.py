"""What kind of task a batch holds: the name under which its experience is kept, and the bytes it works on.

Two tasks are of one kind when the same function works on the same classes of estimators and on data of about the same
size, with the same number of jobs: then one tells how long the other takes. Nothing of the data goes into the name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from .thread_safety import innermost, root_package

__all__ = ["Kind", "kind_of"]

#: Packages whose objects are data, whatever class they have.
_DATA: Final = frozenset({"builtins", "numpy", "scipy", "pandas", "pyarrow", "polars", "collections", "_thread"})

#: Steps of a pipeline that the name shows.
_MAX_STEPS: Final = 8

#: How deep estimators inside of estimators are named.
_MAX_DEPTH: Final = 4

#: Values looked at for their size, those in lists among them; a longer list counts by its length.
_MAX_ITEMS: Final = 256


@dataclass(frozen=True)
class Kind:
    """A kind of task."""

    name: str
    #: Bytes of the arrays and tables among the arguments of one task.
    nbytes: int


def kind_of(function: Callable[[], Any], n_jobs: int) -> Kind:
    """Return the kind of a batch's first task; some 10 µs, once a call. Never raises: a name is no reason to fail."""
    items = getattr(function, "items", None)
    callee, args, kwargs = items[0] if items else (function, (), {})
    inner = innermost(callee)
    name = f"{getattr(inner, '__module__', None)}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    values = (*args, *kwargs.values())
    try:
        nbytes = _nbytes_of(values)
        names = [_estimator_name(value) for value in (getattr(callee, "__self__", None), *values)]
    except Exception:
        # An argument's own code: a proxy whose attributes raise, or an attribute that is not what it is called.
        nbytes, names = 0, []
    estimators = ", ".join(name for name in names if name)
    return Kind(f"{name}({estimators}) of 4**{nbytes.bit_length() // 2} bytes, {n_jobs} jobs", nbytes)


def _is_estimator(value: Any) -> bool:
    if value is None or isinstance(value, type) or root_package(type(value)) in _DATA:
        return False
    return hasattr(type(value), "get_params") or hasattr(type(value), "fit")


def _estimator_name(value: Any, depth: int = 0) -> str:
    """Return the class of an estimator with those inside of it, or "" for anything else."""
    if not _is_estimator(value):
        return ""
    name = type(value).__qualname__
    attributes = getattr(value, "__dict__", {})
    inner = [attributes[key] for key in ("estimator", "base_estimator") if key in attributes]
    for key in ("steps", "transformers", "estimators"):
        steps = attributes.get(key)
        if isinstance(steps, list | tuple):
            inner += [step[1] for step in steps[:_MAX_STEPS] if isinstance(step, tuple | list) and len(step) > 1]
    names = [_estimator_name(step, depth + 1) for step in inner] if depth < _MAX_DEPTH else []
    shown = ", ".join(filter(None, names))
    return f"{name}({shown})" if shown else name


def _nbytes_of(values: Iterable[Any]) -> int:
    """Return the bytes of arrays, tables and sparse matrices, also in short lists, without touching them."""
    nbytes, waiting, n_looked_at = 0, list(values), 0
    while waiting and n_looked_at < _MAX_ITEMS:
        value = waiting.pop()
        n_looked_at += 1
        if isinstance(value, list | tuple):
            if len(value) <= _MAX_ITEMS:
                waiting.extend(value)
            else:
                nbytes += 8 * len(value)
        elif root_package(type(value)) in _DATA:
            nbytes += _nbytes_of_data(value)
    return nbytes


def _nbytes_of_data(value: Any) -> int:
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple):
        return 0
    # A table, or a sparse matrix, which holds fewer: asking pandas for its memory takes 100 µs.
    stored = getattr(value, "nnz", None)
    if isinstance(stored, int):
        return 8 * stored
    return 8 * math.prod(int(extent) for extent in shape if isinstance(extent, int))
