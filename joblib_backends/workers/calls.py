"""The batches of one call on a pool, before they are on a worker. A :class:`CallQueue` is under the
pool's lock; a :class:`PoolCall` is what the call itself holds."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, Protocol

from ..memory import MemoryWatch

__all__ = ["Batch", "CallQueue", "PoolCall"]

#: Mean seconds of a call's batches below which a worker gets the next one while it runs one. M: a worker without a
#: prefetched batch waits 100 µs for its next, 1 % of 10 ms; a longer batch would gain nothing, and what is in a
#: worker's pipe cannot be taken back when another worker becomes idle.
_PREFETCH_BELOW_S: Final = 0.010

#: Weight of the newest batch in the mean: a call that turns slow is seen within three batches.
_NEWEST: Final = 0.3


class Batch:
    """A function and its arguments, pickled, and the future of its result."""

    __slots__ = ("body", "future", "n_requeued", "name", "queue", "timeout_s")

    def __init__(self, queue: CallQueue, body: bytes, name: str, timeout_s: float | None = None) -> None:
        self.queue = queue
        self.body = body
        self.name = name
        self.n_requeued = 0
        #: Seconds that it may run on a worker; None for as long as it takes.
        self.timeout_s = timeout_s
        self.future: Future[Any] = Future()


class CallQueue:
    """What a call has waiting, and how much of it runs."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs
        self.waiting: deque[Batch] = deque()
        self.n_running = 0
        self.n_prefetched = 0
        self.is_over = False
        #: Whether a batch waits for memory.
        self.is_held_back = False
        self._mean_s: float | None = None

    @property
    def n_unfinished(self) -> int:
        """Batches that wait, or are on a worker."""
        return len(self.waiting) + self.n_running + self.n_prefetched

    @property
    def may_run(self) -> bool:
        """Whether a batch waits that the limit of the call allows to run now."""
        return bool(self.waiting) and self.n_running < self.n_jobs

    def asks_memory(self) -> bool:
        """Return whether there is memory for the next batch, which must start then."""
        self.is_held_back = bool(self.n_running and self.is_long) and not MemoryWatch.shared().allows_another()
        return not self.is_held_back

    def run_fewer(self) -> None:
        """Run no more than what runs now, of which is known that there is memory for it."""
        self.n_jobs = max(1, min(self.n_jobs, self.n_running))

    @property
    def may_prefetch(self) -> bool:
        """Whether a batch waits, and batches are so short that a worker should have its next one at hand.

        While the call may run more than it does, a worker is being started for the batch.
        """
        is_short = self._mean_s is not None and self._mean_s < _PREFETCH_BELOW_S
        return bool(self.waiting) and is_short and self.n_running >= self.n_jobs

    def take(self) -> Batch | None:
        """Return the next batch that nobody has cancelled."""
        while self.waiting:
            batch = self.waiting.popleft()
            # Requeued after its worker died, it is not started for the first time, and nobody can have cancelled it.
            if batch.future.running() or batch.future.set_running_or_notify_cancel():
                return batch
        return None

    @property
    def is_long(self) -> bool:
        """Whether batches take so long that a look at memory, 30 µs, is worth it before each."""
        return self._mean_s is None or self._mean_s >= _PREFETCH_BELOW_S

    def note(self, seconds: float) -> None:
        """Learn how long a batch ran."""
        self._mean_s = seconds if self._mean_s is None else (1 - _NEWEST) * self._mean_s + _NEWEST * seconds


class Runs(Protocol):
    """What a call needs of its pool."""

    def run(self, batch: Batch) -> None:
        """Queue a batch."""

    def end_call(self, queue: CallQueue) -> None:
        """Forget the call."""


class PoolCall:
    """One call's share of a pool. Thread-safe; ``abort`` and ``leave`` also from a finalizer."""

    def __init__(self, pool: Runs, n_jobs: int) -> None:
        self._pool = pool
        self.queue = CallQueue(n_jobs)

    def __repr__(self) -> str:
        return f"<PoolCall {self.queue.n_unfinished} batches, n_jobs={self.queue.n_jobs}, {self._pool!r}>"

    def submit(
        self, function: Callable[..., Any], *args: Any, name: str | None = None, timeout_s: float | None = None
    ) -> Future[Any]:
        """Return the future of ``function(*args)`` in a worker, at once.

        ``name`` is for messages. A worker that runs it for more than ``timeout_s`` seconds is replaced.
        """
        try:
            body = pickle.dumps((function, args), protocol=5)
        except Exception as error:
            future: Future[Any] = Future()
            future.set_exception(error)
            return future
        batch = Batch(self.queue, body, name or str(getattr(function, "__qualname__", "a function")), timeout_s)
        self._pool.run(batch)
        return batch.future

    def abort(self) -> None:
        """Give up what waits and kill the workers that run batches of this call, and only those."""
        self._pool.end_call(self.queue)

    def leave(self) -> None:
        """End the call. What it still has is given up as in ``abort``."""
        self._pool.end_call(self.queue)
