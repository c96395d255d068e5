"""Batches in loky worker processes of our own, never in the executor that joblib shares.

::

    scheduler ── submit ──> ProcessesTier (one per call) ──> _Pool (one per initializer) ──> loky executor
    completion thread <── future done <── loky's manager thread <── worker: run_payload(wire)

A pool is held by the open calls that use it and by the contexts whose calls used it; when the last of them lets
go, its workers end. So a second call finds workers running, and nothing is left when a context is over.

Invariant: a pool never stops workers that another call is using. An executor that broke is replaced at the next
submit; it fails the batches that were on it, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, ClassVar

import joblib
from loky import _base as loky_base
from loky.process_executor import (
    BrokenProcessPool,
    ProcessPoolExecutor,
    ShutdownExecutorError,
    TerminatedWorkerError,
    _CallItem,
    _WorkItem,
)

from ..budget import available_cores
from ..config import Config
from ..data.codec import pickle_initializer
from ..errors import TaskLoadError, WorkerLostError
from ..worker import Outcome, run_payload, unpack
from .base import Tier, Work

__all__ = ["ProcessesTier"]


class ProcessesTier(Tier):
    """The batches of one call on a pool of loky workers."""

    name = "processes"
    shares_memory = False

    @classmethod
    def capacity(cls, config: Config) -> int:
        """Return the cores that this backend may use."""
        return available_cores(config)

    def __init__(self, config: Config, n_jobs: int) -> None:
        self._n_jobs = n_jobs
        self._pool = _Pool.get(config)
        self._pool.join(self, n_jobs)
        self._futures: set[Future[Any]] = set()

    def __repr__(self) -> str:
        return f"<ProcessesTier {len(self._futures)} batches, n_jobs={self._n_jobs}, {self._pool!r}>"

    @property
    def warm(self) -> object:
        """Return the pool: while a context holds it, its workers stay."""
        return self._pool

    @property
    def look_ahead(self) -> int:
        """Return one batch per worker if the pool has no more workers than this call may use."""
        return self._n_jobs if self._pool.n_workers <= self._n_jobs else 0

    def submit(self, work: Work) -> Future[Any]:
        """Hand a payload to the pool."""
        assert work.payload is not None
        future: Future[Any] = self._pool.submit(run_payload, work.payload.wire)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def outcome(self, future: Future[Any]) -> Outcome:
        """Return what the worker packed; loky's own errors become ours."""
        try:
            packed = future.result()
        except TerminatedWorkerError as error:
            raise WorkerLostError(
                f"A worker process died while it ran a batch: {_first_line(error)} It was killed, ran out of memory, "
                "or crashed in compiled code. Use fewer jobs if memory is short; the next call starts new workers."
            ) from error
        except (BrokenProcessPool, ShutdownExecutorError) as error:
            raise WorkerLostError(
                f"The pool of worker processes stopped while it ran a batch: {_first_line(error)} "
                "The next call starts a new one."
            ) from error
        except Exception as error:
            raise TaskLoadError(f"A batch could not be sent to a worker process: {_first_line(error)}") from error
        return unpack(packed)

    def abort(self) -> None:
        """Cancel what waits; kill the workers if they run our batches and nobody else's."""
        self._pool.leave(self, unwanted=[future for future in list(self._futures) if not future.cancel()])

    def close(self) -> None:
        """Leave the pool to the next call."""
        self._pool.leave(self)


class _Pool:
    """Workers for one initializer, shared by the calls of this process.

    Thread-safe. The lock is held while an executor is made or given up, which waits for no task.
    """

    _pools: ClassVar[weakref.WeakValueDictionary[bytes, _Pool]] = weakref.WeakValueDictionary()
    _pools_lock: ClassVar[threading.Lock] = threading.Lock()
    _inherited: ClassVar[list[Any]] = []

    @classmethod
    def get(cls, config: Config) -> _Pool:
        """Return the pool whose workers ran this initializer, or a new one."""
        key = pickle_initializer(config)
        with cls._pools_lock:
            pool = cls._pools.get(key)
            if pool is None:
                pool = cls._pools[key] = cls(config.idle_worker_timeout)
            return pool

    def __init__(self, idle_timeout_s: float) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.RLock()
        self._calls: dict[int, int] = {}
        # What aborted calls left running: a task without end must not keep the workers for ever.
        self._unwanted: list[Future[Any]] = []
        self._executor: _Executor | None = None
        self._stop_at_end: weakref.finalize[Any, _Pool] | None = None

    def __repr__(self) -> str:
        return f"<_Pool {self.n_workers} workers, {len(self._calls)} calls>"

    @property
    def n_workers(self) -> int:
        """The processes that run or will be started."""
        executor = self._executor
        return 0 if executor is None else executor.n_workers

    def join(self, tier: ProcessesTier, n_jobs: int) -> None:
        """Note that a call uses the pool, and have enough workers for the largest."""
        with self._lock:
            self._calls[id(tier)] = n_jobs
            if self._executor is not None:
                self._executor.resize(max(self._calls.values()))

    def leave(self, tier: ProcessesTier, *, unwanted: Iterable[Future[Any]] = ()) -> None:
        """Note that a call is over; stop what it still runs as soon as no other call would lose its batches."""
        with self._lock:
            if self._calls.pop(id(tier), None) is None:
                return
            self._unwanted = [future for future in (*self._unwanted, *unwanted) if not future.done()]
            if not self._unwanted or self._calls:
                return
            # Emptied, because a future's callbacks hold its call, and with it the files of its batches.
            self._unwanted = []
            executor = self._forget()
        if executor is not None:
            executor.stop(kill_workers=True)

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        """Submit to the executor; a broken one is replaced first."""
        for _ in range(2):
            executor = self._running_executor()
            with contextlib.suppress(BrokenProcessPool, ShutdownExecutorError):
                return executor.submit(function, *args)  # type: ignore[no-any-return]
            self._give_up(executor)
        raise WorkerLostError("New worker processes broke at once, twice. Does the initializer end its process?")

    def _running_executor(self) -> _Executor:
        with self._lock:
            n_workers = max(self._calls.values(), default=1)
            if self._executor is not None and not self._executor.has_room_for(n_workers):
                # Batches of other calls are on it: it ends when they are done.
                self._executor.shutdown(wait=False)
                self._forget()
            if self._executor is None:
                self._executor = _Executor(n_workers, self._idle_timeout_s)
                self._stop_at_end = weakref.finalize(self, self._executor.stop, kill_workers=False)
                self._stop_at_end.atexit = False  # loky ends its workers at exit itself
            return self._executor

    @classmethod
    def forget_in_child(cls) -> None:
        """Leave the parent's workers alone: a forked child has its executors, but not the threads that feed them."""
        for pool in cls._pools.values():
            if pool._stop_at_end is not None:
                pool._stop_at_end.detach()
            # Kept for ever: an executor that is collected takes locks, which the parent may have held.
            cls._inherited.append(pool._executor)
        cls._pools, cls._pools_lock = weakref.WeakValueDictionary(), threading.Lock()

    def _give_up(self, executor: _Executor) -> None:
        with self._lock:
            if self._executor is executor:
                self._forget()

    def _forget(self) -> _Executor | None:
        executor, self._executor = self._executor, None
        if self._stop_at_end is not None:
            self._stop_at_end.detach()
        return executor


class _Executor(ProcessPoolExecutor):  # type: ignore[misc]
    """loky's executor, able to grow: it starts missing workers at each submit, up to ``_max_workers``."""

    _queue_count: int

    def __init__(self, n_workers: int, idle_timeout_s: float) -> None:
        self._room: int = max(n_workers, joblib.cpu_count())
        super().__init__(max_workers=n_workers, timeout=idle_timeout_s)

    @property
    def n_workers(self) -> int:
        return max(int(self._max_workers), len(self._processes))

    def has_room_for(self, n_workers: int) -> bool:
        """Return whether the call queue, whose size is fixed, feeds so many workers."""
        return n_workers <= self._room

    def submit(self, function: Any, *args: Any) -> Any:
        """Put the call where workers take it, without waking the manager thread.

        loky's own submit wakes the manager, which puts the call into the queue: one thread more to wake per batch,
        40 of 240 µs. That way is left for the first calls, when workers must be started, and for a full queue.
        Broken or shut down executors are flagged under the same lock, so no call is added that nobody would fail.
        """
        with self._flags.shutdown_lock:
            if self._is_steady():
                future = loky_base.Future()
                future.set_running_or_notify_cancel()
                call_id, self._queue_count = self._queue_count, self._queue_count + 1
                self._pending_work_items[call_id] = _WorkItem(future, function, args, {})
                self._running_work_items.append(call_id)
                self._call_queue.put(_CallItem(call_id, function, args, {}))
                return future
        return super().submit(function, *args)

    def _is_steady(self) -> bool:
        return (
            self._flags.broken is None
            and not self._flags.shutdown
            and self._executor_manager_thread is not None
            and len(self._processes) == self._max_workers
            and self._work_ids.empty()
            and not self._call_queue.full()
        )

    def resize(self, n_workers: int) -> None:
        """Start workers up to ``n_workers`` at the next submit; surplus ones end when idle for long enough."""
        self._max_workers = min(n_workers, self._room)

    def stop(self, *, kill_workers: bool) -> None:
        """End the workers and wait for that, except in the executor's own thread, which cannot wait for itself."""
        own = threading.current_thread() is self._executor_manager_thread
        self.shutdown(wait=not own, kill_workers=kill_workers)

    def _setup_queues(self, job_reducers: Any, result_reducers: Any, queue_size: int | None = None) -> None:
        super()._setup_queues(job_reducers, result_reducers, queue_size=2 * self._room + 1)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Pool.forget_in_child)
