"""How many cores a task may use, and the BLAS and OpenMP limits that keep it to them.

A batch's share is decided when it starts (:func:`cores_for_batch`), travels with it and is applied where it runs,
because changing the environment of an executor respawns its workers (measured: 330-460 ms a call). An OpenMP limit
holds for the thread that sets it, a BLAS limit for the whole process (threadpoolctl#205), so the two are set in
different places. Nested calls find the share of the task they are in through :func:`available_cores`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

import joblib

from .config import Config, max_cpu_count_variable, thread_kinds_fixed

try:
    import threadpoolctl
except ImportError:
    # A Dask worker without scikit-learn, which brings it: Dask has set its threads to one.
    threadpoolctl = None

__all__ = [
    "Share",
    "available_cores",
    "cores_for_batch",
    "cores_per_task",
    "explicit_limits",
    "is_daemonic",
    "keep_limits",
    "keep_thread_limits",
    "limited",
    "numerical_libraries",
    "process_wide_limit",
    "resolve_n_jobs",
    "seconds_to_limit",
    "share_of",
    "using",
]

#: A task that has no more than this part of its time left does not count as a neighbour of one that starts now.
_NEARLY_DONE: Final = 0.2


class Share(NamedTuple):
    """What a batch may use where it runs."""

    #: Cores for nested calls; None leaves them all that the place has.
    cores: int | None
    #: Threads per library kind ("openmp", "blas"); a kind that is missing is not limited.
    limits: dict[str, int]


def available_cores(config: Config) -> int:
    """Return the cores that ``config`` may use: the share of the task that asks, or joblib's count for this machine.

    :func:`joblib.cpu_count` respects affinity, cgroup quotas and ``LOKY_MAX_CPU_COUNT``.
    """
    if _current.cores is not None:
        return _current.cores
    if config.cores is not None:
        return config.cores
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return _count_cores(affinity, max_cpu_count_variable())


@functools.lru_cache(maxsize=16)
def _count_cores(affinity: int, variable: str | None) -> int:
    # joblib reads files of the cgroup each time, 110 µs, and a warm call asks several times: the count is kept for
    # as long as what can change it within a process has not.
    return int(joblib.cpu_count())


def cores_per_task(cores: int, n_jobs: int) -> int:
    """Return how many of ``cores`` one of ``n_jobs`` tasks that run together may use."""
    return max(1, cores // max(1, n_jobs))


def resolve_n_jobs(n_jobs: int, capacity: int) -> int:
    """Return the number of workers that joblib's ``n_jobs`` means with ``capacity`` slots.

    Negative values count from the capacity as in joblib: -1 is all slots, -2 all but one, never below 1.
    """
    return max(1, capacity + 1 + n_jobs) if n_jobs < 0 else n_jobs


def is_daemonic() -> bool:
    """Return whether this process may have no child processes (a Celery or multiprocessing worker)."""
    return bool(multiprocessing.current_process().daemon)


def explicit_limits(config: Config) -> dict[str, int]:
    """Return the threads per library kind that ``inner_max_num_threads`` asks for, nothing if it is not given."""
    n_threads = config.inner_max_num_threads
    return {} if n_threads is None else {"openmp": n_threads, "blas": n_threads}


def share_of(config: Config, cores: int) -> Share:
    """Return the share of a batch that has ``cores`` for itself.

    An explicit ``inner_max_num_threads`` wins. Otherwise a kind that the user has fixed by an environment
    variable is left alone, and every other gets the cores.
    """
    if config.inner_max_num_threads is not None:
        return Share(cores, explicit_limits(config))
    return Share(cores, {kind: cores for kind in ("openmp", "blas") if kind not in thread_kinds_fixed()})


def cores_for_batch(cores: int, n_jobs: int, left: Iterable[float], n_waiting: int, *, more_to_come: bool) -> int:
    """Return how many of ``cores`` a batch that starts now may use.

    Parameters
    ----------
    cores : int
        Cores of the place.
    n_jobs : int
        Batches that may run at once.
    left : iterable of float
        For each batch that runs already, the part of its expected time that it still has to run, 1 if unknown;
        negative if it has been running for longer.
    n_waiting : int
        Batches that wait for their turn.
    more_to_come : bool
        Whether further batches may be submitted.

    Returns
    -------
    int
        At least 1: five folds on 64 cores get twelve each, and the last of three folds on two cores gets both.
    """
    # Who takes much longer than expected is as far from its end as nobody knows.
    neighbours = sum(part > _NEARLY_DONE or part < -_NEARLY_DONE for part in left) + n_waiting
    together = n_jobs if more_to_come else min(n_jobs, 1 + neighbours)
    return cores_per_task(cores, together)


class _Current(threading.local):
    """The cores of the task that runs in this thread."""

    cores: int | None = None


_current = _Current()


@contextmanager
def using(cores: int | None) -> Iterator[None]:
    """Give nested calls of this thread ``cores`` inside the block."""
    outer, _current.cores = _current.cores, cores
    try:
        yield
    finally:
        _current.cores = outer


class _Libraries:
    """The numerical libraries loaded in this process, found again only when modules were imported.

    A search takes 10 ms with scikit-learn loaded, later ones 3 ms (measured), a call on threads 0.3 ms. The lock
    guards the remembered controller; scanning is done under it, since two scans would only do the same work.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _controller: ClassVar[Any] = None
    _n_modules: ClassVar[int] = -1
    _search_s: ClassVar[float] = 0.010

    @classmethod
    def search_seconds(cls) -> float:
        """Return how long :meth:`limit` would search now."""
        return cls._search_s if cls._n_modules != len(sys.modules) else 0.0

    @classmethod
    def limit(cls, limits: Mapping[str, int]) -> Any:
        """Set ``limits`` now and return the object that can restore what was there; None if nothing can be set."""
        if threadpoolctl is None:
            return None
        with cls._lock:
            if cls._n_modules != len(sys.modules):
                started = time.perf_counter()
                cls._controller, cls._n_modules = threadpoolctl.ThreadpoolController(), len(sys.modules)
                cls._search_s = time.perf_counter() - started
            # Selected first, or the limiter would later put back the kinds that it did not limit, too.
            return cls._controller.select(user_api=list(limits)).limit(limits=dict(limits))


def numerical_libraries() -> list[dict[str, Any]]:
    """Return what threadpoolctl tells of the BLAS and OpenMP libraries that are loaded in this process."""
    return [] if threadpoolctl is None else list(threadpoolctl.threadpool_info())


def seconds_to_limit() -> float:
    """Return the seconds that it would take now before the first limit is set, besides setting it."""
    return _Libraries.search_seconds()


class _Kept(threading.local):
    """The limits of this thread: applying the same again would cost 65 µs a batch."""

    key: tuple[Any, ...] = ()
    limiter: Any = None


_kept = _Kept()


def keep_limits(limits: Mapping[str, int]) -> None:
    """Have ``limits`` in this thread, and with "blas" in its process, until it is told others.

    Called in workers, which are ours alone.
    """
    key = (*sorted(limits.items()), len(sys.modules)) if limits else ()
    if key == _kept.key:
        return
    if _kept.limiter is not None:
        _kept.limiter.restore_original_limits()
    _kept.limiter = _Libraries.limit(limits) if limits else None
    _kept.key = (*sorted(limits.items()), len(sys.modules)) if limits else ()


def keep_thread_limits(limits: Mapping[str, int]) -> None:
    """Have the limits that hold per thread in this worker thread, which is ours alone."""
    keep_limits({kind: n for kind, n in limits.items() if kind == "openmp"})


@dataclass
class ProcessWideLimit:
    """A BLAS limit of this process while calls on threads run; the lowest asked for wins.

    Thread-safe: several calls may run at once. What was there before the first is restored by the last.
    """

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _asked: dict[int, int] = field(default_factory=dict)
    _outer: Any = None

    @contextmanager
    def applied(self, limits: Mapping[str, int]) -> Iterator[None]:
        """Keep this process to ``limits["blas"]`` inside the block."""
        asker = object()
        self.ask(asker, limits)
        try:
            yield
        finally:
            self.withdraw(asker)

    def ask(self, asker: object, limits: Mapping[str, int]) -> None:
        """Keep this process to ``limits["blas"]`` until ``asker`` asks for another limit or withdraws."""
        n_threads = limits.get("blas")
        if self._asked.get(id(asker)) != n_threads:
            with self._lock:
                self._set(id(asker), n_threads)

    def withdraw(self, asker: object) -> None:
        """Forget what ``asker`` asked for; nothing if it did not."""
        if id(asker) in self._asked:
            with self._lock:
                self._set(id(asker), None)

    def _set(self, asker: int, n_threads: int | None) -> None:
        before = min(self._asked.values(), default=None)
        if n_threads is None:
            self._asked.pop(asker, None)
        else:
            self._asked[asker] = n_threads
        if min(self._asked.values(), default=None) != before:
            self._apply()

    def _apply(self) -> None:
        # threadpoolctl 3.8 lets only the first thread that limited OpenBLAS change the limit, and ignores all others:
        # a call from a second thread would not be limited, and a limit lifted by another thread would stay for ever.
        _let_any_thread_limit_blas()
        try:
            self._apply_here()
        finally:
            _let_any_thread_limit_blas()

    def _apply_here(self) -> None:
        if self._outer is not None:
            self._outer.restore_original_limits()
            self._outer = None
        if self._asked:
            self._outer = _Libraries.limit({"blas": min(self._asked.values())})


def _let_any_thread_limit_blas() -> None:
    openblas = getattr(threadpoolctl, "OpenBLASController", None)
    clear = getattr(openblas, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


process_wide_limit = ProcessWideLimit()


@contextmanager
def limited(limits: Mapping[str, int]) -> Iterator[None]:
    """Keep to ``limits`` inside the block, in a thread that is not ours, and put back what was there."""
    openmp = {kind: n for kind, n in limits.items() if kind == "openmp"}
    with process_wide_limit.applied(limits):
        limiter = _Libraries.limit(openmp) if openmp else None
        try:
            yield
        finally:
            if limiter is not None:
                limiter.restore_original_limits()


def _forget_in_child() -> None:
    # Another thread of the parent may have held them: a search takes 10 ms.
    _Libraries._lock, process_wide_limit._lock = threading.Lock(), threading.Lock()
    # Calls of the parent withdraw nothing here.
    process_wide_limit._asked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
