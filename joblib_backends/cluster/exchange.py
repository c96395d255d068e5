"""Batches on their way to a Dask cluster and back.

::

    DaskTier ──put──> outbox ──> sender thread:     client.map of all that waits
    future done <─────────────── collector thread:  client.gather of all that is done; looks after the rest

Nothing of ours runs on the client's event loop but what puts something into a queue. A batch travels as opaque bytes,
which the scheduler never unpickles. Buffers travel by the path of the resident's file first: a worker on this machine
maps it. A worker that cannot answers that it is missing; then the bytes are scattered once, and from then on they go
along as data. What was scattered and is lost with its worker is scattered again.

Invariant: every batch that was put ends its future, whatever becomes of it on the cluster: result, error, cancelled,
lost with its workers, too late, or cut off with the whole cluster.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import queue
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from typing import Any, Final, NamedTuple

import distributed
import numpy as np

from ..crew import Crew
from ..data.store import Resident, map_buffer
from ..errors import (
    ClusterLostError,
    ClusterUnavailableError,
    DataLostError,
    TaskTimeoutError,
    WorkerLostError,
)
from ..remote import Missing, process_identity, run_remotely
from ..worker import PackedOutcome
from .client import is_alive, nthreads, start_gather
from .losses import failure_of, replace_worker
from .outfit import Outfit, lacks_package
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

#: Seconds that they may be on their way before it matters whether their worker still exists.
_SLOW_FETCH_S: Final = 1.0


class _Fetch(NamedTuple):
    """Outcomes on their way here."""

    tickets: list[Ticket]
    outcomes: Future[Mapping[str, Any]]
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
        *,
        owns_client: bool = False,
    ) -> None:
        self._client = client
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
        self._workers: frozenset[str] = frozenset()
        self._n_stuck: Counter[str] = Counter()
        self._scattered: weakref.WeakKeyDictionary[Resident, Any] = weakref.WeakKeyDictionary()
        self._needs_data = threading.Event()
        self._origin = process_identity()
        self._topic = f"joblib_backends-{uuid.uuid4().hex}"
        self._is_told_of_starts = False
        self._looked = self._had_workers = time.monotonic()

    def start(self) -> None:
        """Start the threads; they end with the None that is put into the outbox."""
        for name, body in (("sender", self._send_all), ("collector", self._collect_all)):
            threading.Thread(target=body, name=f"joblib_backends-dask-{name}", daemon=True).start()

    # ---- sender thread

    def _send_all(self) -> None:
        """Send all that waits in one graph: what comes while a graph is on its way goes with the next."""
        while (first := self._outbox.get()) is not None:
            waiting = [first, *_drain(self._outbox)]
            tickets = [item for item in waiting if isinstance(item, Ticket) and not item.done()]
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
        self._is_over = True
        self._done.put(None)
        if self._owns_client:
            # Here and not in a finalizer, which may run in any thread, the client's own event loop too.
            with contextlib.suppress(Exception):
                self._client.close()

    def _send(self, tickets: list[Ticket]) -> None:
        try:
            self._outfit.provide()
            if not self._workers:
                self._workers = frozenset(nthreads(self._client, self._wait_s))
            # Before they run, or their starts would be missed.
            self._hear_of_starts(tickets)
            sent = {ticket: data for ticket in tickets if (data := self._data_for(ticket)) is not None}
            self._in_flight |= {ticket.key: ticket for ticket in sent}
            calls = [by_name(_run, **self._batch(ticket, data)) for ticket, data in sent.items()]
            keys = [ticket.key for ticket in sent]
            expressions, namespaces = [call[0] for call in calls], [call[1] for call in calls]
            futures = self._client.map(eval, expressions, namespaces, key=keys, pure=False)
        except Exception as error:
            for ticket in tickets:
                self._end(ticket, None, self._cut_off(error))
            return
        for ticket, future in zip(sent, futures, strict=True):
            ticket.dask_future = future
            future.add_done_callback(functools.partial(_note_done, self._done, ticket))
        # The collector may be waiting for ever, because nothing was in flight.
        self._done.put(None)

    def _batch(self, ticket: Ticket, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return what :func:`_run` gets; all that is ours in it is bytes to the scheduler."""
        return {
            "wire": pickle.dumps(ticket.wire, protocol=5),
            "data": data,
            "watched": ticket.key if ticket.timeout_s else None,
            "remote_objects": dict(self._remote_objects),
            "origin": self._origin,
            "topic": self._topic,
        }

    def _hear_of_starts(self, tickets: list[Ticket]) -> None:
        if not self._is_told_of_starts and any(ticket.timeout_s for ticket in tickets):
            self._client.subscribe_topic(self._topic, self._note_start)
            self._is_told_of_starts = True

    def _data_for(self, ticket: Ticket) -> dict[str, tuple[bytes, Any]] | None:
        """Return the residents of a batch as Dask data, by path, if workers cannot read the files.

        None if they are gone here, too; then the ticket has ended.
        """
        if not self._needs_data.is_set():
            return {}
        try:
            return {resident.path: (resident.digest, self._scatter(resident)) for resident in ticket.payload.residents}
        except DataLostError as error:
            ticket.end(None, error)
            return None

    def _scatter(self, resident: Resident) -> Any:
        known = self._scattered.get(resident)
        if known is None or known.status in ("lost", "cancelled", "error"):
            content = np.frombuffer(map_buffer(resident.ref()), np.uint8)
            # hash=False: a content hash of dask's own would read all bytes again; ours is the address already.
            known = self._client.scatter(content, hash=False, timeout=self._wait_s)
            self._scattered[resident] = known
        return known

    def _cancel(self, cancel: Cancel) -> None:
        futures = [*cancel.futures, *(ticket.dask_future for ticket in cancel.tickets)]
        futures = [future for future in futures if future is not None]
        for ticket in cancel.tickets:
            self._in_flight.pop(ticket.key, None)
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
        now = time.monotonic()
        if self._fetches and now < self._fetches[-1].since + _FETCH_ALONE_S:
            return
        # Some may have ended meanwhile, with the cluster.
        tickets, self._to_fetch = [ticket for ticket in self._to_fetch if ticket.dask_future is not None], []
        if tickets:
            outcomes = start_gather(self._client, {ticket.key: ticket.dask_future for ticket in tickets})
            self._fetches.append(_Fetch(tickets, outcomes, now, self._workers))
            outcomes.add_done_callback(lambda _: self._done.put(None))

    def _take(self, fetched: _Fetch) -> None:
        failure: BaseException = WorkerLostError("The result of a batch was lost: its Dask worker died with it.")
        try:
            outcomes = fetched.outcomes.result()
        except (Exception, CancelledError) as error:
            outcomes, failure = {}, self._cut_off(error)
        for ticket in fetched.tickets:
            outcome = outcomes.get(ticket.key)
            if isinstance(outcome, Missing):
                self._needs_data.set()
                self._send_again(ticket, "its data was missing on the worker")
            else:
                self._end(ticket, outcome, None if outcome is not None else failure)

    def _end(self, ticket: Ticket, outcome: PackedOutcome | None, error: BaseException | None = None) -> None:
        self._in_flight.pop(ticket.key, None)
        ticket.end(outcome, error)

    def _was_cancelled(self, ticket: Ticket) -> None:
        """Find out why a task is gone that we did not cancel."""
        if self._client.status != "running":
            self._end(ticket, None, self._cut_off(None))
            return
        # With its data, which only a worker had that died; or by another scheduler, which came in the place of one
        # that knew it, and does not tell us of starts, or give workers the package.
        self._is_told_of_starts = False
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
        ticket.dask_future, ticket.started = None, None
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
        if self._to_fetch and self._fetches:
            due.append(self._fetches[-1].since + _FETCH_ALONE_S)
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
                self._workers = frozenset(nthreads(self._client, self._wait_s))
            except ClusterUnavailableError as problem:
                error = self._cut_off(problem)
            else:
                now = time.monotonic()
                self._had_workers = now if self._workers else self._had_workers
                for ticket in list(self._in_flight.values()):
                    if ticket.started is not None and ticket.started[1] not in self._workers:
                        ticket.started = None
                self._give_up_slow_fetches(now)
                if now - self._had_workers > self._wait_s:
                    error = ClusterLostError(
                        f"The Dask cluster of {self._client!r} has had no worker for "
                        f"wait_for_workers={self._wait_s:g} seconds: did they run out of memory, or of time?"
                    )
        if error is not None:
            self._end_all(error)

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


def _run(*, wire: bytes, data: Any, watched: str | None, remote_objects: Any, origin: str, topic: str) -> Any:
    """Run a batch; say first that it starts, if its time is limited."""
    if watched is not None:
        worker = distributed.get_worker()
        worker.log_event(topic, (watched, worker.address))
    return run_remotely(pickle.loads(wire), data, remote_objects, origin)
