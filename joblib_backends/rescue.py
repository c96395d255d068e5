"""Does what ``recovery.py`` says about a batch that was lost: runs it again, elsewhere, in parts, or gives it up.

Runs in the completer of the call, and for what is left at the end also in the thread that waits for results.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from typing import Protocol

from .batches import Batch, BatchFuture, BatchQueue
from .config import Config
from .errors import WorkerLostError
from .pilot import Pilot
from .recovery import Step, failed_results, failure_of, next_step, pieces_of, warn
from .router import Router
from .tally import Tally
from .worker import Outcome

__all__ = ["Rescue", "Rescued"]

_log = logging.getLogger(__name__)


class Rescued(Protocol):
    """What a rescue needs of its call."""

    @property
    def unfinished(self) -> Collection[BatchFuture]:
        """The futures that have not ended."""

    @property
    def is_in_caller(self) -> bool:
        """Whether this is the thread that called joblib."""

    @property
    def has_failed(self) -> bool:
        """Whether the call has failed already."""

    @property
    def has_dispatched(self) -> bool:
        """Whether the caller has handed over all that it does by itself."""

    @property
    def n_local_jobs(self) -> int:
        """Batches that may run at once on this machine."""

    def dispatch_next(self) -> bool:
        """Have joblib dispatch the next tasks; return whether there may be more."""

    def limit_jobs(self, n_jobs: int) -> None:
        """Run fewer batches at once from now on."""

    def place(self, batch: Batch) -> None:
        """Decide where a batch runs, and make it ready for that."""

    def place_waiting(self, *, only_here: bool) -> None:
        """Decide anew where batches run that wait: all, or those that would run in this process."""

    def share_part(self, piece: Batch) -> None:
        """Find out what a part of a batch has in common with others."""

    def drop_shares(self, batch: Batch) -> None:
        """Note that a batch will never need what it has in common with others."""

    def start_what_waits(self) -> None:
        """Start what may start now."""

    def finish(self, batch: Batch, outcome: Outcome) -> None:
        """Take the results of a batch."""

    def note_end(self, batch: Batch, outcome: Outcome) -> None:
        """Count a batch that runs no more."""

    def fail(self, error: BaseException, culprit: BatchFuture | None) -> None:
        """End the call."""


class Rescue:
    """What one call lost, and what became of it.

    Parameters
    ----------
    call : Rescued
        The call; a weak reference to it will do, for all here runs within its methods.
    config, queue, router, pilot, tally
        Of the call.
    """

    def __init__(
        self,
        call: Rescued,
        config: Config,
        queue: BatchQueue,
        router: Router,
        pilot: Pilot,
        tally: Tally,
    ) -> None:
        self._call = call
        self._config = config
        self._queue = queue
        self._router = router
        self._pilot = pilot
        self._tally = tally
        self._lock = threading.Lock()
        # The failure of the first batch that was given up, kept until all else is done; and the futures of all such.
        self._deferred: BaseException | None = None
        self._given_up: set[BatchFuture] = set()
        self._has_left_cluster = False

    def __repr__(self) -> str:
        return f"<Rescue {len(self._given_up)} batches given up>"

    def of(self, batch: Batch, fault: BaseException) -> None:
        """Have a batch that was lost run again, or give it up."""
        if isinstance(fault, WorkerLostError):
            self._tally.add_fault(lost_workers=fault.n_deaths)
        step = next_step(batch, fault, self._config)
        _log.debug("A batch of %s was lost (%s): %s", self._tally.function, step, fault)
        try:
            if step == "give up":
                self._give_up(batch, failure_of(batch, fault, self._config))
            elif step == "fail" or (step == "leave the cluster" and not self._leave_cluster(fault)):
                failure = failure_of(batch, fault, self._config)
                self._call.note_end(batch, Outcome(None, failure))
                self._call.fail(failure, batch.future)
            else:
                self._run_again(batch, step, fault)
        except Exception as error:
            self._call.fail(error, batch.future)
        except BaseException as error:
            # Ctrl-C, where joblib waits for it: swallowed here, it would wait for a batch that nobody finishes.
            self._call.fail(error, batch.future)
            if self._call.is_in_caller:
                raise

    def _run_again(self, batch: Batch, step: Step, fault: BaseException) -> None:
        """Let a batch wait for another turn, with its data placed anew if that may be gone."""
        pieces = [batch]
        if step == "run again":
            self._pilot.lost_worker()
            self._call.place_waiting(only_here=True)
            pieces = pieces_of(batch, self._config)
        if batch.payload is not None:
            # Always: a worker that reads from a file that was cut short is killed for it.
            is_news = self._router.place_again(batch.payload, fault)
            if is_news:
                # A task may have several such files, of which each try finds one.
                batch.n_replaced -= 1
        self._tally.add_fault(retries=1)
        was_started = bool(batch.started)
        for piece in pieces:
            piece.payload, piece.started, piece.submitted = None, 0.0, time.perf_counter()
            if piece is not batch:
                self._call.share_part(piece)
            self._call.place(piece)
        if was_started:
            self._queue.put_again(batch, pieces)
        else:
            for piece in pieces:
                self._queue.put(piece)
        self._call.start_what_waits()

    def _leave_cluster(self, fault: BaseException) -> bool:
        """Send everything to the local tiers from now on; return whether that is possible."""
        n_jobs = self._call.n_local_jobs
        if not self._router.leave_cluster(n_jobs):
            return False
        with self._lock:
            # A helper may come here beside the caller.
            has_left, self._has_left_cluster = self._has_left_cluster, True
        if has_left:
            return True
        self._call.limit_jobs(n_jobs)
        self._pilot.leave_cluster()
        self._call.place_waiting(only_here=False)
        warn(f"The call goes on with {n_jobs} jobs on this machine, without its Dask cluster. {fault}")
        return True

    def _give_up(self, batch: Batch, failure: BaseException) -> None:
        """End a batch that cannot be had: with a score that says so, or with the call, once all else is done."""
        self._call.drop_shares(batch)
        results = failed_results(batch, failure)
        if results is not None:
            warn(f"A task of a search was given up and gets its error_score: {failure}")
            batch.keys = ()  # it is not kept: the next run may have more luck
            self._call.finish(batch, Outcome(results, None))
            self._call.start_what_waits()
            return
        self._call.note_end(batch, Outcome(None, failure))
        with self._lock:
            self._deferred = self._deferred or failure
        self._call.start_what_waits()
        if batch.parts is None or batch.parts.give_up(batch.positions):
            self.give_up_future(batch.future)

    def give_up_future(self, future: BatchFuture) -> None:
        """Note that a batch has no result, and nothing of it runs any more."""
        with self._lock:
            self._given_up.add(future)
        if not self._call.has_failed:
            # joblib dispatches the next tasks when some are done, which these never will be.
            self._call.dispatch_next()
        self.end_if_nothing_else_is_left()

    def end_if_nothing_else_is_left(self) -> None:
        """End the call with what was given up, if that is all that is left of it."""
        if self._deferred is None or not self._call.has_dispatched:
            return
        while not self._call.has_failed and set(self._call.unfinished) <= self._given_up:
            if not self._call.dispatch_next():
                self._call.fail(self._deferred, next(iter(self._given_up)))

    def failure_of(self, future: BatchFuture) -> BaseException | None:
        """Return what a batch was given up for that waits for the others; None if it was not."""
        return self._deferred if future in self._given_up else None
