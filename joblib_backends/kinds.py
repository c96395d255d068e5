"""What kind of task a batch holds: the name under which its experience is kept, and the bytes it works on.

Two tasks are of one kind when the same function works on the same classes of estimators and on data of about the same
size, with the same number of jobs: then one tells how long the other takes. Nothing of the data goes into the name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .thread_safety import innermost, root_package

__all__ = ["Kind", "kind_of"]

#: Packages whose objects are data, whatever class they have.
_DATA: Final = frozenset({"builtins", "numpy", "scipy", "pandas", "pyarrow", "polars", "collections", "_thread"})

#: Steps of a pipeline that the name shows.
_MAX_STEPS: Final = 8

#: Arrays looked at in a list of arrays.
_MAX_ITEMS: Final = 64


@dataclass(frozen=True)
class Kind:
    """A kind of task."""

    name: str
    #: Bytes of the arrays and tables among the arguments of one task.
    nbytes: int


def kind_of(function: Callable[[], Any], n_jobs: int) -> Kind:
    """Return the kind of a batch's first task; some 10 µs, once a call."""
    items = getattr(function, "items", None)
    callee, args, kwargs = items[0] if items else (function, (), {})
    values = (*args, *kwargs.values())
    nbytes = sum(map(_nbytes_of, values))
    inner = innermost(callee)
    name = f"{getattr(inner, '__module__', None)}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    owner = getattr(callee, "__self__", None)
    estimators = [_estimator_name(value) for value in (owner, *values) if _is_estimator(value)]
    size = nbytes.bit_length() // 2
    return Kind(f"{name}({', '.join(estimators)}) of 4**{size} bytes, {n_jobs} jobs", nbytes)


def _is_estimator(value: Any) -> bool:
    return value is not None and not isinstance(value, type) and root_package(type(value)) not in _DATA and (
        hasattr(value, "get_params") or hasattr(value, "fit")
    )  # fmt: skip


def _estimator_name(estimator: Any, depth: int = 0) -> str:
    name = type(estimator).__qualname__
    attributes = getattr(estimator, "__dict__", {})
    steps = attributes.get("steps") or attributes.get("transformers") or attributes.get("estimators") or ()
    inner = [step[1] for step in steps[:_MAX_STEPS] if isinstance(step, tuple | list) and len(step) > 1]
    inner += [attributes[key] for key in ("estimator", "base_estimator") if key in attributes]
    names = [_estimator_name(step, depth + 1) for step in inner if _is_estimator(step) and depth < 4]
    return f"{name}({', '.join(names)})" if names else name


def _nbytes_of(value: Any) -> int:
    """Return the bytes of an array, table or sparse matrix, or of the arrays in a short list, without touching them."""
    if isinstance(value, list | tuple):
        return sum(map(_nbytes_of, value)) if len(value) <= _MAX_ITEMS else 8 * len(value)
    if root_package(type(value)) not in _DATA:
        return 0
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        # A table, or a sparse matrix, which holds fewer: asking pandas for its memory takes 100 µs.
        stored = getattr(value, "nnz", None)
        cells = 1
        for extent in shape:
            cells *= int(extent) if isinstance(extent, int) else 1
        return 8 * (stored if isinstance(stored, int) else cells)
    return 0
