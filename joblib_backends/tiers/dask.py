"""Batches on the workers of a Dask cluster.

::

    scheduler ──submit──> DaskTier (one per call) ──> cluster/connection.py (one per client) ──> cluster/exchange.py
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Final

import distributed
from dask.base import is_dask_collection

from ..budget import Share, explicit_limits
from ..cluster.client import active_client
from ..cluster.connection import Connection
from ..cluster.local import LocalCluster
from ..cluster.sklearn_transport import keep_keys_here
from ..cluster.ticket import Cancel, Ticket
from ..config import Config
from ..data.codec import RemoteReference
from ..worker import Outcome, unpack
from .base import Tier, Work

__all__ = ["DaskTier"]

#: Batches per job on the cluster when the call may use all of it: one that runs, the others on their way there and
#: back. A round trip takes 20 ms, so with joblib's own 2 per job two workers get through 200 tasks a second, with 10
#: through 400 (benchmarks, row "batch_size=1").
_BATCHES_PER_JOB: Final = 10


#: Bytes from which buffers go to each host once if several tasks have them. In a batch they pass the client, the
#: scheduler and a worker, each time in new memory.
_REPEATED_NBYTES: Final = 1 << 16


class DaskTier(Tier):
    """The batches of one call on a Dask cluster."""

    name = "dask"
    shares_memory = False
    pre_dispatch_per_job = _BATCHES_PER_JOB
    repeated_nbytes = _REPEATED_NBYTES

    @classmethod
    def capacity(cls, config: Config) -> int:
        """Return how many batches the workers that match can run at once, once there is one.

        That is one for each thread, fewer where a batch takes more of a resource; of a cluster that grows by itself,
        as many as it may have. For a call in a batch it is what that may use of them.

        Raises
        ------
        ClusterUnavailableError
            If no scheduler answers, or it has no worker, within ``config.wait_for_workers`` seconds.
        """
        outer = config.outer_task
        # Nobody is asked, for the call may never go to the cluster.
        return (outer and outer.n_slots) or Connection.get(config).n_slots()

    @classmethod
    def hold(cls, config: Config) -> object:
        """Return the connection to the cluster; that of a batch is kept by its worker, and made when it is needed."""
        outer = config.outer_task
        return None if outer and outer.n_slots else Connection.get(config)

    @classmethod
    def is_available(cls) -> bool:
        """Return whether a Dask client is active in this process."""
        return active_client() is not None

    @classmethod
    def is_remote(cls, value: Any) -> bool:
        """Return whether a value is one of Dask's own collections or futures."""
        return isinstance(value, distributed.Future) or bool(is_dask_collection(value))

    @classmethod
    def share(cls, config: Config, cores: int) -> Share:
        """Return so many slots of the cluster, for calls in a batch, and such threads only as were asked for.

        The cores are the workers', and Dask has set their threads to one. What a task has of a worker's resources it
        keeps while it waits, so tasks of its own that need some might never get it: there, calls stay in their worker.
        """
        return Share(1 if config.resources else cores, explicit_limits(config))

    def __init__(self, config: Config, n_jobs: int) -> None:
        keep_keys_here()
        self._connection = Connection.get(config)
        self._n_jobs = n_jobs
        self._outer_task = config.outer_task
        self._task_timeout = config.task_timeout
        self._n_slots = self.capacity(config)
        self._fills_cluster = n_jobs >= self._connection.n_slots()
        self._tickets: set[Ticket] = set()
        LocalCluster.begin(self, self._connection.client)

    def __repr__(self) -> str:
        return f"<DaskTier {len(self._tickets)} batches, n_jobs={self._n_jobs}, {self._connection!r}>"

    @property
    def n_slots(self) -> int:
        """Return how many batches the cluster can run at once, or how many of a task's calls it can."""
        return self._n_slots

    @property
    def warm(self) -> object:
        """Return the connection, with what it has scattered; that of a batch is kept by its worker."""
        return None if self._outer_task and self._outer_task.n_slots else self._connection

    @property
    def look_ahead(self) -> int:
        """Return batches that may wait on the cluster: none if its idle threads would run them too early."""
        return (_BATCHES_PER_JOB - 1) * self._n_jobs if self._fills_cluster else 0

    def references(self, values: Sequence[Any]) -> dict[int, RemoteReference]:
        """Have Dask's own collections and futures gathered on the workers, and return their keys."""
        return {
            id(value): RemoteReference(self._connection.hold_remote(value)) for value in values if self.is_remote(value)
        }

    def submit(self, work: Work) -> Future[Any]:
        """Hand a payload to the connection."""
        assert work.payload is not None
        if self._outer_task is not None and not self._outer_task.is_wanted():
            raise CancelledError(f"A call in the Dask task {self._outer_task!r} goes on, which was cancelled.")
        # Calls in it that stay in the worker have the one core of its slot.
        wire = work.payload.sent_with(Share(1, work.share.limits))
        n_slots = work.share.cores or 1
        ticket = Ticket(work.name, work.label(), wire, work.payload, self._task_timeout, n_slots, self._outer_task)
        self._tickets.add(ticket)
        ticket.add_done_callback(self._tickets.discard)
        self._connection.outbox.put(ticket)
        return ticket

    def outcome(self, future: Future[Any]) -> Outcome:
        """Return what the worker packed; Dask's own errors become ours."""
        return unpack(future.result())

    def abort(self) -> None:
        """Cancel what waits and what runs; Dask lets a running task end, but nobody waits for it."""
        tickets = list(self._tickets)
        for ticket in tickets:
            ticket.cancel()
        self._connection.outbox.put(Cancel(tickets))

    def close(self) -> None:
        """Let a local cluster know; the connection stays for the next call of the context."""
        LocalCluster.end(self)
