"""Ends the batches of a Dask cluster, and looks after those that are still there: the thread that waits for results."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import queue
import time
from collections import Counter
from concurrent.futures import CancelledError
from typing import Any, Final

from ..crew import Crew
from ..errors import ClusterLostError, ClusterUnavailableError, TaskTimeoutError
from ..remote import Missing
from .client import is_alive
from .fetching import Fetching
from .flight import CHANGED, Flight, data_lost_here
from .losses import failure_of, replace_worker
from .outfit import Outfit, lacks_package
from .places import Places
from .sender import Sender, drain
from .ticket import Cancel, Ticket

__all__ = ["Collector"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at a cluster that has batches of ours: whether it has workers, and what runs too long.
_LOOK_EVERY_S: Final = 0.5

#: Seconds for which outcomes that are here are not released, because more batches may be sent: the next call's.
_RELEASE_S: Final = 0.05


class Collector:
    """Ends what is done, and what will never be.

    Parameters
    ----------
    flight : Flight
        What is on the cluster.
    places : Places
        Where data is.
    outfit : Outfit
        What gives the package to workers.
    sender : Sender
        What is told of another scheduler.
    """

    def __init__(self, flight: Flight, places: Places, outfit: Outfit, sender: Sender) -> None:
        self._flight = flight
        self._places = places
        self._outfit = outfit
        self._sender = sender
        self._fetching = Fetching(flight)
        self._n_stuck: Counter[str] = Counter()
        self._looked = self._had_workers = self._sought_overdue = time.monotonic()
        # Of the batches that had started when overdue ones were last sought.
        self._first_due = math.inf
        self._is_over = False

    def run(self) -> None:
        """Collect until :meth:`stop`."""
        while not self._is_over:
            try:
                self._turn()
            except Exception as error:
                # Never silently: somebody waits for every batch.
                _log.debug("The collector of a Dask connection failed", exc_info=True)
                self._end_all(self._flight.cut_off(error))
        # What is still under way leads back here by its callback.
        self._fetching.give_up()

    def stop(self) -> None:
        """End the thread."""
        self._is_over = True
        self._flight.done.put(None)

    def _turn(self) -> None:
        is_idle = not self._flight
        try:
            first = self._flight.done.get(timeout=self._seconds_to_next_look())
        except queue.Empty:
            first = None
        if is_idle:
            # Nothing was on the cluster, and nobody has looked at it.
            self._had_workers = time.monotonic()
        for ticket in (first, *drain(self._flight.done)):
            # Read once: who ends a ticket takes its future away.
            future = None if ticket is None else ticket.dask_future
            if ticket is not None and future is not None and not ticket.done():
                self._sort(ticket, future)
        for ticket, outcome in self._fetching.take():
            self._finish(ticket, outcome)
        self._fetching.start_due()
        if time.monotonic() - self._flight.spent_since >= _RELEASE_S:
            self._flight.release_spent()
        self._look_after_rest()

    # ---- what is done

    def _sort(self, ticket: Ticket, future: Any) -> None:
        """Find out how a task has ended, and have its outcome fetched if there is one."""
        status = future.status
        if status == "finished":
            # It runs no more, however long its outcome takes to come here.
            ticket.started = None
            self._fetching.add(ticket)
        elif status in ("cancelled", "lost"):
            self._was_cancelled(ticket, status)
        elif status == "error" and lacks_package(future.exception()):
            self._outfit.lapse(is_lacking=True)
            self._flight.send_again(ticket, "its worker has not been given joblib_backends")
        elif status == "error":
            self._flight.end(ticket, None, failure_of(future))

    def _finish(self, ticket: Ticket, outcome: object) -> None:
        if isinstance(outcome, Missing):
            self._bring_data(ticket, outcome)
        elif outcome is None:
            # No try of the batch: it had ended well.
            self._flight.send_again(ticket, "its worker died with its outcome")
        else:
            self._flight.end(ticket, outcome)  # type: ignore[arg-type]

    def _bring_data(self, ticket: Ticket, missing: Missing) -> None:
        """Send a batch again, when a worker did not have its data; if that is gone here, too, it ends."""
        gone = data_lost_here(ticket)
        if gone is not None:
            self._flight.end(ticket, None, gone)
            return
        if missing.worker not in self._flight.workers:
            self._flight.forget_workers()
        self._places.refute(missing, ticket.payload.residents)
        self._flight.send_again(ticket, "its data was missing on the worker")

    def _was_cancelled(self, ticket: Ticket, status: str) -> None:
        """Find out why a task is gone that we did not cancel."""
        if self._flight.client.status != "running":
            self._flight.end(ticket, None, self._flight.cut_off(None))
            return
        # With its data, which only a worker had that died; or by another scheduler, which came in the place of one
        # that knew it.
        self._sender.start_anew()
        self._flight.send_again(ticket, f"it was {status} on the cluster")

    # ---- what is still on the cluster

    def _seconds_to_next_look(self) -> float | None:
        if not self._flight:
            return _RELEASE_S if self._flight.spent_since < math.inf else None
        now = time.monotonic()
        due = min(self._next_due(), self._fetching.next_time(), self._flight.spent_since + _RELEASE_S)
        return max(0.0, min(self._looked + _LOOK_EVERY_S, due, now + _LOOK_EVERY_S) - now)

    def _next_due(self) -> float:
        """Return when a batch may be overdue, at the earliest.

        What has started since they were last sought is overdue no sooner than its time limit after that.
        """
        return min(self._first_due, self._sought_overdue + self._flight.least_timeout_s)

    def _overdue(self, now: float) -> list[Ticket]:
        """Return the batches that have been running for too long."""
        if now < self._next_due():
            return []
        self._sought_overdue = now
        limited = self._flight.limited
        dues = [ticket.started[0] + ticket.timeout_s for ticket in limited if ticket.started and ticket.timeout_s]
        self._first_due = min((due for due in dues if due > now), default=math.inf)
        return [ticket for ticket in limited if ticket.is_overdue(now)]

    def _look_after_rest(self) -> None:
        now = time.monotonic()
        if not self._flight:
            self._had_workers = now
            return
        overdue = self._overdue(now)
        if overdue or now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            self._look_at_workers()
        for ticket in overdue:
            # A worker that is gone has let it go, and Dask runs it elsewhere.
            if ticket.started is not None and not ticket.done():
                self._end_overdue(ticket, ticket.started[1])

    def _look_at_workers(self) -> None:
        """Give up a cluster that is gone, or has had no worker for long: nothing else would tell."""
        flight = self._flight
        if not is_alive(flight.client):
            self._end_all(flight.cut_off(None))
            return
        try:
            flight.ask_for_workers()
        except ClusterUnavailableError as problem:
            self._end_all(flight.cut_off(problem))
            return
        now = time.monotonic()
        self._had_workers = now if flight.workers else self._had_workers
        # What waits for data looks again at who is there.
        flight.outbox.put(CHANGED)
        for ticket in flight.limited:
            if ticket.started is not None and ticket.started[1] not in flight.workers:
                ticket.started = None
        for ticket in flight.with_data:
            if ticket.workers is not None:
                self._send_elsewhere_if_bound(ticket)
        for ticket in flight.tickets:
            if ticket.outer_task is not None and not ticket.outer_task.is_wanted():
                self._give_up(ticket)
        for ticket in self._fetching.give_up_slow():
            flight.send_again(ticket, "its worker left before its outcome was fetched")
        if now - self._had_workers > flight.wait_s:
            self._end_all(
                ClusterLostError(
                    f"The Dask cluster of {flight.client!r} has had no worker for "
                    f"wait_for_workers={flight.wait_s:g} seconds: did they run out of memory, or of time?"
                )
            )

    def _send_elsewhere_if_bound(self, ticket: Ticket) -> None:
        """Send a batch again that waits for workers which have all left."""
        future = ticket.dask_future
        has_none_left = ticket.workers is not None and not ticket.workers & self._flight.workers
        if has_none_left and future is not None and future.status == "pending":
            # All that it may run on are gone: Dask would keep it for them.
            self._flight.outbox.put(Cancel([], [future]))
            self._flight.send_again(ticket, "all workers that had its data have left")

    def _give_up(self, ticket: Ticket) -> None:
        """Cancel a batch of a call that is made in a Dask task which was cancelled."""
        self._flight.outbox.put(Cancel([], [ticket.dask_future]))
        self._flight.end(ticket, None, CancelledError(f"{ticket.outer_task!r} was cancelled."))

    def _end_overdue(self, ticket: Ticket, address: str) -> None:
        future = ticket.dask_future
        message = (
            f"A batch of {ticket.name} ran longer than task_timeout={ticket.timeout_s:g} seconds on a Dask worker."
        )
        self._flight.end(ticket, None, TaskTimeoutError(message))
        self._n_stuck[address] += 1
        replace = functools.partial(replace_worker, self._flight.client, future, address, self._n_stuck[address])
        # In a thread of its own: a restart takes seconds.
        with contextlib.suppress(RuntimeError):  # no thread can be started; the batch has ended all the same
            Crew.shared().run(replace)

    def _end_all(self, error: BaseException) -> None:
        self._fetching.give_up()
        self._flight.end_all(error)
