"""Fetches the outcomes of finished tasks: several together, and nobody waits long for others."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from concurrent.futures import CancelledError, Future
from typing import Any, Final, NamedTuple

from .client import start_gather
from .flight import Flight
from .ticket import Ticket

__all__ = ["Fetching"]

#: Seconds that outcomes may be on their way here before others no longer wait for them; all that finishes meanwhile
#: comes together.
_ALONE_S: Final = 0.05

#: Fetches that may be under way at a time; each has a connection of its own.
_MOST: Final = 4

#: Seconds that they may be on their way before it matters whether their worker still exists.
_SLOW_S: Final = 1.0


class _Fetch(NamedTuple):
    """Outcomes on their way here, by the keys that the batches had: meanwhile they may be sent again."""

    tickets: dict[str, Ticket]
    outcomes: Future[dict[str, Any]]
    since: float
    #: The workers that have each outcome, once that is known.
    holders: dict[str, Collection[str]]

    def lost_without(self, workers: frozenset[str]) -> set[str]:
        """Return the keys of outcomes that were on other workers only."""
        return {key for key, holders in dict(self.holders).items() if workers.isdisjoint(holders)}


class Fetching:
    """What has finished, and what of it is on its way here. Used by the collector alone."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._finished: list[Ticket] = []
        self._fetches: list[_Fetch] = []

    def __repr__(self) -> str:
        return f"<Fetching: {len(self._finished)} finished, {len(self._fetches)} fetches>"

    def add(self, ticket: Ticket) -> None:
        """Have the outcome of a finished task fetched with the next."""
        self._finished.append(ticket)

    def take(self) -> list[tuple[Ticket, Any]]:
        """Return what has come here, None for what is lost."""
        here = [fetch for fetch in self._fetches if fetch.outcomes.done()]
        self._fetches = [fetch for fetch in self._fetches if fetch not in here]
        return [pair for fetch in here for pair in self._outcomes_of(fetch)]

    def start_due(self) -> None:
        """Have all that has finished meanwhile fetched together, beside what is on its way, if that takes long.

        Not a wait: the worker that has an outcome may die now, and with the last worker it would never end. Nor may
        others wait long for it, for they would be lost with the next worker that dies.
        """
        # Some may have ended meanwhile, with their call or with the cluster.
        self._finished = [ticket for ticket in self._finished if not ticket.done()]
        if self._finished and time.monotonic() >= self.next_time():
            self._start()

    def next_time(self) -> float:
        """Return when there may be another fetch; infinity if nothing has finished, or one must come here first."""
        if not self._finished or len(self._fetches) >= _MOST:
            return math.inf
        return self._fetches[-1].since + _ALONE_S if self._fetches else 0.0

    def give_up_slow(self) -> list[Ticket]:
        """Return batches whose outcomes are on workers that are gone: Dask tries 30 s to reach one.

        What comes with them and is elsewhere is fetched anew; all other fetches go on.
        """
        now, given_up = time.monotonic(), []
        for fetch in [fetch for fetch in self._fetches if now - fetch.since >= _SLOW_S]:
            lost = fetch.lost_without(self._flight.workers)
            if lost:
                self._fetches.remove(fetch)
                fetch.outcomes.cancel()
                meant = _still_meant(fetch)
                given_up += [ticket for key, ticket in meant.items() if key in lost]
                self._finished += [ticket for key, ticket in meant.items() if key not in lost]
        return given_up

    def give_up(self) -> None:
        """Fetch nothing more of what has finished so far."""
        for fetch in self._fetches:
            fetch.outcomes.cancel()
        self._fetches, self._finished = [], []

    def _start(self) -> None:
        flight, tickets, self._finished = self._flight, self._finished, []
        by_key = {ticket.key: ticket for ticket in tickets}
        holders: dict[str, Collection[str]] = {}
        outcomes = start_gather(flight.client, list(by_key), holders.update)
        self._fetches.append(_Fetch(by_key, outcomes, time.monotonic(), holders))
        outcomes.add_done_callback(lambda _: flight.done.put(None))

    def _outcomes_of(self, fetch: _Fetch) -> list[tuple[Ticket, Any]]:
        try:
            outcomes = fetch.outcomes.result()
        except (Exception, CancelledError) as error:
            for ticket in _still_meant(fetch).values():
                self._flight.end(ticket, None, self._flight.cut_off(error))
            return []
        return [(ticket, outcomes.get(key)) for key, ticket in _still_meant(fetch).items()]


def _still_meant(fetch: _Fetch) -> dict[str, Ticket]:
    """Return the batches that have not ended, or been sent again, since their outcomes were asked for."""
    return {key: ticket for key, ticket in fetch.tickets.items() if ticket.key == key and not ticket.done()}
