"""Who works for whom in a pool: its workers, its calls, and which batch goes where. All under the pool's lock.

No thread, no clock, no process of its own: the rules of a pool, and nothing else.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from .calls import Batch, CallQueue
from .member import Member

__all__ = ["Roster"]

#: Times that a batch is given to another worker because the last one died before it had read it: one that is too
#: large for any worker's memory must end.
_MOST_REQUEUED: Final = 2


class Roster:
    """The members and the calls of a pool.

    Attributes
    ----------
    members : list of Member
        Workers that run, ready or not.
    doomed : list of Member
        Workers that were given up and are not gone yet.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.doomed: list[Member] = []
        # The last to become idle is the first to work: surplus workers age, at the front.
        self.idle: list[Member] = []
        self.calls: deque[CallQueue] = deque()

    @property
    def n_wanted(self) -> int:
        """The workers that the calls can use now: cores do not multiply, so the largest call counts, not the sum."""
        n_work = sum(queue.n_unfinished for queue in self.calls)
        return min(n_work, max((queue.n_jobs for queue in self.calls), default=0))

    def dispatch(self, preparation: bytes, now: float) -> bool:
        """Give batches to idle workers; if there is none, to those whose next batch is worth having at hand.

        Returns
        -------
        bool
            Whether the collector has to look: at bytes that are left to be written, or at a time that has an end.
        """
        is_news = False
        while self.idle and (batch := self._next_batch()) is not None:
            is_news |= self.idle.pop().give(batch, preparation, now) or batch.timeout_s is not None
        if not self.idle and any(queue.may_prefetch for queue in self.calls):
            for member in self.members:
                if member.running is not None and member.prefetched is None:
                    batch = self._next_for(member.running.queue)
                    if batch is not None:
                        is_news |= member.give(batch, preparation, now)
        return is_news or self.is_held_back

    @property
    def is_held_back(self) -> bool:
        """Whether a batch waits for memory, and not for a worker."""
        return any(queue.is_held_back and queue.may_run for queue in self.calls)

    def _next_batch(self) -> Batch | None:
        for _ in range(len(self.calls)):
            queue = self.calls[0]
            self.calls.rotate(-1)
            batch = queue.take() if queue.may_run and queue.asks_memory() else None
            if batch is not None:
                return batch
        return None

    def _next_for(self, queue: CallQueue) -> Batch | None:
        # Only for the call that the worker serves, which keeps n_jobs exact; and not while another waits for its turn.
        if not queue.may_prefetch or any(other.may_run for other in self.calls if other is not queue):
            return None
        return queue.take()

    def leave(self, queue: CallQueue) -> list[Batch]:
        """Forget a call, give up the workers that it keeps busy, and return what they ran."""
        if queue in self.calls:
            self.calls.remove(queue)
        for batch in queue.waiting:
            if batch.future.cancel():
                batch.future.set_running_or_notify_cancel()
        queue.waiting.clear()
        busy = [m for m in self.members if m.running is not None and m.running.queue is queue]
        batches = [batch for member in busy for batch in self.doom(member)]
        # Found again rather than trusted: Ctrl-C may have hit the caller between two steps of ``dispatch``.
        free = [m for m in self.members if m.is_ready and m.running is None and not m.is_cut]
        self.idle = sorted(free, key=lambda member: member.idle_since)
        return batches

    def doom(self, member: Member) -> list[Batch]:
        """Give a worker up and return the batches that it had."""
        is_idle = member in self.idle
        if is_idle:
            self.idle.remove(member)
        self.members.remove(member)
        self.doomed.append(member)
        batches = [batch for batch in member.drop() if batch is not None]
        member.end(by_force=not is_idle)
        return batches

    def end_overdue(self, now: float) -> list[Batch]:
        """Give up workers that run a batch for too long; return those batches. What waited behind them waits again."""
        overdue = []
        for member in [m for m in self.members if m.overdue_at is not None and m.overdue_at <= now]:
            prefetched = member.take_back()
            if prefetched is not None:
                prefetched.queue.waiting.appendleft(prefetched)
            overdue += self.doom(member)
        return overdue

    def next_overdue(self) -> float | None:
        """Return when the next batch will have run for too long; None for never."""
        return min((m.overdue_at for m in self.members if m.overdue_at is not None), default=None)

    def end_idle(self, idle_since: float) -> float | None:
        """End workers that have been idle since before then; return since when the next has been, or None."""
        while self.idle and self.idle[0].idle_since <= idle_since:
            self.doom(self.idle[0])
        return self.idle[0].idle_since if self.idle else None

    def remove(self, member: Member) -> Batch | None:
        """Forget a worker that is gone; return what it ran. What it had not started waits again, first in its call."""
        for place in (self.members, self.doomed, self.idle):
            if member in place:
                place.remove(member)
        has_not_started = member.has_not_started
        running, prefetched = member.drop()
        if prefetched is not None:
            prefetched.queue.waiting.appendleft(prefetched)
        if running is not None and has_not_started and running.n_requeued < _MOST_REQUEUED:
            running.n_requeued += 1
            running.queue.waiting.appendleft(running)
            return None
        return running

    def cut(self, member: Member) -> None:
        """Give a worker whose connection has ended no more work."""
        if member in self.idle:
            self.idle.remove(member)

    def drop_waiting(self) -> list[Batch]:
        """Return all batches that wait, of all calls, and forget them."""
        waiting = [batch for queue in self.calls for batch in queue.waiting]
        for queue in self.calls:
            queue.waiting.clear()
        return waiting
