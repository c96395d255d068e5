"""What a pool knows about starting workers: with what, how many are on their way, and which way works here.

Under the pool's lock, but for :meth:`Starter.start_one`, which runs in a thread that starts workers.
"""

from __future__ import annotations

import signal
import time
from typing import Final

from .member import Member
from .process import End, start_worker

__all__ = ["Starter"]

#: Workers that may end before they are ready, in each way to start them, before that way is given up.
_TRIES: Final = 2

#: How much of such a try it is if somebody killed the worker: that says little of the way, unless it happens each time.
_WEIGHT_OF_KILLED: Final = 0.1


class Starter:
    """The starts of a pool."""

    def __init__(self) -> None:
        #: What a worker takes over; the same object while nothing has changed, which is how members tell.
        self.preparation = b""
        #: What tasks need, as far as it is known.
        self.packages: frozenset[str] = frozenset()
        #: A token for each worker on its way. Not a count: Ctrl-C in ``Thread.start`` leaves open whether the thread
        #: will run, and both sides may strike out the same start.
        self.starting: set[object] = set()
        #: Counts the ends of the pool: a worker that comes from before one is not wanted any more.
        self.generation = 0
        self._n_stillborn = {"forked": 0.0, "spawned": 0.0}
        self._cold_since: float | None = None

    def take_over(self, preparation: bytes) -> None:
        """Have workers be like the parent at this snapshot."""
        if preparation != self.preparation:
            self.preparation = preparation

    def note(self, n: int, *, is_cold: bool) -> list[object]:
        """Note that ``n`` workers are going to be started, and return their tokens."""
        if is_cold:
            self._cold_since = time.perf_counter()
        tokens = [object() for _ in range(n)]
        self.starting.update(tokens)
        return tokens

    def start_one(self, generation: int) -> Member:
        """Start a worker; takes 10 ms, or seconds. Not under the lock."""
        preparation = self.preparation
        may_fork = self._n_stillborn["forked"] < _TRIES
        process = start_worker(preparation, self.packages, lambda: generation == self.generation, may_fork=may_fork)
        return Member(process, preparation)

    def is_ready(self, member: Member) -> float | None:
        """Note that a worker's loop runs; return the seconds since a cold start, if it is the first one."""
        self._n_stillborn[member.process.way] = 0
        since, self._cold_since = self._cold_since, None
        return None if since is None else time.perf_counter() - since

    def is_stillborn(self, member: Member, end: End) -> bool:
        """Note that a worker ended before it was ready; return whether there is no other way to try."""
        was_killed = end.code == -signal.SIGKILL
        self._n_stillborn[member.process.way] += _WEIGHT_OF_KILLED if was_killed else 1.0
        is_hopeless = self._n_stillborn["spawned"] >= _TRIES
        if is_hopeless:
            self.forgive()
        return is_hopeless

    def forgive(self) -> None:
        """Try every way again: what was wrong may be over at the next cold start."""
        self._n_stillborn = dict.fromkeys(self._n_stillborn, 0.0)
