"""The exceptions that joblib_backends raises itself; a task's own exception passes untouched.

::

    HybridError
     ├── ConfigurationError          (ValueError)       a parameter or environment variable is wrong
     ├── MissingDependencyError      (ImportError)      an extra is not installed
     ├── ClusterUnavailableError     (TimeoutError)     no Dask scheduler or no worker in time
     ├── ClusterLostError            (ConnectionError)  a Dask cluster went away with batches on it
     ├── StoreError                  (OSError)          no place has room for a buffer
     ├── TaskPicklingError           (PicklingError)    a function or argument cannot travel
     ├── TaskLoadError               (RuntimeError)     a worker cannot rebuild a task
     ├── ResultPicklingError         (PicklingError)    a result or exception cannot travel back
     ├── BatchTimeoutError           (TimeoutError)     joblib's timeout is over
     ├── TaskTimeoutError            (TimeoutError)     one task ran longer than task_timeout
     ├── DataLostError               (OSError)          what a batch refers to is gone from where it was placed
     ├── WorkerLostError             (BrokenExecutor)   a worker died while it ran a batch
     └── CheckpointError             (OSError)          a checkpoint file cannot be used

    RecoveryWarning                  (UserWarning)      something was lost, and what was done about it
     └── CheckpointWarning                              a call goes on without its checkpoint

    EnvironmentWarning               (UserWarning)      workers have other versions of something than the client

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
    "CheckpointError",
    "CheckpointWarning",
    "ClusterLostError",
    "ClusterUnavailableError",
    "ConfigurationError",
    "DataLostError",
    "EnvironmentWarning",
    "HybridError",
    "MissingDependencyError",
    "RecoveryWarning",
    "RemoteTraceback",
    "ResultPicklingError",
    "StoreError",
    "TaskLoadError",
    "TaskPicklingError",
    "TaskTimeoutError",
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


class TaskTimeoutError(HybridError, TimeoutError):
    """A task ran longer than ``task_timeout``; its worker was replaced."""


class DataLostError(HybridError, FileNotFoundError):
    """A file that a batch refers to is gone. Users see it only if it is gone again each time it is placed."""

    @classmethod
    def like(cls, error: DataLostError) -> DataLostError:
        """Return the same loss as an error of this class; an OSError keeps its file name beside its arguments."""
        return cls(*error.args) if error.errno is None else cls(error.errno, error.strerror, error.filename)


class BatchDataLostError(DataLostError):
    """The same, where a worker loads a batch: what a task itself raises is its own. Never reaches the user."""


class ClusterLostError(HybridError, ConnectionError):
    """A Dask cluster went away, or lost all its workers, with batches on it.

    The call ends with it if ``fallback=False``, or if scattered data is on the cluster only.
    """


class WorkerLostError(HybridError, BrokenExecutor):
    """A worker died while it ran a batch, more often than ``retries`` allows.

    Attributes
    ----------
    exit_code : int or None
        The exit code of the last worker, negative for a signal; None where it is not known.
    peak_nbytes : int or None
        The most memory that this worker had used, in bytes; None where it is not known.
    n_deaths : int
        How many workers died over the batch since it was last handed to the tier; 0 if none could be had for it.
    how : str
        How the last one ended, in words.
    """

    def __init__(
        self,
        *args: object,
        exit_code: int | None = None,
        peak_nbytes: int | None = None,
        n_deaths: int = 1,
        how: str = "it was lost",
    ) -> None:
        super().__init__(*args)
        self.how = how
        self.exit_code = exit_code
        self.peak_nbytes = peak_nbytes
        self.n_deaths = n_deaths


class RecoveryWarning(UserWarning):
    """Something was lost while a call ran: a worker, data, a cluster. The call goes on."""


class CheckpointError(HybridError, OSError):
    """A checkpoint file cannot be used."""


class CheckpointWarning(RecoveryWarning):
    """A checkpoint cannot be used or written; the call goes on without it."""


class EnvironmentWarning(UserWarning):
    """Workers of a cluster have another version of Python, or of a library, than the process that sends them tasks."""


class RemoteTraceback(Exception):
    """The formatted traceback of an exception in the worker that raised it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'
