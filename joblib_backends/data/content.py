"""The identity of a value: a hash of its content and types, equal for equal values whoever made them.

Type-strict: 1, 1.0 and True are three values, as are a list and a tuple. Pickle does the walking, without its memo:
with it, two equal values differ when one of them holds the same object twice. What has no content (a live random
generator, a lock) has no identity.

Identities are compared within a process only: a function that no module holds is known by its address. A subclass of
:class:`ContentPickler` may know code, generators and arrays by more than that.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
from collections.abc import Collection
from types import FunctionType, ModuleType
from typing import Any, Final

import numpy as np

from .arrays import as_memmap_reference
from .hashing import digest_of

__all__ = ["PLAIN", "ContentPickler", "NoContentError", "content_of", "is_found_by_name"]

#: Values that change when they are used.
_GENERATORS: Final = (np.random.RandomState, np.random.Generator, np.random.BitGenerator, random.Random)

#: What pickle writes as it is, without asking anybody; a vocabulary has 100,000 of them.
PLAIN: Final = frozenset({str, int, float, complex, bytes, bool, type(None), tuple, list, dict})

#: Containers whose order says nothing.
_SETS: Final = frozenset({set, frozenset})


class NoContentError(Exception):
    """A value whose content cannot be established. Never reaches the user: such a value is just not shared."""


def content_of(value: Any) -> bytes:
    """Return the identity of ``value``, 16 bytes.

    Objects are known by their class and by what pickle would keep of them, functions and classes by their name where
    that leads to them and else by their address, so keep the value alive as long as the identity. A user's memmap is
    known by its file and the time of its last change.

    Raises
    ------
    NoContentError
        If something in it has no content: a live random generator, or what cannot be pickled.
    """
    return ContentPickler().digest(value)


class ContentPickler(pickle.Pickler):
    """Writes what one value is; nothing reads it back. pickle asks for the persistent id of everything, first."""

    def __init__(self) -> None:
        self._stream = io.BytesIO()
        super().__init__(self._stream, protocol=5)
        # No memo. It is deprecated because it cannot end on cyclic values; here those are an error, as they should be.
        self.fast = True

    def digest(self, value: Any) -> bytes:
        """Return the identity of ``value``, 16 bytes; to be asked once.

        Raises
        ------
        NoContentError
            If something in it has no content.
        """
        try:
            self.dump(value)
        except NoContentError:
            raise
        except Exception as error:
            raise NoContentError(f"A {type(value).__name__} has no content to compare: {error}.") from error
        return digest_of(self._stream.getbuffer())

    def persistent_id(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return None
        if kind in _SETS:
            return kind.__name__, self.parts_of_set(value)
        if kind is FunctionType or isinstance(value, type | ModuleType):
            return self.known_code(value)
        if isinstance(value, np.ndarray):
            return self.known_array(value)
        if isinstance(value, _GENERATORS):
            return self.known_generator(value)
        if kind.__module__.startswith("scipy.sparse"):
            # Without what a matrix has found out about itself when it was asked.
            return "sparse", kind, {name: part for name, part in vars(value).items() if not name.startswith("_has_")}
        if hasattr(kind, "get_params") and hasattr(value, "__dict__"):
            # All of an estimator, whatever its own pickle leaves out.
            return "estimator", kind, {name: _request(name, part) for name, part in vars(value).items()}
        return None

    def parts_of_set(self, values: Collection[Any]) -> Any:
        """Return the identities of the elements of a set, in an order that does not depend on their hashes."""
        return sorted(map(content_of, values))

    def known_code(self, value: Any) -> Any:
        """Return what a function, a class or a module is known by."""
        return _name_of(value)

    def known_array(self, array: np.ndarray[Any, Any]) -> Any:
        """Return what an array is known by, or None to let pickle look into its objects."""
        return _identity_of_array(array)

    def known_generator(self, generator: Any) -> Any:
        """Return what a live random generator is known by."""
        raise NoContentError(f"A {type(generator).__name__} changes whenever it is used.")


def _request(name: str, value: Any) -> Any:
    # scikit-learn's requests for metadata refer to the estimator that they belong to; their text says all.
    return str(value) if name == "_metadata_request" else value


def _name_of(value: Any) -> tuple[Any, ...]:
    name = getattr(value, "__qualname__", None)
    if name is None:
        return "module", value.__name__
    return "code", value.__module__, name, None if is_found_by_name(value) else id(value)


def is_found_by_name(value: Any) -> bool:
    """Return whether the name of a function or class leads to it."""
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _identity_of_array(array: np.ndarray[Any, Any]) -> Any:
    """Return what tells an array from others, or None to let pickle look into its objects."""
    reference = as_memmap_reference(array)
    if reference is not None and isinstance(reference[1][0], str):
        # Its file may be larger than memory: not read.
        file = os.stat(reference[1][0])
        return "memmap", file.st_mtime_ns, file.st_size, *reference[1]
    if array.dtype.hasobject or type(array) not in (np.ndarray, np.memmap):
        return None
    # What is hashed is the memory of a contiguous array, so the order of the axes is part of the identity.
    is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    plain = np.ascontiguousarray(array.T if is_fortran else array)
    return "array", array.dtype, array.shape, is_fortran, digest_of(plain.reshape(-1).view(np.uint8))
