"""The identity of a task: equal in every process that runs the same task, another when its result could be another.

Counted are the function and its arguments, all code of the user that they can reach, the versions of installed
packages from which the rest comes, and those of Python, NumPy and SciPy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from ..data.content import NoContentError
from ..data.hashing import digest_of
from ..thread_safety import innermost, root_package
from .code import ByObject, CodeIdentities, PersistentPickler
from .modules import DISTRIBUTIONS, version_of

__all__ = ["TaskIdentities"]

#: Arrays from this size on are hashed once per call, smaller ones for every task (0.3 ms at 30 GB/s).
_LARGE_NBYTES: Final = 10_000_000

#: What is looked at of a large array to see whether it was filled anew: so many blocks of so many bytes, 20 µs.
_N_BLOCKS: Final = 64
_BLOCK_NBYTES: Final = 4_096

#: Elements from which a list is data.
_LONG: Final = 64

#: The bits of results change with these, whatever the task itself comes from.
_ALWAYS: Final = ("numpy", "scipy")

_PYTHON: Final = f"python {sys.version_info.major}.{sys.version_info.minor}"


class TaskIdentities:
    """Identities of the tasks of one call, with what was found out for tasks before: one per call.

    Not thread-safe: joblib dispatches one batch at a time. Objects are remembered, not kept alive.

    A large array (10 MB and more) is hashed once. When it comes again only blocks of it are compared, so a buffer that
    is filled anew for every task is noticed; single elements that are set in place between two tasks of a call are not.
    """

    def __init__(self) -> None:
        self._codes = CodeIdentities()
        self._arrays: ByObject[tuple[bytes, Any]] = ByObject()
        self._data: ByObject[bytes] = ByObject()
        self._fixed = (_PYTHON, sys.implementation.name, [(root, _installed(root)) for root in _ALWAYS])

    def __repr__(self) -> str:
        return f"<TaskIdentities {self.versions()}>"

    def of(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        ignored: frozenset[str] = frozenset(),
        arguments: Mapping[str, Any] | None = None,
        generators_have_content: bool = False,
    ) -> bytes | None:
        """Return the identity of a task, 16 bytes, or None if it has none.

        A task has none when an argument cannot be pickled or is a live random generator.

        Parameters
        ----------
        function, args, kwargs
            The task as joblib has it.
        ignored : frozenset of str
            Names of arguments that do not count.
        arguments : mapping, optional
            The arguments by name, in the place of ``args`` and ``kwargs``. For functions known to leave their data as
            they are: frames, sparse matrices and long lists among these are looked at once per call.
        generators_have_content : bool
            Whether a random generator counts by its state, where each task has its own.
        """
        if arguments is not None:
            args, kwargs = (), {name: self._once(value) for name, value in arguments.items() if name not in ignored}
        named = sorted((name, value) for name, value in kwargs.items() if name not in ignored) if kwargs else []
        pickler = _TaskPickler(self._codes)
        pickler.arrays, pickler.generators_have_content = self._arrays, generators_have_content
        try:
            return pickler.digest((self._fixed, _callee(function), args, named))
        except NoContentError:
            return None

    def versions(self) -> str:
        """Return the versions that count for the identities so far, to be read."""
        found = {**dict(self._fixed[2]), **dict(sorted(self._codes.packages.items()))}
        texts = [f"{DISTRIBUTIONS.get(root, root)} {version}" for root, version in found.items() if version]
        return ", ".join([_PYTHON, *texts])

    def _once(self, value: Any) -> Any:
        """Return what stands for an argument that is data and not an array: those are hashed fast enough."""
        if not _is_data(value):
            return value
        known = self._data.get(value)
        if known is None:
            try:
                known = _TaskPickler(self._codes).digest(value)
            except NoContentError:
                return value
            self._data.put(value, known)
        return "data", known


class _TaskPickler(PersistentPickler):
    """Writes a task. Code in it has an identity of its own."""

    arrays: ByObject[tuple[bytes, Any]] | None = None
    generators_have_content = False

    def beside(self) -> _TaskPickler:
        pickler = _TaskPickler(self.codes)
        pickler.arrays, pickler.generators_have_content = self.arrays, self.generators_have_content
        return pickler

    def known_code(self, value: Any) -> Any:
        return self.codes.of(value)

    def known_generator(self, generator: Any) -> Any:
        # pickle writes all of its state.
        return None if self.generators_have_content else super().known_generator(generator)

    def known_array(self, array: np.ndarray[Any, Any]) -> Any:
        if self.arrays is None or type(array) is not np.ndarray or array.nbytes < _LARGE_NBYTES:
            return super().known_array(array)
        known = self.arrays.get(array)
        if known is not None and known[0] == _sample_of(array):
            return known[1]
        identity = super().known_array(array)
        if identity is not None and identity[0] == "array" and array.flags.forc:
            self.arrays.put(array, (_sample_of(array), identity))
        return identity


def _callee(function: Any) -> Any:
    """Return what is called: of scikit-learn's wrapper the function and the configuration that it sets.

    Not its warning filters: they grow with what happens to be imported, and say what is shown.
    """
    inner = getattr(function, "function", None)
    if inner is not None and inner is innermost(function) and root_package(type(function)) == "sklearn":
        return "with configuration", inner, getattr(function, "config", None)
    return function


def _is_data(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) >= _LONG
    return hasattr(value, "shape") and not isinstance(value, np.ndarray | np.generic)


def _sample_of(array: np.ndarray[Any, Any]) -> bytes:
    flat = (array if array.flags.c_contiguous else array.T).reshape(-1).view(np.uint8)
    distance = flat.size // _N_BLOCKS
    blocks = flat[: distance * _N_BLOCKS].reshape(_N_BLOCKS, distance)[:, :_BLOCK_NBYTES]
    return digest_of(np.ascontiguousarray(blocks)) + digest_of(flat[-_BLOCK_NBYTES:])


def _installed(root: str) -> str:
    return version_of(root) or ""
