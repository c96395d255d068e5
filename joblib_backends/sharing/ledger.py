"""Which tasks of a call have a prefix in common, what of it is held, and which task is best started next.

Pure bookkeeping of identities: nothing here knows what a prefix is, or where its result lies.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Held", "Ledger", "Prefixes"]

#: The identities of what a task needs before it can do what is its own, in the order in which it needs them.
Prefixes = tuple[str, ...]


class Held(NamedTuple):
    """A result that was kept for others."""

    name: str
    #: What it is a result of: with the last task that has this prefix it goes.
    prefix: str
    nbytes: int
    #: What it took to compute.
    seconds: float


@dataclass
class _Uses:
    """The tasks that have a prefix."""

    order: int
    n_tasks: int = 0
    n_running: int = 0
    n_done: int = 0

    @property
    def n_left(self) -> int:
        return self.n_tasks - self.n_done


class Ledger:
    """The prefixes of one call.

    Parameters
    ----------
    limit_nbytes : int
        Bytes that may be held; beyond them goes first what saves the fewest seconds per byte.

    Notes
    -----
    Thread-safe; the lock guards everything in here.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self._limit_nbytes = limit_nbytes
        self._lock = threading.Lock()
        self._uses: dict[str, _Uses] = {}
        self._held: dict[str, Held] = {}
        self._nbytes = 0
        #: Whether no more tasks will be added. Until then what nobody needs may be needed again.
        self.is_complete = False
        #: The most bytes that were ever held.
        self.peak_nbytes = 0

    def __repr__(self) -> str:
        return f"<Ledger {len(self._uses)} prefixes, {self._nbytes} B held>"

    def add(self, prefixes: Prefixes) -> None:
        """Note a task of the call."""
        with self._lock:
            for prefix in prefixes:
                self._uses.setdefault(prefix, _Uses(len(self._uses))).n_tasks += 1

    def n_tasks(self, prefix: str) -> int:
        """Return how many tasks seen so far have a prefix, those that are done included."""
        with self._lock:
            return self._uses[prefix].n_tasks

    def order(self, prefixes: Prefixes) -> tuple[int, ...]:
        """Return a sort key that puts tasks with the same prefix side by side, in the order of their first one."""
        with self._lock:
            return tuple(self._uses[prefix].order for prefix in prefixes)

    def best(self, candidates: Iterable[Prefixes]) -> int:
        """Return the position of the task that is best started now.

        Best is one whose prefixes are all there. Next is one that computes the fewest new ones. Last is one that would
        wait for what another computes.
        """
        best = 0
        rank_of_best: tuple[float, float] = (math.inf, math.inf)
        with self._lock:
            for position, prefixes in enumerate(candidates):
                rank = self._rank(prefixes)
                if rank < rank_of_best:
                    best, rank_of_best = position, rank
                if rank == (0, 0):
                    break
        return best

    def _rank(self, prefixes: Prefixes) -> tuple[int, int]:
        n_new = n_awaited = 0
        for prefix in prefixes:
            uses = self._uses[prefix]
            if not uses.n_done:
                n_awaited += uses.n_running > 0
                n_new += uses.n_running == 0
        return n_awaited, n_new

    def start(self, prefixes: Prefixes) -> None:
        """Note that a task runs."""
        with self._lock:
            for prefix in prefixes:
                self._uses[prefix].n_running += 1

    def put_back(self, prefixes: Prefixes) -> None:
        """Note that a task that was started does not run after all."""
        with self._lock:
            for prefix in prefixes:
                self._uses[prefix].n_running -= 1

    def finish(self, prefixes: Prefixes, held: Iterable[Held]) -> list[str]:
        """Note that a task is done, and what it left for others; return the names of what is to be deleted."""
        with self._lock:
            for one in held:
                self._hold(one)
            for prefix in prefixes:
                uses = self._uses[prefix]
                uses.n_running -= 1
                uses.n_done += 1
            needless = self._held.values() if self.is_complete else ()
            dropped = [one for one in needless if not self._uses[one.prefix].n_left]
            for one in dropped:
                self._drop(one)
            return [one.name for one in (*dropped, *self._evicted())]

    def _hold(self, one: Held) -> None:
        # Two may have computed it, where locks do not work: it is one file all the same.
        if one.name not in self._held:
            self._held[one.name] = one
            self._nbytes += one.nbytes
            self.peak_nbytes = max(self.peak_nbytes, self._nbytes)

    def _drop(self, one: Held) -> None:
        if self._held.pop(one.name, None) is not None:
            self._nbytes -= one.nbytes

    def _evicted(self) -> list[Held]:
        """Drop what saves least until the rest is within the limit."""
        if self._nbytes <= self._limit_nbytes:
            return []
        evicted = []
        for one in sorted(self._held.values(), key=self._value_per_byte):
            if self._nbytes <= self._limit_nbytes:
                break
            self._drop(one)
            evicted.append(one)
        return evicted

    def _value_per_byte(self, one: Held) -> float:
        uses = self._uses.get(one.prefix)
        return one.seconds * (uses.n_left if uses else 0) / max(1, one.nbytes)
