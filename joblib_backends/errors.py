"""The exceptions that joblib_backends raises itself; a task's own exception passes untouched.

::

    HybridError
     ├── ConfigurationError          (ValueError)       a parameter or environment variable is wrong
     ├── MissingDependencyError      (ImportError)      an extra is not installed
     ├── ClusterUnavailableError     (TimeoutError)     no Dask scheduler or no worker in time
     ├── StoreError                  (OSError)          no place has room for a buffer
     ├── TaskPicklingError           (PicklingError)    a function or argument cannot travel
     ├── TaskLoadError               (RuntimeError)     a worker cannot rebuild a task
     ├── ResultPicklingError         (PicklingError)    a result or exception cannot travel back
     ├── BatchTimeoutError           (TimeoutError)     joblib's timeout is over
     └── WorkerLostError             (BrokenExecutor)   a worker died while it ran a batch

    RemoteTraceback                  the ``__cause__`` of an exception that a worker raised

Each also derives from the class that the field uses for it, so existing ``except`` clauses still work.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor
from pickle import PicklingError

__all__ = [
    "BatchTimeoutError",
    "ClusterUnavailableError",
    "ConfigurationError",
    "HybridError",
    "MissingDependencyError",
    "RemoteTraceback",
    "ResultPicklingError",
    "StoreError",
    "TaskLoadError",
    "TaskPicklingError",
    "WorkerLostError",
]


class HybridError(Exception):
    """Base of every error that joblib_backends raises itself."""


class ConfigurationError(HybridError, ValueError):
    """A parameter or environment variable has a value that cannot be used."""

    @classmethod
    def not_one_of(cls, name: str, value: object, allowed: Iterable[str]) -> ConfigurationError:
        """Return the error for a value outside a closed list."""
        return cls(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}.")


class MissingDependencyError(HybridError, ImportError):
    """An optional dependency is needed and not installed."""


class ClusterUnavailableError(HybridError, TimeoutError):
    """No Dask scheduler answered, or it had no worker, within the configured wait."""


class StoreError(HybridError, OSError):
    """No folder has room for a buffer that must be placed for the workers."""


class TaskPicklingError(HybridError, PicklingError):
    """A function or an argument of a task cannot be pickled."""


class TaskLoadError(HybridError, RuntimeError):
    """A worker could not rebuild a task from what it received."""


class ResultPicklingError(HybridError, PicklingError):
    """What a task returned or raised cannot be pickled."""


class BatchTimeoutError(HybridError, multiprocessing.TimeoutError, TimeoutError):
    """The result of a batch took longer than joblib's ``timeout``.

    joblib raises the TimeoutError of multiprocessing, users catch the builtin one: this is both.
    """


class WorkerLostError(HybridError, BrokenExecutor):
    """A worker died while it ran a batch."""


class RemoteTraceback(Exception):
    """The formatted traceback of an exception in the worker that raised it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'
