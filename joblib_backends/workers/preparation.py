"""What a worker takes over from its parent when it starts, and when the parent has changed since.

The environment, the folder, the search path, ``sys.argv``. A worker that was forked comes from a server whose
libraries were loaded with one thread each, so what the user's variables say about threads is set in it by hand.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from multiprocessing import process
from typing import Any, Final

try:
    import threadpoolctl
except ImportError:
    # On a Dask worker without scikit-learn, which brings it.
    threadpoolctl = None

__all__ = ["environment_of_server", "prepare", "snapshot", "thread_variables"]

#: What numerical libraries read once, when they are loaded: a server that has loaded them serves one set of values.
_THREAD_PREFIXES: Final = ("OMP_", "GOMP_", "KMP_", "OPENBLAS_", "GOTO_", "MKL_", "BLIS_", "NUMEXPR_", "VECLIB_")

#: How each library is told to start no thread when it is loaded: a process with threads cannot be forked safely. The
#: last one is PyArrow's allocator, which has a thread to give memory back; without it, it does so while it allocates.
_ONE_THREAD: Final = {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "GOTO", "MKL", "BLIS", "NUMEXPR")
} | {"VECLIB_MAXIMUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}

#: Which variables fix which kind of library, the strongest first.
_FIXED_BY: Final = {
    "openmp": ("OMP_NUM_THREADS",),
    "blas": ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS"),
}

_limiter: Any = None


def thread_variables() -> tuple[tuple[str, str], ...]:
    """Return the variables that numerical libraries read when they are loaded."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(_THREAD_PREFIXES)))


def environment_of_server() -> dict[str, str]:
    """Return this process's environment with one thread for every library."""
    return {**os.environ, **_ONE_THREAD}


def snapshot() -> bytes:
    """Return what a worker started now takes over. Equal snapshots are equal bytes."""
    try:
        directory = os.getcwd()
    except OSError:
        directory = ""  # it was deleted; the worker stays where it is
    path = [entry or str(process.ORIGINAL_DIR) for entry in sys.path if isinstance(entry, str)]  # type: ignore[attr-defined]
    argv = list(map(str, getattr(sys, "argv", [""])))
    authkey = bytes(process.current_process().authkey)
    return pickle.dumps((dict(os.environ), directory, path, argv, authkey), protocol=5)


def prepare(packed: bytes | bytearray) -> None:
    """Make this worker like the parent at the time of the snapshot."""
    environment, directory, path, argv, authkey = pickle.loads(packed)
    if os.environ != environment:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    if directory:
        with contextlib.suppress(OSError):
            os.chdir(directory)
    sys.path[:], sys.argv[:] = path, argv
    process.ORIGINAL_DIR = directory or None  # type: ignore[attr-defined]
    process.current_process().authkey = authkey
    _keep_to_variables(environment)


def _keep_to_variables(environment: dict[str, str]) -> None:
    """Give loaded libraries the threads that the user's variables fix; what they leave open travels with a batch."""
    global _limiter
    limits = {}
    for kind, variables in _FIXED_BY.items():
        values = [environment[name] for name in variables if name in environment]
        first = values[0].split(",")[0].strip() if values else ""
        if first.isdecimal() and int(first) > 0:
            limits[kind] = int(first)
    if _limiter is not None:
        _limiter.restore_original_limits()
        _limiter = None
    if limits and threadpoolctl is not None:
        controller = threadpoolctl.ThreadpoolController().select(user_api=list(limits))
        _limiter = controller.limit(limits=limits)
