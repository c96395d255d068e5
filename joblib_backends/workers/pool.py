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
- A batch waits behind another only in a call whose batches are short, and never while a worker is idle.
- A worker that dies fails the batch that it ran, and no other.
- No future is completed while the lock is held.
- The end of a call never waits for the lock: the garbage collector may end one inside of it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import ClassVar, Final

from . import frames
from .calls import Batch, CallQueue, PoolCall
from .collector import Collector
from .completions import Completions, complete, load, lost
from .member import Member
from .preparation import snapshot
from .process import start_worker
from .roster import Roster
from .server import ForkServer

__all__ = ["PoolCall", "WorkerPool"]

#: Workers that may end before they are ready, in each way to start them, before that way is given up.
_TRIES: Final = 2


class WorkerPool:
    """The workers of one initializer.

    Notes
    -----
    Thread-safe. One lock guards the roster and the counts; it is held for microseconds.
    """

    _pools: ClassVar[dict[bytes, WorkerPool]] = {}
    _all: ClassVar[weakref.WeakSet[WorkerPool]] = weakref.WeakSet()
    _registry_lock: ClassVar[threading.Lock] = threading.Lock()

    #: Seconds from the last cold start to its first worker that was ready; None if there was none.
    startup_seconds: ClassVar[float | None] = None

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
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.Lock()
        self._roster = Roster()
        self._over: deque[CallQueue] = deque()
        self._collector: Collector | None = None
        self._preparation = b""
        self._packages: frozenset[str] = frozenset()
        self._n_starting = 0
        self._generation = 0
        self._n_stillborn = {"forked": 0, "spawned": 0}
        self._cold_start: float | None = None
        self._all.add(self)

    def __repr__(self) -> str:
        return f"<WorkerPool {self.n_workers} workers, {len(self._roster.calls)} calls>"

    @property
    def n_workers(self) -> int:
        """The processes that run or are being started."""
        return len(self._roster.members) + self._n_starting

    @property
    def n_ready(self) -> int:
        """The workers that could take a batch now, or work."""
        return sum(member.is_ready for member in list(self._roster.members))

    # ---- called in the user's threads

    def warm_up(self, n_workers: int, packages: frozenset[str] = frozenset()) -> None:
        """Have ``n_workers`` started, with ``packages`` imported where that can be done once; returns at once."""
        preparation = snapshot()
        with self._held():
            self._take_over(preparation)
            self._packages |= packages
            starts = self._count_start(n_workers)
        self._start(starts)

    def join(self, n_jobs: int) -> PoolCall:
        """Open a call of at most ``n_jobs`` batches at once."""
        preparation = snapshot()
        call = PoolCall(self, n_jobs)
        with self._held():
            self._take_over(preparation)
            self._roster.calls.append(call.queue)
        return call

    def need(self, packages: frozenset[str]) -> None:
        """Note what tasks need, for workers that are still to be started."""
        self._packages |= packages

    def run(self, batch: Batch) -> None:
        """Queue a batch, and send it if a worker is free."""
        with self._held():
            if batch.queue.is_over:
                batch.future.cancel()
                return
            batch.queue.waiting.append(batch)
            self._dispatch()
            starts = self._count_start(self._roster.n_wanted)
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
            self._generation += 1
            for member in list(self._roster.members):
                done += lost(self._roster.doom(member), "the pool of workers was closed")
            if self._collector is not None:
                self._collector.wake()

    # ---- called with the lock held

    @contextmanager
    def _held(self) -> Iterator[Completions]:
        """Hold the lock, then complete the futures that the block has put into the list."""
        done: Completions = []
        with self._lock:
            yield done
        self._settle(done)

    def _settle(self, done: Completions) -> None:
        """End the calls that are over, then complete futures. Called without the lock.

        Race: a call may end while the lock is held, by another thread or by a finalizer in this one. It is then left
        to whoever holds the lock, who comes here after letting go.
        """
        while self._over and self._lock.acquire(blocking=False):
            try:
                while self._over:
                    aborted = self._roster.leave(self._over.popleft())
                    done += [(batch.future, None, CancelledError("The call was aborted.")) for batch in aborted]
                self._dispatch()
                if self._collector is not None:
                    self._collector.wake()
            finally:
                self._lock.release()
        complete(done)

    def _take_over(self, preparation: bytes) -> None:
        # The same object while nothing has changed: that is how members tell.
        if preparation != self._preparation:
            self._preparation = preparation

    def _dispatch(self) -> None:
        if self._roster.dispatch(self._preparation, time.perf_counter()) and self._collector is not None:
            self._collector.wake()

    def _count_start(self, n_workers: int) -> int:
        """Return how many workers the caller must start, once it has let go of the lock, to have ``n_workers``."""
        n = n_workers - self.n_workers
        if n <= 0:
            return 0
        if not self.n_workers:
            self._cold_start = time.perf_counter()
        self._n_starting += n
        if self._collector is None:
            self._collector = Collector(self)
            self._collector.start()
        return n

    # ---- called in threads that start workers

    def _start(self, n: int) -> None:
        if n:
            name = "joblib_backends-pool-start"
            thread = threading.Thread(target=self._start_workers, args=(n, self._generation), name=name, daemon=True)
            try:
                thread.start()
            except BaseException as error:
                # The interpreter ends, the system has no thread left, or Ctrl-C came before the thread was there.
                if thread.ident is None:
                    self._start_failed(error, n)
                if not isinstance(error, RuntimeError):
                    raise

    def _start_workers(self, n: int, generation: int) -> None:
        for remaining in range(n, 0, -1):
            preparation = self._preparation
            try:
                may_fork = self._n_stillborn["forked"] < _TRIES
                process = start_worker(
                    preparation, self._packages, lambda: generation == self._generation, may_fork=may_fork
                )
            except BaseException as error:
                self._start_failed(error, remaining)
                return
            with self._held():
                self._n_starting -= 1
                member = Member(process, preparation)
                self._roster.members.append(member)
                if generation != self._generation:
                    self._roster.doom(member)  # the pool was closed meanwhile
                assert self._collector is not None
                self._collector.add(member)

    def _start_failed(self, error: BaseException, n: int) -> None:
        """Go on with the workers that there are; without any, waiting batches fail."""
        with self._held() as done:
            self._n_starting -= n
            if not self.n_workers:
                done += lost(self._roster.drop_waiting(), f"no worker process can be started: {error}", error)
            if self._collector is not None:
                self._collector.wake()

    # ---- called in the collector

    def came(self, member: Member, received: Sequence[frames.Frame]) -> None:
        """Take what a worker has sent, and write what is left for it."""
        answers = [(kind, load(kind, body)) for kind, body in received]
        with self._held() as done:
            if member.is_doomed:
                return
            now = time.perf_counter()
            for kind, (result, error) in answers:
                if kind == frames.HELLO:
                    self._greet(member, now)
                elif (batch := member.finish(now)) is not None:
                    done.append((batch.future, result, error))
                if member.running is None:
                    self._roster.idle.append(member)
            member.flush()
            self._dispatch()

    def _greet(self, member: Member, now: float) -> None:
        member.is_ready, member.idle_since = True, now
        self._n_stillborn[member.process.way] = 0
        if self._cold_start is not None:
            WorkerPool.startup_seconds, self._cold_start = now - self._cold_start, None

    def cut(self, member: Member) -> None:
        """Give a worker whose connection has ended no more work."""
        with self._held():
            self._roster.cut(member)

    def ended(self, member: Member, how: str) -> None:
        """Fail what a dead worker ran, and have it replaced while there is work."""
        with self._held() as done:
            running = self._roster.remove(member)
            if running is not None:
                done += lost([running], how)
            if not member.is_ready and not member.is_doomed:
                self._n_stillborn[member.process.way] += 1
                if self._n_stillborn["spawned"] >= _TRIES:
                    self._n_stillborn = {"forked": 0, "spawned": 0}
                    why = f"new worker processes ended before they could take a batch: {how}"
                    done += lost(self._roster.drop_waiting(), why)
            self._dispatch()
            starts = self._count_start(self._roster.n_wanted)
        self._start(starts)

    def look_after(self, collector: Collector) -> float | None:
        """End workers that have been idle for long; return when to look again, negative to end the thread."""
        with self._held():
            now = time.perf_counter()
            since = self._roster.end_idle(now - self._idle_timeout_s)
            if not self.n_workers and not self._roster.doomed:
                if self._collector is collector:
                    self._collector = None
                    # What went wrong with forks may be over at the next cold start.
                    self._n_stillborn = dict.fromkeys(self._n_stillborn, 0)
                return -1.0
            return None if since is None else max(0.0, since + self._idle_timeout_s - now)

    def failed(self, error: BaseException) -> None:
        """Fail everything: the collector is gone, and with it the workers."""
        with self._held() as done:
            self._collector = None
            self._generation += 1
            batches = self._roster.drop_waiting()
            for member in list(self._roster.members):
                batches += self._roster.doom(member)
            self._roster.doomed.clear()
            done += lost(batches, f"the pool of workers failed: {type(error).__name__}: {error}", error)



if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WorkerPool.forget_in_child)

#: Before the interpreter is torn down: workers and servers end with it, not after it.
atexit.register(WorkerPool.close_all)
