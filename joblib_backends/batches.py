"""The batches of one call: what joblib holds of each, which of them wait, and which run.

Pure bookkeeping: nothing here runs a task, or waits but for the lock.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

from .data.codec import Payload
from .router import Nested
from .rules import Plan
from .sharing.ledger import Ledger, Prefixes
from .tiers import Tier

__all__ = ["Batch", "BatchFuture", "BatchQueue", "Callback"]

#: Batches at the head of the queue among which the best to start next is chosen: they are sorted by prefix.
_CHOICE: Final = 256

Callback = Callable[["BatchFuture"], object]


class BatchFuture(Future[list[Any]]):
    """What joblib holds for a batch."""

    def __init__(self, callback: Callback | None, size: int) -> None:
        super().__init__()
        self.callback = callback
        self.size = size
        # The results, while joblib's callback of the batch still runs.
        self.ready: list[Any] | None = None


class Batch:
    """A batch until it is done."""

    __slots__ = (
        "function", "future", "is_mixed", "n_together", "nested", "payload", "plan", "prefixes", "runs", "started",
        "steps", "tier",
    )  # fmt: skip

    def __init__(self, future: BatchFuture, function: Callable[[], Any], nested: Nested) -> None:
        self.future = future
        self.function = function
        # What a worker is given to run: the same, or the same with what it shares with others.
        self.runs = function
        # Of each task the steps that others may have too; and their identities.
        self.steps: Sequence[Any] = ()
        self.prefixes: Prefixes = ()
        self.nested = nested
        # Where it is to run, and why; and what it is for a tier that shares no memory.
        self.tier: Tier | None = None
        self.plan: Plan | None = None
        self.payload: Payload | None = None
        self.started = 0.0
        # How many ran when it ended, and whether anything ran on another tier since it was started.
        self.n_together = 1
        self.is_mixed = False


class BatchQueue:
    """Batches that wait for their turn, and those that run.

    Parameters
    ----------
    n_jobs : int
        Batches that may run at once.
    as_completed : bool, default=False
        Whether results are wanted in the order of their end: then no batch is made to wait for one worker.

    Notes
    -----
    Thread-safe; the lock guards everything in here.
    """

    def __init__(self, n_jobs: int, *, as_completed: bool = False) -> None:
        self._n_jobs = n_jobs
        self._as_completed = as_completed
        self._lock = threading.Lock()
        self._waiting: deque[Batch] = deque()
        self._running: set[Batch] = set()
        self._n_running_on: Counter[Tier | None] = Counter()
        self._busy_s = self._busy_since = self._last_mixed = 0.0
        self._is_closed = False
        #: What the batches have in common, where they share it: then it decides which is next.
        self.ledger: Ledger | None = None

    def __repr__(self) -> str:
        return f"<BatchQueue {self}>"

    def __str__(self) -> str:
        return f"{len(self._running)}/{self._n_jobs} in flight, {len(self._waiting)} waiting"

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_closed(self) -> bool:
        """Whether nothing is started any more."""
        return self._is_closed

    @property
    def waiting(self) -> list[Batch]:
        """The batches that wait for their turn, the next one first."""
        with self._lock:
            return list(self._waiting)

    def put(self, batch: Batch) -> None:
        """Let a batch wait for its turn."""
        with self._lock:
            if not self._is_closed:
                self._waiting.append(batch)

    def close(self) -> None:
        """Start nothing any more, whatever still comes."""
        with self._lock:
            self._is_closed = True
            self._waiting.clear()

    def place(self, batch: Batch, tier: Tier, plan: Plan, payload: Payload | None) -> None:
        """Note where a batch is to run."""
        with self._lock:
            # Race: a batch that waited may have started meanwhile, where it was sent before.
            if not batch.started:
                batch.tier, batch.plan, batch.payload = tier, plan, payload

    def has_next(self, *, in_caller: bool, looks_ahead: bool) -> bool:
        """Return whether the first batch that waits may start now, in the calling thread or on another tier."""
        with self._lock:
            return self._has_next(in_caller, looks_ahead)

    def start_next(self, *, in_caller: bool, looks_ahead: bool) -> Batch | None:
        """Take out the first batch that waits, if it may start now."""
        with self._lock:
            if not self._has_next(in_caller, looks_ahead):
                return None
            if self.ledger is not None:
                self._bring_best_forward(self.ledger)
            batch = self._waiting.popleft()
            batch.started = time.perf_counter()
            if self.ledger is not None:
                self.ledger.start(batch.prefixes)
            if not self._running:
                self._busy_since = batch.started
            self._running.add(batch)
            self._n_running_on[batch.tier] += 1
            return batch

    def _has_next(self, in_caller: bool, looks_ahead: bool) -> bool:
        if not self._waiting:
            return False
        tier = self._waiting[0].tier
        assert tier is not None
        if tier.runs_in_caller != in_caller:
            return False
        if not looks_ahead or (self._as_completed and tier.binds_early) or self._runs_elsewhere(tier):
            return len(self._running) < self._n_jobs
        return len(self._running) < self._n_jobs + tier.look_ahead

    def _bring_best_forward(self, ledger: Ledger) -> None:
        tier = self._waiting[0].tier
        head = [batch for batch in itertools.islice(self._waiting, _CHOICE) if batch.tier is tier]
        best = head[ledger.best(batch.prefixes for batch in head)]
        if best is not self._waiting[0]:
            self._waiting.remove(best)
            self._waiting.appendleft(best)

    def _runs_elsewhere(self, tier: Tier | None) -> bool:
        # A tier keeps its own batches to n_jobs; what is handed over ahead while others run elsewhere would exceed it.
        return self._n_running_on[tier] != len(self._running)

    def put_back(self, batch: Batch) -> None:
        """Let a batch that was just started, and has not run, wait for its turn again, before all others."""
        with self._lock:
            self._leave(batch)
            batch.started = 0.0
            if self.ledger is not None:
                self.ledger.put_back(batch.prefixes)
            if not self._is_closed:
                self._waiting.appendleft(batch)

    def finish(self, batch: Batch) -> None:
        """Note that a batch is done."""
        with self._lock:
            batch.n_together = min(len(self._running), self._n_jobs)
            if self._runs_elsewhere(batch.tier):
                self._last_mixed = time.perf_counter()
            batch.is_mixed = batch.started <= self._last_mixed
            self._leave(batch)

    def _leave(self, batch: Batch) -> None:
        self._running.discard(batch)
        self._n_running_on[batch.tier] -= 1
        if not self._running:
            self._busy_s += time.perf_counter() - self._busy_since

    def busy_seconds(self) -> float:
        """Return for how long anything has been running, in all."""
        with self._lock:
            return self._busy_s + (time.perf_counter() - self._busy_since if self._running else 0.0)

    def parts_left(self, batch: Batch, task_s: float) -> list[float]:
        """Return of each batch that runs beside ``batch`` the part of its time that it still has to run.

        ``task_s`` is what a task is expected to take, 0 if that is not known.
        """
        now = time.perf_counter()
        with self._lock:
            others = [other for other in self._running if other is not batch]
            return [1.0 - (now - one.started) / (task_s * one.future.size) if task_s else 1.0 for one in others]
