"""The batches of one call: what joblib holds of each, which of them wait, and which run.

Pure bookkeeping: nothing here runs a task, or waits but for the lock.
"""

from __future__ import annotations

import copy
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

__all__ = ["Batch", "BatchFuture", "BatchQueue", "Callback", "Parts"]

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


class Parts:
    """The results of a batch whose tasks do not all run together. Thread-safe."""

    def __init__(self, size: int) -> None:
        self.results: list[Any] = [None] * size
        #: Whether a part was given up; then the batch has no results.
        self.has_failed = False
        self._n_left = size
        self._lock = threading.Lock()

    def put(self, positions: Sequence[int], results: Sequence[Any]) -> bool:
        """Take the results of the tasks at ``positions``; return whether nothing of the batch is left."""
        for position, result in zip(positions, results, strict=True):
            self.results[position] = result
        return self._end(len(positions))

    def give_up(self, positions: Sequence[int]) -> bool:
        """Note that the tasks at ``positions`` have no results; return whether nothing of the batch is left."""
        self.has_failed = True
        return self._end(len(positions))

    def _end(self, n_tasks: int) -> bool:
        with self._lock:
            self._n_left -= n_tasks
            return not self._n_left


class Batch:
    """A batch, or a part of one, until it is done.

    Parameters
    ----------
    future : BatchFuture
        Of the whole batch.
    function : callable
        What runs: joblib's batch, with its tasks as ``items``, or any callable.
    nested : tuple
        The backend, and n_jobs, for Parallel calls inside the tasks.
    first_task : int
        The position of its first task among those of the call.
    parts : Parts, optional
        Where results go if this is a part, and ``positions``, which tasks of the whole these are.
    """

    __slots__ = (
        "first_task", "function", "future", "is_alone", "is_mixed", "keys", "n_lost", "n_replaced", "n_together",
        "n_tried", "nested", "parts", "payload", "plan", "positions", "prefixes", "runs", "size", "started", "steps",
        "submitted", "tier",
    )  # fmt: skip

    def __init__(
        self,
        future: BatchFuture,
        function: Callable[[], Any],
        nested: Nested,
        first_task: int = 0,
        parts: Parts | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        self.future = future
        self.function = function
        self.first_task = first_task
        self.parts = parts
        self.positions: Sequence[int] = range(future.size) if positions is None else positions
        self.size = len(self.positions)
        # What its tasks are known by in a checkpoint.
        self.keys: Sequence[Any] = ()
        # How many workers died over it, by the count of its tier, and in how many tries; how often its data was placed
        # again; whether it is to run when nothing else does.
        self.n_lost = 0
        self.n_tried = 0
        self.n_replaced = 0
        self.is_alone = False
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
        # When joblib handed it over, and when a tier got it.
        self.submitted = time.perf_counter()
        self.started = 0.0
        # How many ran when it ended, and whether anything ran on another tier since it was started.
        self.n_together = 1
        self.is_mixed = False

    @property
    def items(self) -> list[Any]:
        """The tasks: (function, args, kwargs); empty for a callable that is no batch of joblib's."""
        return list(getattr(self.function, "items", None) or ())

    def split(self, groups: Sequence[Sequence[int]]) -> list[Batch]:
        """Return a batch for each group of tasks, given by their places in this one, which then is never run itself."""
        parts, items = self.parts or Parts(self.size), self.items
        pieces = []
        for group in groups:
            function: Any = copy.copy(self.function)
            function.items = [items[place] for place in group]
            positions = [self.positions[place] for place in group]
            piece = Batch(self.future, function, self.nested, self.first_task, parts, positions)
            piece.n_lost, piece.n_tried, piece.submitted = self.n_lost, self.n_tried, self.submitted
            if self.keys:
                piece.keys = [self.keys[place] for place in group]
            if self.steps:
                piece.steps = [self.steps[place] for place in group]
            pieces.append(piece)
        return pieces


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
    def is_running(self) -> bool:
        """Whether any batch was started and is not done."""
        return bool(self._running)

    def runs_on(self, name: str) -> bool:
        """Return whether the batches that run were handed to the tier of that name."""
        with self._lock:
            return any(tier is not None and tier.name == name and n > 0 for tier, n in self._n_running_on.items())

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
        first = self._waiting[0]
        tier = first.tier
        assert tier is not None
        if tier.runs_in_caller != in_caller:
            return False
        if self._running and (first.is_alone or self._one_runs_alone()):
            return False
        if not looks_ahead or (self._as_completed and tier.binds_early) or self._runs_elsewhere(tier):
            return len(self._running) < self._n_jobs
        return len(self._running) < self._n_jobs + tier.look_ahead

    def _one_runs_alone(self) -> bool:
        return len(self._running) == 1 and next(iter(self._running)).is_alone

    def _bring_best_forward(self, ledger: Ledger) -> None:
        tier = self._waiting[0].tier
        if self._waiting[0].is_alone:
            return
        head = [b for b in itertools.islice(self._waiting, _CHOICE) if b.tier is tier and not b.is_alone]
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

    def put_again(self, batch: Batch, pieces: Sequence[Batch]) -> None:
        """Let what was lost of a finished batch wait again: first, or last where it is to run alone."""
        with self._lock:
            if self.ledger is not None:
                self.ledger.put_back(batch.prefixes)
            if self._is_closed:
                return
            for piece in reversed(pieces):
                piece.started = 0.0
                if piece.is_alone:
                    self._waiting.append(piece)
                else:
                    self._waiting.appendleft(piece)

    def limit(self, n_jobs: int) -> None:
        """Run fewer batches at once from now on."""
        with self._lock:
            self._n_jobs = min(self._n_jobs, n_jobs)

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
            return [1.0 - (now - one.started) / (task_s * one.size) if task_s else 1.0 for one in others]
