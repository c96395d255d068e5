"""Batches on their way to a Dask cluster and back.

::

    DaskTier ──put──> outbox ──> sender thread:     client.map of all that waits
    future done <─────────────── collector thread:  client.gather of all that is done; looks after the rest

Nothing of ours runs on the client's event loop but what puts something into a queue. A batch travels as opaque bytes,
which the scheduler never unpickles. Buffers travel by the path of the resident's file: workers on this machine map it,
and on any other host there is a copy (``places.py``) before a batch that needs it goes there. Until then it goes to
the workers that have the data, or waits.

Invariant: every batch that was put ends its future, whatever becomes of it on the cluster: result, error, cancelled,
lost with its workers, too late, or cut off with the whole cluster.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import pickle
import queue
import threading
import time
import uuid
from collections import Counter, defaultdict
from concurrent.futures import CancelledError, Future
from typing import Any, Final, NamedTuple

import distributed

from ..crew import Crew
from ..errors import (
    ClusterLostError,
    ClusterUnavailableError,
    DataLostError,
    TaskTimeoutError,
)
from ..remote import Missing, place_of_this_process, process_identity, run_remotely
from ..worker import PackedOutcome
from .client import is_alive, start_gather
from .losses import failure_of, replace_worker
from .outfit import Outfit, lacks_package
from .outlet import relaying
from .placement import Placement
from .places import Places
from .relay import Relay
from .ticket import Cancel, Ticket
from .travel import by_name

__all__ = ["Exchange"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at a cluster that has batches of ours: whether it has workers, and what runs too long.
_LOOK_EVERY_S: Final = 0.5

#: Times that a batch is sent again because its data was lost on the way, or somebody cancelled it.
_MOST_RESENT: Final = 3

#: Seconds that outcomes may be on their way here before others no longer wait for them; all that finishes meanwhile
#: comes together.
_FETCH_ALONE_S: Final = 0.05

#: Fetches that may be under way at a time.
_MOST_FETCHES: Final = 4

#: Seconds that they may be on their way before it matters whether their worker still exists.
_SLOW_FETCH_S: Final = 1.0


class _Changed:
    """Says that data has arrived somewhere."""


_CHANGED: Final = _Changed()


class _Fetch(NamedTuple):
    """Outcomes on their way here."""

    tickets: list[Ticket]
    outcomes: Future[dict[str, Any]]
    since: float
    #: The workers that there were.
    workers: frozenset[str]


class Exchange:
    """The sender and the collector thread of a connection.

    Parameters
    ----------
    client : distributed.Client
        The client.
    outbox : queue
        What is to be sent: tickets, cancellations, None to end.
    remote_objects : dict
        Dask futures of objects that are on the cluster already, by key.
    outfit : Outfit
        What gives the package to workers.
    wait_s : float
        Seconds for which a cluster may be without a worker.
    placement : Placement
        What is asked of the workers.
    owns_client : bool
        Whether the client ends with the exchange.
    """

    def __init__(
        self,
        client: Any,
        outbox: queue.SimpleQueue[Any],
        remote_objects: dict[str, Any],
        outfit: Outfit,
        wait_s: float,
        placement: Placement,
        *,
        owns_client: bool = False,
    ) -> None:
        self._client = client
        self._placement = placement
        self._outbox = outbox
        self._remote_objects = remote_objects
        self._outfit = outfit
        self._wait_s = wait_s
        self._owns_client = owns_client
        # What is done, and now and then None: look again, something has changed.
        self._done: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._in_flight: dict[str, Ticket] = {}
        self._is_over = False
        # What has finished, and what of it is on its way here.
        self._to_fetch: list[Ticket] = []
        self._fetches: list[_Fetch] = []
        self._nthreads: dict[str, int] = {}
        self._workers: frozenset[str] = frozenset()
        self._n_stuck: Counter[str] = Counter()
        # Of the sender thread: what waits for data that is on its way to workers.
        self._waiting: list[Ticket] = []
        self._places = Places(client, functools.partial(outbox.put, _CHANGED))
        self._origin, self._place = process_identity(), place_of_this_process()
        self._topic = f"joblib_backends-{uuid.uuid4().hex}"
        self._is_told_of_starts = False
        self._relay = Relay(client)
        self._looked = self._had_workers = time.monotonic()
        self._asked = -_LOOK_EVERY_S

    def start(self) -> None:
        """Start the threads; they end with the None that is put into the outbox."""
        for name, body in (("sender", self._send_all), ("collector", self._collect_all)):
            threading.Thread(target=body, name=f"joblib_backends-dask-{name}", daemon=True).start()

    # ---- sender thread

    def _send_all(self) -> None:
        """Send all that waits in one graph: what comes while a graph is on its way goes with the next."""
        while (first := self._outbox.get()) is not None:
            waiting = [first, *_drain(self._outbox)]
            tickets = [item for item in waiting if isinstance(item, Ticket)]
            if any(item is _CHANGED for item in waiting):
                tickets += self._waiting
                self._waiting = []
            tickets = [ticket for ticket in tickets if not ticket.done()]
            if tickets:
                self._send(tickets)
            for cancel in [item for item in waiting if isinstance(item, Cancel)]:
                self._cancel(cancel)
                del cancel
            if None in waiting:
                break
            # A thread that waits must hold no ticket: with it would stay the batch, its files and its context.
            del first, waiting, tickets
        with contextlib.suppress(Exception):  # the client may be closed, or never have asked
            self._client.unsubscribe_topic(self._topic)
        self._relay.close()
        self._is_over = True
        self._done.put(None)
        if self._owns_client:
            # Here and not in a finalizer, which may run in any thread, the client's own event loop too.
            with contextlib.suppress(Exception):
                self._client.close()

    def _send(self, tickets: list[Ticket]) -> None:
        try:
            self._outfit.provide()
            if time.monotonic() - self._asked > _LOOK_EVERY_S:
                self._note_workers()
            # Before they run, or their starts would be missed.
            self._hear_of_starts(tickets)
            for workers, batches in self._sorted_by_workers(tickets).items():
                self._send_to(workers, batches)
        except Exception as error:
            for ticket in tickets:
                self._end(ticket, None, self._cut_off(error))
            return
        # The collector may be waiting for ever, because nothing was in flight.
        self._done.put(None)

    def _sorted_by_workers(self, tickets: list[Ticket]) -> dict[frozenset[str] | None, list[Ticket]]:
        """Return batches by the workers that have their data, None for all; those whose data has to come first wait."""
        sorted_ = defaultdict(list)
        if any(ticket.payload.residents for ticket in tickets):
            self._places.look(self._workers)
        for ticket in tickets:
            try:
                workers = self._places.workers_for(ticket.payload.residents) if ticket.payload.residents else None
            except ClusterLostError as error:
                self._end(ticket, None, self._why_not_there(ticket) or error)
                continue
            self._in_flight[ticket.key] = ticket
            ticket.workers = workers
            if workers is None or self._n_restricted() < sum(self._nthreads.get(worker, 0) for worker in workers):
                ticket.is_sent = True
                sorted_[workers].append(ticket)
            else:
                self._waiting.append(ticket)
        return sorted_

    def _n_restricted(self) -> int:
        """Return how many batches were sent to those workers only that have their data already.

        No more than those can run at once: what is sent ahead to them could not go to others that have it soon.
        """
        return sum(ticket.is_sent and ticket.workers is not None for ticket in list(self._in_flight.values()))

    def _send_to(self, workers: frozenset[str] | None, tickets: list[Ticket]) -> None:
        options = self._placement.options if workers is None else {**self._placement.options, "workers": list(workers)}
        relay_topic = self._relay.listen(tickets)
        calls = [by_name(_run, **self._batch(ticket, relay_topic)) for ticket in tickets]
        expressions, namespaces = [call[0] for call in calls], [call[1] for call in calls]
        keys = [ticket.key for ticket in tickets]
        futures = self._client.map(eval, expressions, namespaces, key=keys, pure=False, **options)
        for ticket, future in zip(tickets, futures, strict=True):
            ticket.dask_future = future
            future.add_done_callback(functools.partial(_note_done, self._done, ticket))

    def _batch(self, ticket: Ticket, relay_topic: str | None) -> dict[str, Any]:
        """Return what :func:`_run` gets; all that is ours in it is bytes to the scheduler."""
        return {
            "wire": pickle.dumps(ticket.wire, protocol=5),
            "watched": ticket.key if ticket.timeout_s else None,
            "remote_objects": dict(self._remote_objects),
            "origin": self._origin,
            "place": self._place,
            "topic": self._topic,
            "relay_topic": relay_topic,
        }

    def _hear_of_starts(self, tickets: list[Ticket]) -> None:
        if not self._is_told_of_starts and any(ticket.timeout_s for ticket in tickets):
            self._client.subscribe_topic(self._topic, self._note_start)
            self._is_told_of_starts = True

    def _why_not_there(self, ticket: Ticket) -> DataLostError | None:
        """Return the error for a batch whose data is gone here, too; None if it is not."""
        for resident in ticket.payload.residents:
            if not resident.is_there():
                return DataLostError(errno.ENOENT, "The file of a resident is gone; was it deleted?", resident.path)
        return None

    def _cancel(self, cancel: Cancel) -> None:
        futures = [*cancel.futures, *(ticket.dask_future for ticket in cancel.tickets)]
        futures = [future for future in futures if future is not None]
        for ticket in cancel.tickets:
            self._in_flight.pop(ticket.key, None)
        self._waiting = [ticket for ticket in self._waiting if not ticket.done()]
        if not futures:
            return
        with contextlib.suppress(Exception):  # the cluster may be gone; then there is nothing to cancel
            self._client.cancel(futures)

    # ---- the client's event loop

    def _note_start(self, event: tuple[float, Any]) -> None:
        key, address = event[1]
        ticket = self._in_flight.get(key)
        if ticket is not None:
            # By this clock: those of other hosts may differ.
            ticket.started = (time.monotonic(), address)
            self._done.put(None)

    # ---- collector thread

    def _collect_all(self) -> None:
        while not self._is_over:
            try:
                self._turn()
            except Exception as error:
                # Never silently: somebody waits for every batch.
                _log.debug("The collector of a Dask connection failed", exc_info=True)
                self._end_all(self._cut_off(error))
        # What is still under way leads back here by its callback.
        self._fetches = []

    def _turn(self) -> None:
        wait_s = self._seconds_to_next_look()
        try:
            first = self._done.get(timeout=wait_s)
        except queue.Empty:
            first = None
        if wait_s is None:
            # Nothing was on the cluster, and nobody has looked at it.
            self._had_workers = time.monotonic()
        for ticket in (first, *_drain(self._done)):
            if ticket is not None and ticket.dask_future is not None:
                self._sort(ticket)
        self._fetch()
        self._look_after_rest()

    def _sort(self, ticket: Ticket) -> None:
        """Find out how a task has ended, and have its outcome fetched if there is one."""
        status = ticket.dask_future.status
        if status == "finished":
            # It runs no more, however long its outcome takes to come here.
            ticket.started = None
            self._to_fetch.append(ticket)
        elif status in ("cancelled", "lost"):
            self._was_cancelled(ticket)
        elif status == "error" and lacks_package(ticket.dask_future.exception()):
            self._outfit.lapse()
            self._send_again(ticket, "its worker has not been given joblib_backends")
        elif status == "error":
            self._end(ticket, None, failure_of(ticket.dask_future))

    def _fetch(self) -> None:
        """Take what was fetched, and have all that has finished meanwhile fetched together.

        Not a wait: the worker that has an outcome may die now, and with the last worker it would never end. Nor may
        others wait long for it, for they would be lost with the next worker that dies.
        """
        fetched = [fetch for fetch in self._fetches if fetch.outcomes.done()]
        self._fetches = [fetch for fetch in self._fetches if fetch not in fetched]
        for fetch in fetched:
            self._take(fetch)
        # Some may have ended meanwhile, with their call or with the cluster.
        self._to_fetch = [ticket for ticket in self._to_fetch if not ticket.done()]
        now = time.monotonic()
        if self._to_fetch and now >= self._next_fetch():
            tickets, self._to_fetch = self._to_fetch, []
            outcomes = start_gather(self._client, [ticket.key for ticket in tickets])
            self._fetches.append(_Fetch(tickets, outcomes, now, self._workers))
            outcomes.add_done_callback(lambda _: self._done.put(None))

    def _next_fetch(self) -> float:
        """Return when the next fetch may start, beside those that are under way: each has a connection of its own."""
        if len(self._fetches) >= _MOST_FETCHES:
            return math.inf
        return self._fetches[-1].since + _FETCH_ALONE_S if self._fetches else 0.0

    def _take(self, fetched: _Fetch) -> None:
        try:
            outcomes = fetched.outcomes.result()
        except (Exception, CancelledError) as error:
            for ticket in fetched.tickets:
                self._end(ticket, None, self._cut_off(error))
            return
        for ticket in fetched.tickets:
            outcome = outcomes.get(ticket.key)
            if isinstance(outcome, Missing):
                self._miss(ticket, outcome)
            elif outcome is None:
                # No try of the batch: it had ended well.
                self._send_again(ticket, "its worker died with its outcome")
            else:
                self._end(ticket, outcome)

    def _miss(self, ticket: Ticket, missing: Missing) -> None:
        """Send a batch again, when a worker did not have its data; if that is gone here, too, it ends."""
        gone = self._why_not_there(ticket)
        if gone is not None:
            self._end(ticket, None, gone)
            return
        if missing.worker not in self._workers:
            # It has joined since somebody looked.
            self._asked = -_LOOK_EVERY_S
        self._places.refute(missing, ticket.payload.residents)
        self._send_again(ticket, "its data was missing on the worker")

    def _end(self, ticket: Ticket, outcome: PackedOutcome | None, error: BaseException | None = None) -> None:
        self._in_flight.pop(ticket.key, None)
        self._relay.after_messages(functools.partial(ticket.end, outcome, error))
        if ticket.workers is not None:
            self._outbox.put(_CHANGED)

    def _was_cancelled(self, ticket: Ticket) -> None:
        """Find out why a task is gone that we did not cancel."""
        if self._client.status != "running":
            self._end(ticket, None, self._cut_off(None))
            return
        # With its data, which only a worker had that died; or by another scheduler, which came in the place of one
        # that knew it, and does not tell us of starts, or give workers the package.
        self._is_told_of_starts = False
        self._relay.subscribe_again()
        self._outfit.lapse()
        self._send_again(ticket, f"it was {ticket.dask_future.status} on the cluster")

    def _send_again(self, ticket: Ticket, why: str) -> None:
        _log.debug("A batch of %s is sent to the cluster again: %s", ticket.name, why)
        self._in_flight.pop(ticket.key, None)
        if ticket.n_resent >= _MOST_RESENT:
            ticket.end(
                None,
                ClusterLostError(
                    f"A batch of {ticket.name} was sent to the Dask cluster {ticket.n_resent + 1} times: {why}. Do "
                    "workers come and go there?"
                ),
            )
            return
        ticket.n_resent += 1
        ticket.dask_future, ticket.started, ticket.is_sent = None, None, False
        self._outbox.put(ticket)

    def _cut_off(self, cause: BaseException | None) -> BaseException:
        why = f": {cause}" if cause else ""
        failure = ClusterLostError(
            f"Batches could not be sent to {self._client!r}, or fetched from it{why}. Has its scheduler ended, or can "
            "it not be reached any more?"
        )
        # Without the frames that lead to the tickets, which hold this.
        failure.__cause__ = None if cause is None else cause.with_traceback(None)
        return failure

    # ---- what is still on the cluster

    def _seconds_to_next_look(self) -> float | None:
        if not self._in_flight:
            return None
        now = time.monotonic()
        due = [t.started[0] + t.timeout_s for t in list(self._in_flight.values()) if t.started and t.timeout_s]
        if self._to_fetch:
            due.append(self._next_fetch())
        return max(0.0, min(self._looked + _LOOK_EVERY_S, *due, now + _LOOK_EVERY_S) - now)

    def _look_after_rest(self) -> None:
        now = time.monotonic()
        if not self._in_flight:
            self._had_workers = now
            return
        overdue = [ticket for ticket in list(self._in_flight.values()) if ticket.is_overdue(now)]
        if overdue or now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            self._look_at_workers()
        for ticket in overdue:
            # A worker that is gone has let it go, and Dask runs it elsewhere.
            if ticket.started is not None and not ticket.done():
                self._end_overdue(ticket, ticket.started[1])

    def _look_at_workers(self) -> None:
        """Give up a cluster that is gone, or has had no worker for long: nothing else would tell."""
        error: BaseException | None = None
        if not is_alive(self._client):
            error = self._cut_off(None)
        else:
            try:
                self._note_workers()
            except ClusterUnavailableError as problem:
                error = self._cut_off(problem)
            else:
                now = time.monotonic()
                self._had_workers = now if self._workers else self._had_workers
                for ticket in list(self._in_flight.values()):
                    self._note_departures(ticket)
                self._give_up_slow_fetches(now)
                if now - self._had_workers > self._wait_s:
                    error = ClusterLostError(
                        f"The Dask cluster of {self._client!r} has had no worker for "
                        f"wait_for_workers={self._wait_s:g} seconds: did they run out of memory, or of time?"
                    )
        if error is not None:
            self._end_all(error)

    def _note_workers(self) -> None:
        self._nthreads = self._placement.slots(self._client, self._wait_s)
        self._workers, self._asked = frozenset(self._nthreads), time.monotonic()

    def _note_departures(self, ticket: Ticket) -> None:
        if ticket.started is not None and ticket.started[1] not in self._workers:
            ticket.started = None
        if ticket.dask_future is not None and ticket.workers is not None and not ticket.workers & self._workers:
            # All that it may run on are gone: Dask would keep it for them.
            self._outbox.put(Cancel([], [ticket.dask_future]))
            self._send_again(ticket, "all workers that had its data have left")

    def _give_up_slow_fetches(self, now: float) -> None:
        """Send batches again whose outcomes may be on a worker that is gone: Dask tries 30 s to reach it."""
        for fetch in list(self._fetches):
            if now - fetch.since >= _SLOW_FETCH_S and not fetch.workers <= self._workers:
                self._fetches.remove(fetch)
                fetch.outcomes.cancel()
                for ticket in fetch.tickets:
                    self._send_again(ticket, "its worker left before its outcome was fetched")

    def _end_all(self, error: BaseException) -> None:
        for fetch in self._fetches:
            fetch.outcomes.cancel()
        self._fetches = []
        tickets = list(self._in_flight.values())
        self._outbox.put(Cancel([], [ticket.dask_future for ticket in tickets]))
        for ticket in tickets:
            self._end(ticket, None, error)

    def _end_overdue(self, ticket: Ticket, address: str) -> None:
        future = ticket.dask_future
        message = (
            f"A batch of {ticket.name} ran longer than task_timeout={ticket.timeout_s:g} seconds on a Dask worker."
        )
        self._end(ticket, None, TaskTimeoutError(message))
        # In a thread of its own: a restart takes seconds.
        with contextlib.suppress(RuntimeError):  # no thread can be started; the batch has ended all the same
            self._n_stuck[address] += 1
            Crew.shared().run(functools.partial(replace_worker, self._client, future, address, self._n_stuck[address]))


def _note_done(done: queue.SimpleQueue[Ticket | None], ticket: Ticket, future: Any) -> None:
    # A ticket may have been sent again, or ended: what an earlier task of it became is nobody's concern.
    if ticket.dask_future is future:
        done.put(ticket)


def _drain(waiting: queue.SimpleQueue[Any]) -> list[Any]:
    items = []
    with contextlib.suppress(queue.Empty):
        while True:
            items.append(waiting.get_nowait())
    return items


# ---- on a worker


def _run(
    *,
    wire: bytes,
    watched: str | None,
    remote_objects: Any,
    origin: str,
    place: str,
    topic: str,
    relay_topic: str | None,
) -> Any:
    """Run a batch; say first that it starts, if its time is limited."""
    worker = distributed.get_worker()
    if watched is not None:
        worker.log_event(topic, (watched, worker.address))
    with relaying(worker, relay_topic):
        return run_remotely(pickle.loads(wire), remote_objects, origin, place, worker.address)
