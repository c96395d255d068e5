"""What a method of a step did, in a form in which it can be done again without running the method.

That is possible for a method that sets attributes, returns something and warns. One that changes its input, or draws
from a global random generator, is found out here by looking before and after; it is not shared.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, Final, NamedTuple

import numpy as np

from ..data.content import NoContentError, content_of
from ..thread_safety import root_package
from .warned import Noted, noting, show_again

__all__ = ["Effects", "Observation", "content_or_none"]

#: Types of values that nobody changes in place.
_ATOMS: Final = frozenset({int, float, complex, bool, str, bytes, type(None), type, FunctionType})


class Effects(NamedTuple):
    """What a method did."""

    seconds: float
    output: Any
    noted: list[Noted] = []  # noqa: RUF012  (a default of a NamedTuple, never changed)
    #: Attributes that it set, and names of those that it deleted.
    attributes: dict[str, Any] = {}  # noqa: RUF012
    deleted: list[str] = []  # noqa: RUF012

    def apply(self, estimator: Any) -> None:
        """Do to an object what the method did to another, and warn again."""
        attributes = vars(estimator)
        for name in self.deleted:
            attributes.pop(name, None)
        attributes.update(self.attributes)
        show_again(self.noted)


class Observation:
    """An object and the arguments of its method, before the method runs.

    Parameters
    ----------
    estimator : object
        The object.
    inputs : object
        The arguments.
    attributes_of : callable
        Returns the attributes of the object that are its own.
    """

    def __init__(self, estimator: Any, inputs: Any, attributes_of: Callable[[Any], Mapping[str, Any]]) -> None:
        self._estimator = estimator
        self._inputs = inputs
        self._attributes_of = attributes_of
        self._content = content_or_none(inputs)
        self._generators = _generators_drawn_from(estimator)
        self._before = attributes_of(estimator)
        self._contents = {
            name: content_or_none(value) for name, value in self._before.items() if type(value) not in _ATOMS
        }

    def run(self, method: Callable[[], Any]) -> tuple[Any, Effects | None]:
        """Run the method; return its output, and what it did, or None if that cannot be done again."""
        with noting() as noted:
            started = time.perf_counter()
            output = method()
            seconds = time.perf_counter() - started
        if self._content is None or content_or_none(self._inputs) != self._content:
            return output, None
        if _generators_drawn_from(self._estimator) != self._generators:
            return output, None
        after = self._attributes_of(self._estimator)
        changed = {name: value for name, value in after.items() if self._has_changed(name, value)}
        deleted = [name for name in self._before if name not in after]
        return output, Effects(seconds, None if output is self._estimator else output, noted, changed, deleted)

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


def _generators_drawn_from(estimator: Any) -> bytes | None:
    """Return the state of the global random generators where code of others may draw from them unseen.

    What has a parameter random_state says so: None means another draw at each fit, and one is as good as another.
    """
    if root_package(type(estimator)) == "sklearn" or hasattr(estimator, "random_state"):
        return None
    return content_of((np.random.get_state(), random.getstate()))
