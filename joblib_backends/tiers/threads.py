"""Batches in threads of this process: no copies, no start-up, one GIL.

The threads come from the crew of the process and go back to it after the call. No pool bounds them, so nested calls
cannot wait for each other's threads; the scheduler bounds what runs.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError

from ..budget import available_cores, keep_thread_limits, process_wide_limit
from ..config import Config
from ..crew import Crew
from ..errors import TaskTimeoutError
from ..worker import Outcome, run_here
from .base import Tier, Work

__all__ = ["ThreadsTier"]


class ThreadsTier(Tier):
    """A thread per job, started when there is work for it."""

    name = "threads"
    shares_memory = True

    @classmethod
    def capacity(cls, config: Config) -> int:
        """Return the cores that this backend may use."""
        return available_cores(config)

    def __init__(self, config: Config, n_jobs: int) -> None:
        self._n_jobs = n_jobs
        self._config = config
        self._queue: queue.SimpleQueue[tuple[Work, Future[Outcome]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._n_threads = 0
        self._n_unfinished = 0
        self._aborted = False
        self._closed = False
        self._crew = Crew.shared()
        # A batch has one task where tasks have a time.
        self._task_timeout = config.task_timeout

    def __repr__(self) -> str:
        return f"<ThreadsTier {self._n_unfinished} batches on {self._n_threads}/{self._n_jobs} threads>"

    @property
    def warm(self) -> object:
        """Return the crew: while a context holds it, its threads stay."""
        return self._crew

    @property
    def look_ahead(self) -> int:
        """Return one batch per thread; the number of threads keeps it from running early."""
        return self._n_jobs

    def submit(self, work: Work) -> Future[Outcome]:
        """Queue a batch, and start a thread if all are busy and another is allowed."""
        future: Future[Outcome] = Future()
        with self._lock:
            if self._closed:
                # Race: the call ended while this batch was on its way. No thread would ever be told to end.
                future.cancel()
                return future
            # The batches of a call are alike, so the newest one's share stands for all.
            process_wide_limit.ask(self, work.share.limits)
            self._n_unfinished += 1
            starts = self._n_unfinished > self._n_threads and self._n_threads < self._n_jobs
            self._n_threads += starts
        self._queue.put((work, future))
        if starts:
            self._crew.run(self._work)
        return future

    def outcome(self, future: Future[Outcome]) -> Outcome:
        """Return the outcome of a finished batch."""
        return future.result()

    def abort(self) -> None:
        """Drop what waits; a thread cannot be stopped, so what runs runs to its end, unheard."""
        self._aborted = True
        self.close()

    def close(self) -> None:
        """Let the threads end, after the batch that each may still be running."""
        with self._lock:
            self._closed = True
            for _ in range(self._n_threads):
                self._queue.put(None)
            self._n_threads = 0
            process_wide_limit.withdraw(self)

    def _work(self) -> None:
        """Run batches until told to end. Runs in a thread of the crew."""
        config = self._config
        initializer = functools.partial(config.initializer, *config.initargs) if config.initializer else None
        try:
            while (item := self._queue.get()) is not None:
                work, future = item
                if not self._aborted and future.set_running_or_notify_cancel():
                    if not self._run(work, future, initializer):
                        return
                    initializer = None
                # An idle thread must not keep the last batch's data alive.
                del item, work, future
        finally:
            # The crew's thread may complete batches next, and run the user's generator.
            keep_thread_limits({})

    def _run(self, work: Work, future: Future[Outcome], initializer: Callable[[], object] | None) -> bool:
        """Run a batch; return whether this thread goes on, because it was not replaced meanwhile."""
        with self._limited(work, future):
            outcome = run_here(work.function, work.share, initializer)
        return self._end(future, functools.partial(future.set_result, outcome))

    @contextlib.contextmanager
    def _limited(self, work: Work, future: Future[Outcome]) -> Iterator[None]:
        """Have the batch in this block given up when its time is over."""
        if self._task_timeout is None:
            yield
            return
        timer = threading.Timer(self._task_timeout, self._abandon, (work.name, future))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _abandon(self, name: str, future: Future[Outcome]) -> None:
        """Leave a thread to its task, which nobody can stop, and have another in its place."""
        error = TaskTimeoutError(f"A batch of {name} ran longer than task_timeout={self._task_timeout:g} seconds.")
        with self._lock:
            is_needed = not self._closed
        if self._end(future, functools.partial(future.set_exception, error)) and is_needed:
            try:
                self._crew.run(self._work)
            except RuntimeError:  # the system has no thread left; the next batch tries again
                with self._lock:
                    self._n_threads -= 1

    def _end(self, future: Future[Outcome], end: Callable[[], object]) -> bool:
        """End a batch, and return whether it had not ended; a future says who comes first, the task or its time."""
        with self._lock:
            self._n_unfinished -= 1
        try:
            end()
        except InvalidStateError:
            with self._lock:
                self._n_unfinished += 1
            return False
        return True
