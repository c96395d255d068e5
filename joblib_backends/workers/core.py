"""What happens in a pool: the lock and what may be done under it, the starts of workers, what comes from them.

The picture, and who calls what in which thread, are in ``pool.py``.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import ClassVar, Final

from ..memory import LOOK_AGAIN_S, MemoryWatch
from . import frames
from .calls import CallQueue
from .collector import Collector
from .completions import Completions, complete, load, lost, overdue
from .member import Member
from .process import End
from .roster import Roster
from .starter import Starter

__all__ = ["PoolCore"]

_log = logging.getLogger(__name__)

#: Seconds for which a pool without workers, and with it the server that forks them, waits for the batch that the last
#: one died over to come back: to start a server takes 20 times as long as to fork a worker, more with scikit-learn.
_LINGER_S: Final = 1.0

#: The exit code of what the kernel kills; Windows has no such signal, and never this code.
_KILLED: Final = -getattr(signal, "SIGKILL", 9)


class PoolCore:
    """The inside of a pool. One lock guards the roster and the starter; it is held for microseconds."""

    #: Seconds from the last cold start to its first worker that was ready; None if there was none.
    startup_seconds: ClassVar[float | None] = None

    def __init__(self, idle_timeout_s: float) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.Lock()
        self._roster = Roster()
        self._over: deque[CallQueue] = deque()
        # When a worker last died over a batch.
        self._lost_at = -math.inf
        self._collector: Collector | None = None
        self._starter = Starter()

    def __repr__(self) -> str:
        return f"<WorkerPool {self.n_workers} workers, {len(self._roster.calls)} calls>"

    @property
    def n_workers(self) -> int:
        """The processes that run or are being started."""
        return len(self._roster.members) + len(self._starter.starting)

    @property
    def n_ready(self) -> int:
        """The workers that could take a batch now, or work."""
        return sum(member.is_ready for member in list(self._roster.members))

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

    def _dispatch(self) -> None:
        if self._roster.dispatch(self._starter.preparation, time.perf_counter()) and self._collector is not None:
            self._collector.wake()

    def _note_start(self, n_workers: int) -> list[object]:
        """Return a token for each worker that the caller must start, once it has let go of the lock."""
        n = n_workers - self.n_workers
        if n <= 0:
            return []
        # First: without descriptors or threads there is none, and what was noted would be waited for.
        self._running_collector()
        if not self.n_workers:
            MemoryWatch.shared().forget_kills()
        return self._starter.note(n, is_cold=not self.n_workers)

    def _running_collector(self) -> Collector:
        if self._collector is None:
            collector = Collector(self)
            collector.start()
            self._collector = collector
        return self._collector

    # ---- called in threads that start workers

    def _start(self, tokens: list[object]) -> None:
        if tokens:
            _log.debug("%d worker processes are started", len(tokens))
            name = "joblib_backends-pool-start"
            arguments = (tokens, self._starter.generation)
            thread = threading.Thread(target=self._start_workers, args=arguments, name=name, daemon=True)
            try:
                thread.start()
            except BaseException as error:
                # The interpreter ends, the system has no thread left, or Ctrl-C: the thread may run nevertheless.
                self._start_failed(error, tokens)
                if not isinstance(error, RuntimeError):
                    raise

    def _start_workers(self, tokens: list[object], generation: int) -> None:
        for token in tokens:
            if token not in self._starter.starting:
                continue
            try:
                member = self._starter.start_one(generation)
            except BaseException as error:
                self._start_failed(error, tokens)
                return
            with self._held():
                self._roster.members.append(member)
                if token not in self._starter.starting or generation != self._starter.generation:
                    self._roster.doom(member)  # struck out, or the pool was closed meanwhile
                self._starter.starting.discard(token)
                self._running_collector().add(member)

    def _start_failed(self, error: BaseException, tokens: list[object]) -> None:
        """Go on with the workers that there are; without any, waiting batches fail."""
        with self._held() as done:
            self._starter.starting.difference_update(tokens)
            if not self.n_workers:
                done += lost(self._roster.drop_waiting(), End(f"no worker process can be started: {error}"), error)
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
        seconds = self._starter.is_ready(member)
        if seconds is not None:
            type(self).startup_seconds = seconds

    def cut(self, member: Member) -> None:
        """Give a worker whose connection has ended no more work."""
        with self._held():
            self._roster.cut(member)

    def ended(self, member: Member, end: End) -> None:
        """Fail what a dead worker ran, and have it replaced while there is work."""
        with self._held() as done:
            running = self._roster.remove(member)
            if running is not None:
                self._lost_at = time.perf_counter()
            # Asked about each, or what became of an idle one would be said of the next.
            if end.code == _KILLED and not member.is_doomed and MemoryWatch.shared().has_killed():
                end = end._replace(how=f"{end.how}, probably by the kernel because memory had run out")
                if running is not None:
                    # Or the next one would be: a task that takes long to fill its memory starts while there is some.
                    running.queue.run_fewer()
            if running is not None:
                done += lost([running], end, n_deaths=1)
            if not member.is_ready and not member.is_doomed and self._starter.is_stillborn(member, end):
                why = f"new worker processes ended before they could take a batch: {end.how}"
                done += lost(self._roster.drop_waiting(), end._replace(how=why))
            self._dispatch()
            starts = self._note_start(self._roster.n_wanted)
        self._start(starts)

    def look_after(self, collector: Collector) -> float | None:
        """End workers that have been idle, or busy, for too long; return when to look again, negative to end."""
        starts: list[object] = []
        with self._held() as done:
            now = time.perf_counter()
            batches = self._roster.end_overdue(now)
            if batches or self._roster.is_held_back:
                done += overdue(batches)
                self._dispatch()
                starts = self._note_start(self._roster.n_wanted)
            wait_s = self._seconds_to_next_look(collector, now)
        self._start(starts)
        return wait_s

    def _seconds_to_next_look(self, collector: Collector, now: float) -> float | None:
        since = self._roster.end_idle(now - self._idle_timeout_s)
        if not self.n_workers and not self._roster.doomed:
            linger_s = self._lost_at + _LINGER_S - now
            if linger_s > 0:
                return linger_s
            if self._collector is collector:
                self._collector = None
                self._starter.forgive()
            return -1.0
        look_again = now + LOOK_AGAIN_S if self._roster.is_held_back else None
        times = (look_again, self._roster.next_overdue(), None if since is None else since + self._idle_timeout_s)
        return min((max(0.0, at - now) for at in times if at is not None), default=None)

    def failed(self, error: BaseException) -> None:
        """Fail everything: the collector is gone, and with it the workers."""
        with self._held() as done:
            self._collector = None
            self._starter.generation += 1
            batches = self._roster.drop_waiting()
            for member in list(self._roster.members):
                batches += self._roster.doom(member)
            self._roster.doomed.clear()
            done += lost(batches, End(f"the pool of workers failed: {type(error).__name__}: {error}"), error)
