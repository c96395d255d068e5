"""The batches of a connection that are on a cluster, and how each ends. Both threads of an exchange use it."""

from __future__ import annotations

import errno
import functools
import logging
import math
import queue
import time
from collections import deque
from typing import Any, Final

from ..errors import ClusterLostError, DataLostError
from ..worker import PackedOutcome
from .placement import Placement
from .relay import Relay
from .ticket import Cancel, Ticket

__all__ = ["CHANGED", "Flight", "data_lost_here"]

_log = logging.getLogger(__name__)

#: Times that a batch is sent again because its data was lost on the way, or somebody cancelled it.
_MOST_RESENT: Final = 3


class _Changed:
    """Says that a batch that waits for its data may perhaps be sent: data has arrived somewhere, or there is room."""


CHANGED: Final = _Changed()


class Flight:
    """What is on the cluster, and what is known of its workers.

    Parameters
    ----------
    client : distributed.Client
        The client.
    outbox : queue
        What is to be sent.
    placement : Placement
        What is asked of the workers.
    wait_s : float
        Seconds within which the scheduler must answer.
    """

    def __init__(self, client: Any, outbox: queue.SimpleQueue[Any], placement: Placement, wait_s: float) -> None:
        self.client = client
        self.outbox = outbox
        self.relay = Relay(client)
        self.wait_s = wait_s
        self._placement = placement
        # By key. Tickets that wait for data are in it, too: they end with the cluster.
        self._tickets: dict[str, Ticket] = {}
        # Those of them with a time limit, and those with data: all that somebody looks at again and again. A call has
        # ten times as many batches on the cluster as that has threads. To look at each took a fifth of the client's
        # time with 5,000 (benchmarks/cluster_size.py), and would take all of it with 100,000.
        self._limited: dict[str, Ticket] = {}
        self._with_data: dict[str, Ticket] = {}
        self._least_timeout_s = math.inf
        #: The batches that each worker can run at once; and the workers.
        self.nthreads: dict[str, int] = {}
        self.workers: frozenset[str] = frozenset()
        self._asked = 0.0
        #: What is done, and now and then None: look again, something has changed.
        self.done: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        # Dask's futures of batches that have ended. To let go of them tells the scheduler, and after that Dask's client
        # says nothing for 10 ms: the next call would wait.
        self._spent: deque[Any] = deque()
        self._spent_since = math.inf

    def __repr__(self) -> str:
        return f"<Flight of {len(self._tickets)} batches to {len(self.workers)} workers>"

    def __bool__(self) -> bool:
        """Return whether anything is on the cluster."""
        return bool(self._tickets)

    @property
    def tickets(self) -> list[Ticket]:
        """The batches that are on the cluster, or wait for their data to be."""
        return list(self._tickets.values())

    def has_batches(self, n: int, *, for_each_slot: int) -> bool:
        """Return whether there are so many batches on the cluster, in all and for each that can run at once."""
        return len(self._tickets) >= max(n, for_each_slot * sum(self.nthreads.values()))

    @property
    def limited(self) -> list[Ticket]:
        """Those of the batches that may not run for ever."""
        return list(self._limited.values())

    @property
    def with_data(self) -> list[Ticket]:
        """Those of the batches that may be bound to workers, which have their data."""
        return list(self._with_data.values())

    @property
    def least_timeout_s(self) -> float:
        """No batch that is here, or came meanwhile, has a smaller time limit; infinity if none has one."""
        return self._least_timeout_s if self._limited else math.inf

    def add(self, ticket: Ticket) -> None:
        """Note a batch that is being sent."""
        if ticket.timeout_s:
            # In this order, and before it can start: who looks for what is overdue goes by it.
            self._least_timeout_s = min(self.least_timeout_s, ticket.timeout_s)
            self._limited[ticket.key] = ticket
        if ticket.payload.residents:
            self._with_data[ticket.key] = ticket
        self._tickets[ticket.key] = ticket

    def find(self, key: str) -> Ticket | None:
        """Return a batch by the key of its task."""
        return self._tickets.get(key)

    def drop(self, ticket: Ticket) -> None:
        """Forget a batch whose call was aborted."""
        self._tickets.pop(ticket.key, None)
        self._limited.pop(ticket.key, None)
        self._with_data.pop(ticket.key, None)

    # ---- workers

    def ask_for_workers(self, *, known_for_s: float = 0.0) -> None:
        """Find out which workers there are, unless that was done within so many seconds.

        Raises
        ------
        ClusterUnavailableError
            If the scheduler does not answer.
        """
        if not self._asked or time.monotonic() - self._asked >= known_for_s:
            self.nthreads = self._placement.slots(self.client, self.wait_s)
            self.workers, self._asked = frozenset(self.nthreads), time.monotonic()

    def forget_workers(self) -> None:
        """Have who asks next ask the scheduler: a worker was seen that nobody knew."""
        self._asked = 0.0

    # ---- ends

    def end(self, ticket: Ticket, outcome: PackedOutcome | None, error: BaseException | None = None) -> None:
        """Complete a batch, after what scikit-learn's callbacks have said in it."""
        self.drop(ticket)
        if ticket.dask_future is not None:
            # In this order: what the other thread releases in between must not leave one behind that nobody looks for.
            self._spent.append(ticket.dask_future)
            self._spent_since = min(self._spent_since, time.monotonic())
        self.relay.after_messages(functools.partial(ticket.end, outcome, error))
        if ticket.workers is not None:
            self.outbox.put(CHANGED)

    @property
    def spent_since(self) -> float:
        """Since when Dask has been keeping an outcome that nobody needs any more; infinity if it keeps none."""
        return self._spent_since

    def release_spent(self) -> None:
        """Let Dask forget them: their workers' memory, and what would be done again if a worker died."""
        self._spent_since = math.inf
        self._spent.clear()

    def send_again(self, ticket: Ticket, why: str) -> None:
        """Send a batch once more that ended by no fault of its own, unless that happens time and again."""
        if ticket.done():
            self.drop(ticket)
            return
        _log.debug("A batch of %s is sent to the cluster again: %s", ticket.name, why)
        if ticket.n_resent >= _MOST_RESENT:
            self.end(
                ticket,
                None,
                ClusterLostError(
                    f"A batch of {ticket.name} was sent to the Dask cluster {ticket.n_resent + 1} times: {why}. Do "
                    "workers come and go there?"
                ),
            )
            return
        self.drop(ticket)
        ticket.reset()
        self.outbox.put(ticket)

    def end_all(self, error: BaseException) -> None:
        """Give up all that is on the cluster."""
        tickets = self.tickets
        self.outbox.put(Cancel([], [ticket.dask_future for ticket in tickets]))
        for ticket in tickets:
            self.end(ticket, None, error)

    def cut_off(self, cause: BaseException | None) -> BaseException:
        """Return the error for batches of a cluster that cannot be reached."""
        why = f": {cause}" if cause else ""
        failure = ClusterLostError(
            f"Batches could not be sent to {self.client!r}, or fetched from it{why}. Has its scheduler ended, or can "
            "it not be reached any more?"
        )
        # Without the frames that lead to the tickets, which hold this.
        failure.__cause__ = None if cause is None else cause.with_traceback(None)
        return failure


def data_lost_here(ticket: Ticket) -> DataLostError | None:
    """Return the error for a batch whose data is gone on this machine; None if it is not."""
    for resident in ticket.payload.residents:
        if not resident.is_there():
            return DataLostError(errno.ENOENT, "The file of a resident is gone; was it deleted?", resident.path)
    return None
