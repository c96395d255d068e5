"""Workers shared by all calls of this process, kept warm between them.

::

    submit, in any thread ── pickle, lock, send without blocking ──> socket ──> worker: function(*args)
                                                                                   |
    future done <── collector: read, lock, next batch to the worker, unlock <── socket

Who runs where: ``submit`` writes to an idle worker itself; what the kernel does not take at once, and every outcome,
is the collector's, one thread per pool, in which futures are completed. Workers are started by threads that live as
long as that takes: a caller never waits for one.

Invariants, each tested:

- At most ``n_jobs`` batches of one call run at once; calls are served in turn.
- A batch waits behind another on a worker only in a call whose batches are short.
- A worker that dies fails the batch that it ran, and no other.
- No future is completed while the lock is held.
- The end of a call never waits for the lock: the garbage collector may end one inside of it.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from typing import ClassVar

from .calls import Batch, CallQueue, PoolCall
from .completions import lost
from .core import PoolCore
from .preparation import snapshot
from .process import End
from .server import ForkServer

__all__ = ["PoolCall", "WorkerPool"]


class WorkerPool(PoolCore):
    """The workers of one initializer. Thread-safe.

    Parameters
    ----------
    idle_timeout_s : float
        Seconds after which an idle worker ends.
    """

    _pools: ClassVar[dict[bytes, WorkerPool]] = {}
    _all: ClassVar[weakref.WeakSet[WorkerPool]] = weakref.WeakSet()
    _registry_lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get(cls, initializer_key: bytes, idle_timeout_s: float) -> WorkerPool:
        """Return the pool whose workers run this initializer; b"" for none.

        Idle pools of other initializers are closed, or a loop over initializers would leave their workers behind.
        """
        with cls._registry_lock:
            pool = cls._pools.get(initializer_key)
            others: list[WorkerPool] = []
            if pool is None:
                others = [cls._pools.pop(key) for key in list(cls._pools) if key and not cls._pools[key]._roster.calls]
                pool = cls._pools[initializer_key] = cls(idle_timeout_s)
            pool._idle_timeout_s = idle_timeout_s
        for other in others:
            other.close()
        return pool

    @classmethod
    def close_all(cls, timeout_s: float = 10.0) -> None:
        """End all workers and servers, busy ones by force, and wait until they are gone."""
        end = time.monotonic() + timeout_s
        pools = list(cls._all)
        for pool in pools:
            pool.close()
        # A server that imports still would be waited for.
        ForkServer.interrupt()
        for pool in pools:
            collector = pool._collector
            if collector is not None and collector.thread is not threading.current_thread():
                collector.thread.join(max(0.0, end - time.monotonic()))
        ForkServer.stop_idle()

    @classmethod
    def forget_in_child(cls) -> None:
        """Leave workers, servers and threads to the parent. Runs in a forked child, alone."""
        for pool in list(cls._all):
            if pool._collector is not None:
                pool._collector.forget_in_child()
            for queue in pool._roster.calls:
                queue.is_over = True
            pool.__init__(pool._idle_timeout_s)  # type: ignore[misc]
        cls._pools, cls._registry_lock = {}, threading.Lock()
        ForkServer.forget_in_child()

    def __init__(self, idle_timeout_s: float) -> None:
        super().__init__(idle_timeout_s)
        self._all.add(self)

    # ---- called in the user's threads

    def warm_up(self, n_workers: int, packages: frozenset[str] = frozenset()) -> None:
        """Have ``n_workers`` started, with ``packages`` imported where that can be done once; returns at once."""
        preparation = snapshot()
        with self._held():
            self._starter.take_over(preparation)
            self._starter.packages |= packages
            starts = self._note_start(n_workers)
        self._start(starts)

    def join(self, n_jobs: int) -> PoolCall:
        """Open a call of at most ``n_jobs`` batches at once."""
        preparation = snapshot()
        call = PoolCall(self, n_jobs)
        with self._held():
            self._starter.take_over(preparation)
            self._roster.calls.append(call.queue)
        return call

    def need(self, packages: frozenset[str]) -> None:
        """Note what tasks need, for workers that are still to be started."""
        self._starter.packages |= packages

    def run(self, batch: Batch) -> None:
        """Queue a batch, and send it if a worker is free."""
        starts: list[object] = []
        with self._held() as done:
            if batch.queue.is_over:
                batch.future.cancel()
                return
            batch.queue.waiting.append(batch)
            self._dispatch()
            try:
                starts = self._note_start(self._roster.n_wanted)
            except (OSError, RuntimeError) as error:  # no descriptor or no thread is left
                if not self.n_workers:
                    done += lost(self._roster.drop_waiting(), End(f"no worker process can be started: {error}"), error)
        self._start(starts)

    def end_call(self, queue: CallQueue) -> None:
        """Forget a call, and kill the workers that it keeps busy."""
        # Not by waiting for the lock, which this very thread may hold: see the invariants.
        if not queue.is_over:
            queue.is_over = True
            self._over.append(queue)
        self._settle([])

    def close(self) -> None:
        """End all workers: idle ones by themselves, busy and starting ones by force. The pool can be used again."""
        with self._held() as done:
            self._starter.generation += 1
            # Nothing is waited for any more.
            self._lost_at = -math.inf
            for member in list(self._roster.members):
                done += lost(self._roster.doom(member), End("the pool of workers was closed"))
            if self._collector is not None:
                self._collector.wake()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WorkerPool.forget_in_child)

#: Before the interpreter is torn down: workers and servers end with it, not after it.
atexit.register(WorkerPool.close_all)
