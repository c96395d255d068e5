"""What a method of a step did, in a form in which it can be done again without running the method.

That is possible for a method that sets attributes, returns something and warns. One that changes its input, draws from
a global random generator, or returns a view of its input is found out here, by looking before and after.
"""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, Final, NamedTuple

import numpy as np

from ..data.content import NoContentError, content_of
from ..data.hashing import digest_of
from ..data.values import LARGE_CONTAINER, has_only_leaves
from ..thread_safety import root_package
from .warned import Noted, noting, show_again

__all__ = ["Effects", "Observation", "Thawer", "content_or_none", "frozen"]

#: Types of values that nobody changes in place.
_ATOMS: Final = frozenset({int, float, complex, bool, str, bytes, type(None), type, FunctionType})

#: Packages whose objects draw random numbers only where a parameter random_state says so.
_SAY_WHEN_THEY_DRAW: Final = frozenset({"sklearn", "builtins", "numpy", "scipy", "pandas"})


class Effects(NamedTuple):
    """What a method did."""

    seconds: float
    output: Any
    returned_self: bool = False
    noted: list[Noted] = []  # noqa: RUF012  (defaults of a NamedTuple, never changed)
    #: Attributes that it set, and names of those that it deleted.
    attributes: dict[str, Any] = {}  # noqa: RUF012
    deleted: list[str] = []  # noqa: RUF012

    def apply(self, estimator: Any, thawer: Thawer) -> Any:
        """Do to an object what the method did to another, warn again, and return what the method would."""
        attributes = vars(estimator)
        for name in self.deleted:
            attributes.pop(name, None)
        attributes.update({name: thawer.thaw(value) for name, value in self.attributes.items()})
        show_again(self.noted)
        return estimator if self.returned_self else self.output


class _Frozen(NamedTuple):
    """A large container of plain values, as a pickle of its own."""

    digest: bytes
    stream: Any


def frozen(done: Effects) -> Effects:
    """Return the same, with large containers of plain values among the attributes as pickles of their own.

    A vocabulary of 150,000 words takes 17 ms to load, and 2 ms to copy: each process loads it once
    (benchmarks/sharing.py, "shelf").
    """
    return done._replace(attributes={name: _freeze(value) for name, value in done.attributes.items()})


def _freeze(value: Any) -> Any:
    if type(value) not in (dict, list, set) or len(value) < LARGE_CONTAINER or not has_only_leaves(value):
        return value
    stream = pickle.dumps(value, protocol=5)
    return _Frozen(digest_of(stream), pickle.PickleBuffer(stream))


class Thawer:
    """Loads each large container once for a process, and hands out copies."""

    #: Bytes of pickles whose containers are kept; in memory they take a few times as much.
    _MAX_NBYTES: Final = 50_000_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

    def thaw(self, value: Any) -> Any:
        """Return a value as it was before it was frozen."""
        if type(value) is not _Frozen:
            return value
        with self._lock:
            known = self._loaded.get(value.digest)
        if known is None:
            known = (pickle.loads(value.stream), memoryview(value.stream).nbytes)
            self._remember(value.digest, known)
        return known[0].copy()

    def _remember(self, digest: bytes, loaded: tuple[Any, int]) -> None:
        with self._lock:
            self._loaded[digest] = loaded
            while sum(nbytes for _, nbytes in self._loaded.values()) > self._MAX_NBYTES:
                self._loaded.popitem(last=False)


class Observation:
    """An object and the arguments of its method, from before the method runs.

    Parameters
    ----------
    estimator : object
        The object.
    inputs : tuple
        The arguments.
    attributes_of : callable
        Returns the attributes of the object that are its own.
    """

    def __init__(
        self, estimator: Any, inputs: tuple[Any, ...], attributes_of: Callable[[Any], Mapping[str, Any]]
    ) -> None:
        self._estimator = estimator
        self._inputs = inputs
        self._attributes_of = attributes_of
        self._content = content_or_none(inputs)
        self._generators = _generators_drawn_from(estimator)
        self._before = attributes_of(estimator)
        self._contents = {
            name: content_or_none(value) for name, value in self._before.items() if type(value) not in _ATOMS
        }
        self._output: Any = None
        self._noted: list[Noted] = []
        self.seconds = 0.0

    def run(self, method: Callable[[], Any]) -> Any:
        """Run the method and return what it returns."""
        with noting() as self._noted:
            started = time.perf_counter()
            self._output = method()
            self.seconds = time.perf_counter() - started
        return self._output

    @property
    def left_all_else_alone(self) -> bool:
        """Whether the method did nothing beyond its object, as far as can be told."""
        if self._content is None or content_or_none(self._inputs) != self._content:
            return False
        return _generators_drawn_from(self._estimator) == self._generators

    @property
    def returned_a_view(self) -> bool:
        """Whether what it returned may be a part of what it was given, so that who changes one changes the other."""
        if self._output is self._estimator:
            return False
        if any(self._output is one for one in self._inputs):
            return True
        given = [array for one in self._inputs for array in _arrays_of(one)]
        return any(np.may_share_memory(array, one) for array in _arrays_of(self._output) for one in given)

    def effects(self, *, may_change: bool) -> Effects | None:
        """Return what the method did to its object, or None if that cannot be told.

        ``may_change`` says whether it may have changed the object at all; a transform that does is not repeatable.
        """
        after = self._attributes_of(self._estimator)
        changed = {name: value for name, value in after.items() if self._has_changed(name, value)}
        deleted = [name for name in self._before if name not in after]
        cannot_be_told = any(content is None for content in self._contents.values())
        if not may_change and (changed or deleted or cannot_be_told):
            return None
        returned_self = self._output is self._estimator
        output = None if returned_self else self._output
        return Effects(self.seconds, output, returned_self, self._noted, changed, deleted)

    def _has_changed(self, name: str, value: Any) -> bool:
        if name not in self._before or value is not self._before[name]:
            return True
        content = self._contents.get(name)
        return content is not None and content != content_or_none(value)


def content_or_none(value: Any) -> bytes | None:
    """Return the identity of a value, or None if it has none."""
    try:
        return content_of(value)
    except NoContentError:
        return None


def _arrays_of(value: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the arrays that a value consists of."""
    if isinstance(value, np.ndarray):
        yield value
    elif type(value).__module__.startswith("pandas") and hasattr(value, "to_numpy"):
        columns = [column for _, column in value.items()] if hasattr(value, "columns") else [value]
        yield from (np.asarray(column) for column in columns if isinstance(getattr(column, "dtype", None), np.dtype))
    elif type(value).__module__.startswith("scipy.sparse"):
        for part in vars(value).values():
            parts = part if isinstance(part, tuple) else (part,)
            yield from (one for one in parts if isinstance(one, np.ndarray))


def _generators_drawn_from(estimator: Any) -> bytes | None:
    """Return the state of the global random generators, where code of others may draw from them unseen.

    What has a parameter random_state says so: None means another draw at each fit, and one is as good as another.
    Python's own generator tells something only in the main thread: in a Dask worker, others draw from it all the time.
    """
    if not _may_draw_unseen(estimator):
        return None
    is_main = threading.current_thread() is threading.main_thread()
    return content_of((np.random.get_state(), random.getstate() if is_main else None))


def _may_draw_unseen(estimator: Any) -> bool:
    get_params = getattr(estimator, "get_params", None)
    parameters = get_params(deep=True).values() if callable(get_params) else ()
    return any(map(_is_code_of_others, (estimator, *parameters)))


def _is_code_of_others(value: Any) -> bool:
    if isinstance(value, type):
        return False
    if root_package(type(value)) in _SAY_WHEN_THEY_DRAW:
        return isinstance(value, FunctionType)
    return callable(value) or (hasattr(value, "fit") and not hasattr(value, "random_state"))
