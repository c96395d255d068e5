"""Sends batches to a Dask cluster: the thread that takes from the outbox."""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import queue
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from ..errors import ClusterLostError
from ..remote import place_of_this_process, process_identity
from .client import unsubscribe
from .flight import Flight, data_lost_here
from .outfit import Outfit
from .places import Places
from .running import run_batch
from .ticket import Cancel, Ticket
from .travel import by_name

__all__ = ["Sender", "drain"]

_log = logging.getLogger(__name__)

#: Seconds for which the workers are taken as known by who must know where data is; to ask takes 2 ms.
_WORKERS_VALID_S: Final = 0.5

#: Dask's client tells the scheduler something at most every 10 ms. So what is being submitted just now goes together:
#: for as long as more comes within the first of these times, up to the second, in seconds.
_LINGER_S: Final = 0.0005
_LINGER_MOST_S: Final = 0.005

#: Seconds in which batches are gathered where the workers have enough to do meanwhile: a graph costs the scheduler as
#: much as several of its tasks, and what is sent sooner waits in Dask's client.
_GATHER_S: Final = 0.01

#: Batches per slot, and in all, that are enough to do: a small cluster is done with its few in less time than that.
_ENOUGH: Final = 3
_ENOUGH_IN_ALL: Final = 100


class Sender:
    """Sends what is put into the outbox, to where its data is, until None is put there.

    Parameters
    ----------
    flight : Flight
        What is on the cluster.
    places : Places
        Where data is.
    outfit : Outfit
        What gives the package to workers.
    remote_objects : dict
        Dask futures of objects that are on the cluster already, by key.
    options : dict
        What ``Client.map`` is to be told about workers.
    close : callable
        Called at the end.
    """

    def __init__(
        self,
        flight: Flight,
        places: Places,
        outfit: Outfit,
        remote_objects: dict[str, Any],
        options: dict[str, Any],
        close: Callable[[], object],
    ) -> None:
        self._flight = flight
        self._places = places
        self._outfit = outfit
        self._remote_objects = remote_objects
        self._options = options
        self._close = close
        self._origin, self._place = process_identity(), place_of_this_process()
        self._topic = f"joblib_backends-{uuid.uuid4().hex}"
        self._is_told_of_starts = False
        # What waits for data that is on its way to workers.
        self._waiting: list[Ticket] = []

    def run(self) -> None:
        """Send all that waits in one graph: what comes while a graph is on its way goes with the next."""
        outbox = self._flight.outbox
        while (first := outbox.get()) is not None:
            items = [first, *self._what_comes_with(first)]
            try:
                self._take(items)
            except Exception as error:
                # Never silently: somebody waits for every batch, and for those that come after them.
                _log.debug("The sender of a Dask connection failed", exc_info=True)
                self._end_unsent(items, self._flight.cut_off(error))
            if None in items:
                break
            # A thread that waits must hold no ticket: with it would stay the batch, its files and its context.
            del first, items
        # At once: the cluster may be closed next, and Dask would warn of what is lost with it.
        self._flight.release_spent()
        if self._is_told_of_starts:
            with contextlib.suppress(Exception):  # the client may be closed
                unsubscribe(self._flight.client, self._topic)
        self._close()

    def _what_comes_with(self, first: Ticket | Cancel | object) -> list[Any]:
        """Return what else there is; with a batch, what is being put there just now, too."""
        outbox = self._flight.outbox
        if isinstance(first, Ticket) and self._flight.has_batches(_ENOUGH_IN_ALL, for_each_slot=_ENOUGH):
            time.sleep(_GATHER_S)
            return drain(outbox)
        items = drain(outbox)
        end = time.monotonic() + _LINGER_MOST_S
        while isinstance(first, Ticket) and None not in items and time.monotonic() < end:
            time.sleep(_LINGER_S)
            more = drain(outbox)
            if not more:
                break
            items += more
        return items

    def start_anew(self) -> None:
        """Do again what is done once for a scheduler, with the next batch: another may have come in its place."""
        self._is_told_of_starts = False
        self._flight.relay.subscribe_again()
        self._outfit.lapse()

    def _take(self, items: list[Any]) -> None:
        """Do what was asked for."""
        # First: what they give up makes room for others.
        for cancel in [item for item in items if isinstance(item, Cancel)]:
            self._cancel(cancel)
        tickets = [item for item in items if isinstance(item, Ticket)]
        if len(tickets) < len(items):
            # Something has changed. Those that wait come before those that are new.
            tickets, self._waiting = [*self._waiting, *tickets], []
        tickets = [ticket for ticket in tickets if not ticket.done()]
        if tickets:
            self._send(tickets)

    def _end_unsent(self, items: list[Any], error: BaseException) -> None:
        """End what was to be sent, and what waits to be; what is on the cluster already, the collector looks after."""
        self._waiting = []
        unsent = [ticket for ticket in self._flight.tickets if not ticket.is_sent]
        for ticket in {*unsent, *(item for item in items if isinstance(item, Ticket))}:
            self._flight.end(ticket, None, error)

    def _send(self, tickets: list[Ticket]) -> None:
        flight = self._flight
        for ticket in tickets:
            # Before anything is asked of the cluster: with it, they end.
            flight.add(ticket)
        try:
            if self._outfit.provide():
                self._places.start_anew()
            if not flight.workers or any(ticket.payload.residents for ticket in tickets):
                flight.ask_for_workers(known_for_s=_WORKERS_VALID_S)
            # Before they run, or their starts would be missed.
            self._hear_of_starts(tickets)
            for workers, batches in self._sorted_by_workers(tickets).items():
                self._send_to(workers, batches)
        except Exception as error:
            for ticket in tickets:
                flight.end(ticket, None, flight.cut_off(error))
            return
        # After the batches: said before, it would have held them up.
        flight.release_spent()
        # The collector may be waiting for ever, because nothing was in flight.
        flight.done.put(None)

    def _sorted_by_workers(self, tickets: list[Ticket]) -> dict[frozenset[str] | None, list[Ticket]]:
        """Return batches by the workers that have their data, None for all; those whose data has to come first wait."""
        flight = self._flight
        sorted_ = defaultdict(list)
        if any(ticket.payload.residents for ticket in tickets):
            self._places.look(flight.workers)
        n_restricted: int | None = None
        for ticket in tickets:
            residents = ticket.payload.residents
            try:
                workers = self._places.workers_for(residents) if residents else None
            except ClusterLostError as error:
                flight.end(ticket, None, data_lost_here(ticket) or error)
                continue
            ticket.workers = workers
            if workers is not None:
                # Counted where it matters only: it is a look at all that is on the cluster.
                n_restricted = self._n_restricted() if n_restricted is None else n_restricted
                if n_restricted >= sum(flight.nthreads.get(worker, 0) for worker in workers):
                    self._waiting.append(ticket)
                    continue
                n_restricted += 1
            ticket.is_sent = True
            sorted_[workers].append(ticket)
        return sorted_

    def _n_restricted(self) -> int:
        """Return how many batches were sent to those workers only that have their data already.

        No more than those can run at once: what is sent ahead to them could not go to others that have it soon.
        """
        return sum(
            ticket.workers is not None and ticket.is_sent and not ticket.done() for ticket in self._flight.with_data
        )

    def _send_to(self, workers: frozenset[str] | None, tickets: list[Ticket]) -> None:
        options = self._options if workers is None else {**self._options, "workers": list(workers)}
        relay_topic = self._flight.relay.listen(tickets)
        calls = [by_name(run_batch, **self._arguments(ticket, relay_topic)) for ticket in tickets]
        expressions, namespaces = [call[0] for call in calls], [call[1] for call in calls]
        keys = [ticket.key for ticket in tickets]
        futures = self._flight.client.map(eval, expressions, namespaces, key=keys, pure=False, **options)
        for ticket, future in zip(tickets, futures, strict=True):
            ticket.dask_future = future
            future.add_done_callback(functools.partial(_note_done, self._flight.done, ticket))

    def _arguments(self, ticket: Ticket, relay_topic: str | None) -> dict[str, Any]:
        """Return what :func:`run_batch` gets; all that is ours in it is bytes to the scheduler."""
        return {
            "wire": pickle.dumps(ticket.wire, protocol=5),
            "n_slots": ticket.n_slots,
            "watched": ticket.key if ticket.timeout_s else None,
            "remote_objects": dict(self._remote_objects),
            "origin": self._origin,
            "place": self._place,
            "topic": self._topic,
            "relay_topic": relay_topic,
        }

    def _hear_of_starts(self, tickets: list[Ticket]) -> None:
        if not self._is_told_of_starts and any(ticket.timeout_s for ticket in tickets):
            self._flight.client.subscribe_topic(self._topic, self._note_start)
            self._is_told_of_starts = True

    def _note_start(self, event: tuple[float, Any]) -> None:
        """Note that a batch has started. Called on the client's event loop."""
        key, address = event[1]
        ticket = self._flight.find(key)
        if ticket is not None:
            # By this clock: those of other hosts may differ.
            ticket.started = (time.monotonic(), address)
            self._flight.done.put(None)

    def _cancel(self, cancel: Cancel) -> None:
        futures = [*cancel.futures, *(ticket.dask_future for ticket in cancel.tickets)]
        futures = [future for future in futures if future is not None]
        for ticket in cancel.tickets:
            self._flight.drop(ticket)
        self._waiting = [ticket for ticket in self._waiting if not ticket.done()]
        if futures:
            with contextlib.suppress(Exception):  # the cluster may be gone; then there is nothing to cancel
                self._flight.client.cancel(futures)


def drain(waiting: queue.SimpleQueue[Any]) -> list[Any]:
    """Return all that is in a queue now."""
    items = []
    with contextlib.suppress(queue.Empty):
        while True:
            items.append(waiting.get_nowait())
    return items


def _note_done(done: queue.SimpleQueue[Ticket | None], ticket: Ticket, future: Any) -> None:
    # A ticket may have been sent again, or ended: what an earlier task of it became is nobody's concern.
    if ticket.dask_future is future:
        done.put(ticket)
