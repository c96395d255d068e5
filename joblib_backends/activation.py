"""From environment variables to the default backend of a process.

``JOBLIB_BACKEND=hybrid`` ends here, by one of two ways: the ``.pth`` file of the wheel, when joblib first wants its
default, or ``python -m joblib_backends run``. An explicit backend in the code still wins, because only joblib's
defaults change.

Invariant: nothing is read or checked before a program uses ``Parallel``; a value that cannot be used is one
:class:`~joblib_backends.errors.ConfigurationError` there, at every use.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from typing import Any, ClassVar, Final

from joblib import parallel as joblib_parallel

from .config import Activation, activation_from_environment
from .errors import ConfigurationError, HybridError
from .report import announce

__all__ = ["activate"]

#: The name under which joblib finds the default; it shows in joblib's list of backends, so it says what it is.
#: The same as in pth/_joblib_backends_hook.py.
_NAME: Final = "from-environment"


def activate(activation: Activation | None = None) -> None:
    """Make the backend that the environment selects the default of this process.

    Parameters
    ----------
    activation : Activation, optional
        What to select; by default what the environment says, and nothing if it says nothing.

    Raises
    ------
    ConfigurationError
        If ``JOBLIB_BACKEND_N_JOBS`` is not a whole number other than zero.
    """
    selected = activation_from_environment() if activation is None else activation
    if selected is not None:
        _make_default(_NAME, _Factory(selected), like=selected.backend)


class _Factory:
    """Makes the selected backend whenever joblib wants its default; the first time it says so.

    Thread-safe: joblib calls it in any thread that makes a ``Parallel`` object.
    """

    #: Taken by the first factory that speaks: two threads that want joblib's default at once may make two.
    _turns: ClassVar[list[None]] = [None]

    def __init__(self, activation: Activation) -> None:
        self._activation = activation

    def __repr__(self) -> str:
        return f"<_Factory of {self._activation.backend!r} from the environment>"

    def __call__(self, nesting_level: int | None = None) -> Any:
        backend = self._make(nesting_level)
        n_jobs = self._activation.n_jobs
        # Where the code leaves n_jobs=None, joblib's own meaning holds: one job, unless the environment says more.
        backend.default_n_jobs = 1 if n_jobs is None else n_jobs
        # joblib takes hints as a reason to leave a default that does not use threads; this one was chosen.
        backend.uses_threads = True
        self._announce()
        return backend

    def _make(self, nesting_level: int | None) -> Any:
        name = self._activation.backend
        known = [registered for registered in _registered_names() if registered != _NAME]
        if name not in known:
            raise ConfigurationError.not_one_of("The environment variable JOBLIB_BACKEND", name, known)
        try:
            return _make_named(name, nesting_level)
        except HybridError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"The environment variable JOBLIB_BACKEND is {name!r}, but that backend cannot be made here: "
                f"{type(error).__name__}: {' '.join(str(error).split())}."
            ) from error

    def _announce(self) -> None:
        # Children repeat what their parent does, and one line is enough.
        if self._activation.quiet or multiprocessing.parent_process() is not None:
            return
        with contextlib.suppress(IndexError):
            self._turns.pop()  # atomic
            announce(
                f"JOBLIB_BACKEND={self._activation.backend} from the environment is the default backend of this "
                "process (JOBLIB_BACKEND_QUIET=1 hides this line)."
            )


def _registered_names() -> list[str]:
    """Return the names of the backends that joblib knows or can load."""
    return sorted({*joblib_parallel.BACKENDS, *joblib_parallel.EXTERNAL_BACKENDS})


def _make_named(name: str, nesting_level: int | None) -> Any:
    """Return a new backend that joblib knows by ``name``; KeyError if it knows none."""
    if name not in joblib_parallel.BACKENDS:
        joblib_parallel.EXTERNAL_BACKENDS[name]()
    if name in joblib_parallel.EXTERNAL_BACKENDS:
        # joblib's dask backend takes nesting_level for a keyword of Client.submit (joblib 1.6, _dask.py:165).
        backend = joblib_parallel.BACKENDS[name]()
        backend.nesting_level = nesting_level
        return backend
    return joblib_parallel.BACKENDS[name](nesting_level=nesting_level)


def _make_default(name: str, factory: Callable[..., Any], *, like: str) -> None:
    """Register ``factory`` and make it what joblib takes where the code names no backend.

    joblib's hints replace the default by two further defaults, so all three names change;
    ``register_parallel_backend(make_default=True)`` sets only the first. The one for threads serves
    require="sharedmem" and stays what it is if the backend that the factory makes, ``like``, has no shared memory:
    joblib would fail.
    """
    joblib_parallel.register_parallel_backend(name, factory)
    joblib_parallel.DEFAULT_BACKEND = name
    joblib_parallel.DEFAULT_PROCESS_BACKEND = name
    if getattr(joblib_parallel.BACKENDS.get(like), "supports_sharedmem", False):
        joblib_parallel.DEFAULT_THREAD_BACKEND = name
