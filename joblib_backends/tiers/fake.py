"""A tier for tests: batches go through the codec like to a process, and run in one thread of this process.

A test can hold batches back, let them go, and make the next one fail, without a process and without sleeping::

    with fake_control() as control:
        control.hold()
        ...                       # submit
        control.lose_next()       # as if its worker had died
        control.release()
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import ClassVar

from ..budget import available_cores
from ..config import Config
from ..errors import WorkerLostError
from ..worker import Outcome, run_payload, unpack
from .base import Tier, Work

__all__ = ["FakeControl", "FakeTier", "fake_control"]


class FakeControl:
    """What the fake tier does with batches; shared by the calls inside one :func:`fake_control`."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        #: The names of the batches that were submitted, and the most that were in flight at once.
        self.submitted: list[str] = []
        self.n_aborted = 0

    def hold(self) -> None:
        """Keep batches waiting until :meth:`release`."""
        self._open.clear()

    def release(self) -> None:
        """Let batches run."""
        self._open.set()

    def lose_next(self) -> None:
        """Make the next batch end as if its worker had died."""
        self.fail_next(WorkerLostError("The fake tier lost a worker, as the test asked."))

    def fail_next(self, error: Exception) -> None:
        """Make the tier fail with ``error`` for the next batch."""
        self._failures.put(error)

    def wait_for_turn(self) -> Exception | None:
        """Wait until batches may run; return how this one must fail, or None. Called by the fake worker."""
        self._open.wait()
        try:
            return self._failures.get_nowait()
        except queue.Empty:
            return None


@contextmanager
def fake_control() -> Iterator[FakeControl]:
    """Control what the fake tier does inside the block."""
    outer, FakeTier.control = FakeTier.control, FakeControl()
    try:
        yield FakeTier.control
    finally:
        FakeTier.control.release()
        FakeTier.control = outer


class FakeTier(Tier):
    """Runs payloads in one thread of this process, under a test's control."""

    name = "fake"
    shares_memory = False
    control: ClassVar[FakeControl] = FakeControl()

    @classmethod
    def capacity(cls, config: Config) -> int:
        """Return the cores that this backend may use."""
        return available_cores(config)

    def __init__(self, config: Config, n_jobs: int) -> None:
        self._control = FakeTier.control
        self._queue: queue.SimpleQueue[tuple[Work, Future[Outcome]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._aborted = False

    def submit(self, work: Work) -> Future[Outcome]:
        """Queue a batch for the fake worker."""
        future: Future[Outcome] = Future()
        self._control.submitted.append(work.name)
        self._queue.put((work, future))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="joblib_backends-fake", daemon=True)
            self._thread.start()
        return future

    def outcome(self, future: Future[Outcome]) -> Outcome:
        """Return the outcome of a finished batch."""
        return future.result()

    def abort(self) -> None:
        """Drop what waits."""
        self._aborted = True
        self._control.n_aborted += 1
        self.close()

    def close(self) -> None:
        """Let the worker end."""
        if self._thread is not None:
            self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._run(*item)
            # An idle thread must not keep the last batch's data alive.
            del item

    def _run(self, work: Work, future: Future[Outcome]) -> None:
        error = self._control.wait_for_turn()
        if self._aborted or not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(unpack(run_payload(work.wire, owns_process=False)))
