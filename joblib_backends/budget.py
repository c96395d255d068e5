"""How many cores a task may use, and the BLAS and OpenMP limits that keep it to them.

Limits travel with a batch and are applied where it runs, because changing the environment of an executor
respawns its workers (measured: 330-460 ms a call). An OpenMP limit holds for the thread that sets it, a
BLAS limit for the whole process (threadpoolctl#205), so the two are set in different places.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import joblib
import threadpoolctl
from threadpoolctl import ThreadpoolController

from .config import Config, max_cpu_count_variable, thread_kinds_fixed

__all__ = [
    "available_cores",
    "cores_per_task",
    "explicit_limits",
    "is_daemonic",
    "keep_limits",
    "keep_thread_limits",
    "limited",
    "process_wide_limit",
    "resolve_n_jobs",
    "thread_limits",
]


def available_cores(config: Config) -> int:
    """Return the cores that ``config`` may use: a nested share, or joblib's count for this machine.

    :func:`joblib.cpu_count` respects affinity, cgroup quotas and ``LOKY_MAX_CPU_COUNT``.
    """
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


def thread_limits(config: Config, n_jobs: int) -> dict[str, int]:
    """Return the threads that a task may use per library kind ("openmp", "blas").

    An explicit ``inner_max_num_threads`` wins. Otherwise a kind that the user has fixed by an environment
    variable is left alone, and every other gets the task's share of the cores.
    """
    if config.inner_max_num_threads is not None:
        return explicit_limits(config)
    share = cores_per_task(available_cores(config), n_jobs)
    return {kind: share for kind in ("openmp", "blas") if kind not in thread_kinds_fixed()}


class _Libraries:
    """The numerical libraries loaded in this process, found again only when modules were imported.

    A search takes 10 ms with scikit-learn loaded (measured), a call on threads 0.3 ms. The lock guards the
    remembered controller; scanning is done under it, since two scans would only do the same work.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _controller: ClassVar[ThreadpoolController | None] = None
    _n_modules: ClassVar[int] = -1

    @classmethod
    def limit(cls, limits: Mapping[str, int]) -> Any:
        """Set ``limits`` now and return the object that can restore what was there."""
        with cls._lock:
            if cls._n_modules != len(sys.modules):
                cls._controller, cls._n_modules = ThreadpoolController(), len(sys.modules)
            assert cls._controller is not None
            # Selected first, or the limiter would later put back the kinds that it did not limit, too.
            return cls._controller.select(user_api=list(limits)).limit(limits=dict(limits))


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
    _asked: list[int] = field(default_factory=list)
    _outer: Any = None

    @contextmanager
    def applied(self, limits: Mapping[str, int]) -> Iterator[None]:
        """Keep this process to ``limits["blas"]`` inside the block."""
        n_threads = limits.get("blas")
        if n_threads is None:
            yield
            return
        self._enter(n_threads)
        try:
            yield
        finally:
            self._leave(n_threads)

    def _enter(self, n_threads: int) -> None:
        with self._lock:
            self._asked.append(n_threads)
            self._apply()

    def _leave(self, n_threads: int) -> None:
        with self._lock:
            self._asked.remove(n_threads)
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
            self._outer = _Libraries.limit({"blas": min(self._asked)})


def _let_any_thread_limit_blas() -> None:
    clear = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
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
