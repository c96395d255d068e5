"""Keeps the memory honest that Dask's workers believe to use: what they map is one copy for all of a host.

Dask pauses a worker, writes its results to disk or restarts it by the size of its process (``rss``), in which each
page of a shared file counts for every process that has looked at it. Eight workers that map 3 GB would seem to have
24 GB. With these plugins the pages of shared memory do not count, neither for a worker nor for its nanny.

Nobody's shared memory counts, also not what tasks make with ``multiprocessing.shared_memory``: Linux has one number for
all of it. Which of it is ours, only the list of all mappings tells, and to read that takes 5.6 ms of a worker with
scikit-learn (1,560 mappings) and not 0.07 ms; Dask looks ten times a second. Files of ours that are on a disk, because
shared memory had no room, count: their pages are the system's, which takes them back when it must.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import distributed

__all__ = ["CountOwnMemory", "CountOwnMemoryOfWorker"]

_KIB: Final = 1024

#: An attribute of what has replaced Dask's own: the plugins may come twice, also from clients with other versions of
#: this file, and shared memory would be taken off twice.
_MARK: Final = "_joblib_backends_counts_own_memory"


class CountOwnMemory(distributed.WorkerPlugin):
    """Has a worker count its own memory only."""

    name = "joblib_backends-memory"
    idempotent = True

    def setup(self, worker: Any) -> None:
        """Replace the worker's look at its size; Dask made it one method so that it can be replaced."""
        look = worker.monitor.get_process_memory
        if not hasattr(look, _MARK):

            def look_at_its_own() -> int:
                return max(0, int(look()) - _shared_nbytes("self"))

            worker.monitor.get_process_memory = _marked(look_at_its_own)


class CountOwnMemoryOfWorker(distributed.NannyPlugin):
    """Has a nanny restart its worker for memory that is the worker's own only."""

    name = "joblib_backends-memory-of-worker"
    idempotent = True

    def setup(self, nanny: Any) -> None:
        """Have the nanny look only when the worker's own memory is beyond the limit."""
        callback = nanny.periodic_callbacks.get("memory_monitor")
        if callback is None:
            return  # no limit
        look = callback.callback
        if not hasattr(look, _MARK):

            def look_if_it_is_its_own() -> Any:
                return look() if _is_beyond_limit(nanny) else None

            callback.callback = _marked(look_if_it_is_its_own)


def _marked(function: Callable[[], Any]) -> Callable[[], Any]:
    setattr(function, _MARK, True)
    return function


def _is_beyond_limit(nanny: Any) -> bool:
    """Return whether the nanny may go by the size of its worker."""
    manager, pid = nanny.memory_manager, nanny.pid
    size = _line_of_status(pid, "VmRSS:")
    if size is None or not manager.memory_limit:
        return True  # the nanny knows better
    own = size - _shared_nbytes(pid)
    return bool(own > manager.memory_limit * manager.memory_terminate_fraction)


def _shared_nbytes(process: int | str) -> int:
    """Return the bytes of shared memory that a process has looked at; 0 where the system does not tell."""
    return _line_of_status(process, "RssShmem:") or 0


def _line_of_status(process: int | str, name: str) -> int | None:
    try:
        with open(f"/proc/{process}/status") as status:
            return next((int(line.split()[1]) * _KIB for line in status if line.startswith(name)), None)
    except (OSError, ValueError):
        return None
