"""Batches in worker processes of our own, shared by all calls and contexts of this process.

::

    scheduler ── submit ──> ProcessesTier (one per call) ──> WorkerPool (one per initializer) ──> workers
    completion thread <── future done <── the pool's collector thread <── worker: run_payload(wire)

The pool outlives the call and its context: the next one finds workers running, until they have been idle for
``idle_worker_timeout`` seconds or the interpreter ends.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from ..budget import available_cores
from ..config import Config
from ..data.codec import pickle_initializer
from ..errors import TaskLoadError, TaskTimeoutError, WorkerLostError
from ..worker import Outcome, run_payload, unpack
from ..workers.pool import WorkerPool
from ..workers.preload import packages_of
from .base import Tier, Work

__all__ = ["ProcessesTier"]


class ProcessesTier(Tier):
    """The batches of one call on the pool of its initializer."""

    name = "processes"
    shares_memory = False
    binds_early = True

    @classmethod
    def capacity(cls, config: Config) -> int:
        """Return the cores that this backend may use."""
        return available_cores(config)

    @classmethod
    def start_workers(cls, config: Config, n_jobs: int, packages: frozenset[str] = frozenset()) -> None:
        """Have workers started in the background for a call that may come; returns at once."""
        _pool_of(config).warm_up(n_jobs, packages)

    @classmethod
    def ready_counter(cls, config: Config) -> Callable[[], int]:
        """Return what tells how many workers could take a batch without being started first."""
        # Not the pool itself: an idle one makes room for that of another initializer, and is made anew.
        initializer = pickle_initializer(config)
        return lambda: WorkerPool.get(initializer, config.idle_worker_timeout).n_ready

    @classmethod
    def startup_seconds(cls) -> float | None:
        """Return how long the last cold start took until a worker was ready; None before the first."""
        return WorkerPool.startup_seconds

    def __init__(self, config: Config, n_jobs: int) -> None:
        self._n_jobs = n_jobs
        # A batch has one task where tasks have a time.
        self._task_timeout = config.task_timeout
        self._pool = _pool_of(config)
        self._call = self._pool.join(n_jobs)
        self._needs_are_known = False

    def __repr__(self) -> str:
        return f"<ProcessesTier {self._call!r}>"

    @property
    def look_ahead(self) -> int:
        """Return one batch per worker; the pool keeps it from running early."""
        return self._n_jobs

    def submit(self, work: Work) -> Future[Any]:
        """Hand a payload to the pool."""
        if not self._needs_are_known:
            # Only the first: the batches of a call are alike.
            self._needs_are_known = True
            if self._pool.n_workers < self._n_jobs:
                self._pool.need(packages_of(getattr(work.function, "items", None) or [work.function]))
        return self._call.submit(run_payload, work.wire, name=work.name, timeout_s=self._task_timeout)

    def outcome(self, future: Future[Any]) -> Outcome:
        """Return what the worker packed."""
        try:
            packed = future.result()
        except (WorkerLostError, TaskTimeoutError):
            # Those in its place may be the first to be started for such tasks.
            self._needs_are_known = False
            raise
        except CancelledError:
            raise
        except Exception as error:
            raise TaskLoadError(f"A batch could not be sent to a worker process: {_first_line(error)}") from error
        return unpack(packed)

    def abort(self) -> None:
        """Drop what waits; kill the workers that run batches of this call, and no others."""
        self._call.abort()

    def close(self) -> None:
        """Leave the workers to the next call."""
        self._call.leave()


def _pool_of(config: Config) -> WorkerPool:
    return WorkerPool.get(pickle_initializer(config), config.idle_worker_timeout)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
