"""Batches on the workers of a Dask cluster. The only file that knows dask and distributed.

::

    scheduler ──submit──> DaskTier (one per call) ──> _Connection (one per client)
                                                        sender thread:     client.map of all that waits
                                                        collector thread:  client.gather of all that is done
    completion thread <── future done ───────────────── (both live as long as the connection)

Nothing of ours runs on the client's event loop. A batch travels as opaque bytes, which the scheduler never
unpickles. Buffers travel by the path of the resident's file first: a worker on this machine maps it. A worker that
cannot answers that it is missing; then the bytes are scattered once, and from then on they go along as data.

Invariant: every batch that was submitted ends its future, whatever becomes of it on the cluster: result, error,
cancelled or lost.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, ClassVar, Final, NamedTuple

import distributed
import numpy as np
from dask.base import is_dask_collection

from ..budget import Share, explicit_limits
from ..config import Config
from ..data.codec import Payload, RemoteReference
from ..data.store import Resident, map_buffer
from ..errors import ClusterUnavailableError, ConfigurationError, WorkerLostError
from ..remote import Missing, process_identity, run_remotely
from ..worker import Outcome, PackedOutcome, unpack
from .base import Tier, Work

__all__ = ["DaskTier"]

#: Seconds for which the number of threads of a cluster is taken as known; asking costs 2 ms, and joblib asks often.
_CAPACITY_VALID_S: Final = 1.0

#: Batches per job on the cluster when the call may use all of it: one that runs, the others on their way there and
#: back. A round trip takes 20 ms, so with joblib's own 2 per job two workers get through 200 tasks a second, with 10
#: through 400 (benchmarks, row "batch_size=1").
_BATCHES_PER_JOB: Final = 10


class DaskTier(Tier):
    """The batches of one call on a Dask cluster."""

    name = "dask"
    shares_memory = False
    pre_dispatch_per_job = _BATCHES_PER_JOB

    @classmethod
    def capacity(cls, config: Config) -> int:
        """Return the threads of all workers, once there is a worker.

        Raises
        ------
        ClusterUnavailableError
            If no scheduler answers, or it has no worker, within ``config.wait_for_workers`` seconds.
        """
        return _Connection.get(config).n_threads()

    @classmethod
    def is_available(cls) -> bool:
        """Return whether a Dask client is active in this process."""
        return _active_client() is not None

    @classmethod
    def share(cls, config: Config, cores: int) -> Share:
        """Return only what was asked for: the cores are the workers', and Dask has set their threads to one."""
        return Share(1, explicit_limits(config))

    def __init__(self, config: Config, n_jobs: int) -> None:
        self._connection = _Connection.get(config)
        self._n_jobs = n_jobs
        self._fills_cluster = n_jobs >= self._connection.n_threads()
        self._tickets: set[_Ticket] = set()

    def __repr__(self) -> str:
        return f"<DaskTier {len(self._tickets)} batches, n_jobs={self._n_jobs}, {self._connection!r}>"

    @property
    def warm(self) -> object:
        """Return the connection, with what it has scattered."""
        return self._connection

    @property
    def look_ahead(self) -> int:
        """Return batches that may wait on the cluster: none if its idle threads would run them too early."""
        return (_BATCHES_PER_JOB - 1) * self._n_jobs if self._fills_cluster else 0

    def references(self, values: Sequence[Any]) -> dict[int, RemoteReference]:
        """Have Dask's own collections and futures gathered on the workers, and return their keys."""
        return {
            id(value): RemoteReference(self._connection.hold_remote(value)) for value in values if _is_remote(value)
        }

    def submit(self, work: Work) -> Future[Any]:
        """Hand a payload to the connection."""
        assert work.payload is not None
        ticket = _Ticket(work)
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
        self._connection.outbox.put(_Cancel(tickets))

    def close(self) -> None:
        """Do nothing: the connection stays for the next call of the context."""


class _Ticket(Future[PackedOutcome]):
    """A batch on its way: done when its outcome is here."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        assert work.payload is not None
        self.payload: Payload = work.payload
        self.wire = work.wire
        self.key = f"{re.sub(r'[^A-Za-z0-9_.<>]', '_', work.name)}-{uuid.uuid4().hex}"
        self.dask_future: Any = None

    def end(self, outcome: PackedOutcome | None, error: BaseException | None = None) -> None:
        """Complete the future, unless the call was aborted meanwhile."""
        self.dask_future = None
        with contextlib.suppress(Exception):  # InvalidStateError: cancelled
            if error is not None:
                self.set_exception(error)
            elif outcome is not None:
                self.set_result(outcome)


class _Cancel(NamedTuple):
    """Asks the sender to cancel the Dask tasks of an aborted call."""

    tickets: list[_Ticket]


class _Connection:
    """A client, and the two threads that talk to it for all calls on it.

    Thread-safe: callers only put into ``outbox``; what is scattered is known to the sender thread alone.
    """

    _connections: ClassVar[weakref.WeakValueDictionary[object, _Connection]] = weakref.WeakValueDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get(cls, config: Config) -> _Connection:
        """Return the connection for the client or address that ``config`` means."""
        client = config.client if config.client is not None else None if config.scheduler else _active_client()
        key: object = config.scheduler if client is None else id(client)
        if key is None:
            raise ConfigurationError(
                "tier='dask' has no cluster: give scheduler='tcp://host:8786' or client=Client(...), or make a "
                "distributed.Client before the call."
            )
        with cls._lock:
            connection = cls._connections.get(key)
            if connection is None or not connection.is_running():
                owned = _connect(config) if client is None else None
                connection = cls._connections[key] = cls(client or owned, config.wait_for_workers)
                if owned is not None:
                    weakref.finalize(connection, owned.close).atexit = False
            return connection

    def __init__(self, client: Any, wait_s: float) -> None:
        if getattr(client, "asynchronous", False):
            raise ConfigurationError(
                f"client is {client!r}, which is asynchronous, but joblib calls block: use Client(..., "
                "asynchronous=False) in a thread without an event loop."
            )
        self.client = client
        self.outbox: queue.SimpleQueue[_Ticket | _Cancel | None] = queue.SimpleQueue()
        self._wait_s = wait_s
        self._n_threads = (0, -_CAPACITY_VALID_S)
        self._held: dict[int, tuple[Any, str]] = {}
        self._remote_objects: dict[str, Any] = {}
        exchange = _Exchange(client, self.outbox, self._remote_objects)
        exchange.start()
        # The threads hold the exchange and not the connection, so they end with it.
        weakref.finalize(self, self.outbox.put, None).atexit = False

    def __repr__(self) -> str:
        return f"<_Connection {self.client!r}>"

    def is_running(self) -> bool:
        """Return whether the client is connected or trying to be."""
        return bool(self.client.status in ("running", "connecting"))

    def n_threads(self) -> int:
        """Return the threads of all workers; wait for the first one."""
        n_threads, asked = self._n_threads
        if n_threads and time.monotonic() - asked < _CAPACITY_VALID_S:
            return n_threads
        n_threads = sum(self.client.nthreads().values())
        if n_threads == 0:
            self._wait_for_a_worker()
            n_threads = sum(self.client.nthreads().values())
        self._n_threads = (n_threads, time.monotonic())
        return n_threads

    def _wait_for_a_worker(self) -> None:
        # A task, and not Client.wait_for_workers: an adaptive cluster starts workers when there is something to do.
        try:
            self.client.submit(_nothing, pure=False).result(timeout=self._wait_s)
        except TimeoutError as error:
            raise ClusterUnavailableError(
                f"The Dask scheduler at {self.client.scheduler.address} has had no worker for {self._wait_s:g} "
                f"seconds. Start workers, or wait longer with wait_for_workers={2 * self._wait_s:g}."
            ) from error

    def hold_remote(self, value: Any) -> str:
        """Have ``value``, a Dask collection or future, computed in one place of the cluster, and return its key."""
        known = self._held.get(id(value))
        if known is None:
            future = value if isinstance(value, distributed.Future) else self.client.compute(value)
            known = self._held[id(value)] = (value, str(future.key))
            self._remote_objects[known[1]] = future
        return known[1]


class _Exchange:
    """The sender and the collector thread of a connection."""

    def __init__(self, client: Any, outbox: queue.SimpleQueue[Any], remote_objects: dict[str, Any]) -> None:
        self._client = client
        self._outbox = outbox
        self._remote_objects = remote_objects
        self._done: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        self._scattered: weakref.WeakKeyDictionary[Resident, Any] = weakref.WeakKeyDictionary()
        self._needs_data = threading.Event()
        self._origin = process_identity()

    def start(self) -> None:
        for name, body in (("sender", self._send_all), ("collector", self._collect_all)):
            threading.Thread(target=body, name=f"joblib_backends-dask-{name}", daemon=True).start()

    # ---- sender thread

    def _send_all(self) -> None:
        """Send all that waits in one graph: what comes while a graph is on its way goes with the next."""
        while (first := self._outbox.get()) is not None:
            waiting = [first, *_drain(self._outbox)]
            tickets = [item for item in waiting if isinstance(item, _Ticket) and not item.done()]
            if tickets:
                self._send(tickets)
            for cancel in [item for item in waiting if isinstance(item, _Cancel)]:
                self._cancel(cancel.tickets)
                del cancel
            if None in waiting:
                break
            # A thread that waits must hold no ticket: with it would stay the batch, its files and its context.
            del first, waiting, tickets
        self._done.put(None)

    def _send(self, tickets: list[_Ticket]) -> None:
        try:
            futures = self._client.map(
                run_remotely,
                [ticket.wire for ticket in tickets],
                [self._data_for(ticket) for ticket in tickets],
                key=[ticket.key for ticket in tickets],
                remote_objects=dict(self._remote_objects),
                origin=self._origin,
                pure=False,
            )
        except Exception as error:
            for ticket in tickets:
                ticket.end(None, WorkerLostError(f"A batch could not be sent to the Dask cluster: {error}."))
            return
        for ticket, future in zip(tickets, futures, strict=True):
            ticket.dask_future = future
            future.add_done_callback(lambda _, ticket=ticket: self._done.put(ticket))

    def _data_for(self, ticket: _Ticket) -> dict[str, tuple[bytes, Any]]:
        """Return the residents of a batch as Dask data, by path, if workers cannot read the files."""
        if not self._needs_data.is_set():
            return {}
        return {resident.path: (resident.digest, self._scatter(resident)) for resident in ticket.payload.residents}

    def _scatter(self, resident: Resident) -> Any:
        if resident not in self._scattered:
            content = np.frombuffer(map_buffer(resident.ref()), np.uint8)
            # hash=False: a content hash of dask's own would read all bytes again; ours is the address already.
            self._scattered[resident] = self._client.scatter(content, hash=False)
        return self._scattered[resident]

    def _cancel(self, tickets: list[_Ticket]) -> None:
        futures = [ticket.dask_future for ticket in tickets if ticket.dask_future is not None]
        if not futures:
            return
        with contextlib.suppress(Exception):  # the cluster may be gone; then there is nothing to cancel
            self._client.cancel(futures)

    # ---- collector thread

    def _collect_all(self) -> None:
        while (first := self._done.get()) is not None:
            tickets = [first, *_drain(self._done)]
            self._collect([ticket for ticket in tickets if ticket is not None and ticket.dask_future is not None])
            if None in tickets:
                return
            del first, tickets

    def _collect(self, tickets: list[_Ticket]) -> None:
        """Fetch the outcomes of finished tasks together, and end every ticket."""
        futures = {ticket.key: ticket.dask_future for ticket in tickets if ticket.dask_future.status == "finished"}
        try:
            outcomes = self._client.gather(futures, errors="skip") if futures else {}
        except Exception as error:
            outcomes = {}
            failure = WorkerLostError(f"The Dask cluster was lost while results were fetched: {error}.")
        else:
            failure = WorkerLostError("The result of a batch was lost with its Dask worker.")
        for ticket in tickets:
            outcome = outcomes.get(ticket.key)
            if isinstance(outcome, Missing):
                self._needs_data.set()
                ticket.key += "-with-data"
                self._outbox.put(ticket)
            elif outcome is not None:
                ticket.end(outcome)
            else:
                ticket.end(None, _failure_of(ticket.dask_future) or failure)


def _failure_of(future: Any) -> BaseException | None:
    """Return our error for a Dask task that did not finish, or None if it did."""
    if future.status in ("cancelled", "lost"):
        return CancelledError(f"The Dask task {future.key} was {future.status}.")
    if future.status != "error":
        return None
    error = future.exception()
    failure: BaseException = error
    if isinstance(error, distributed.KilledWorker):
        failure = WorkerLostError(
            f"Dask workers died while they ran the batch {future.key}: {error}. Did they run out of memory?"
        )
    elif not isinstance(error, CancelledError):
        # Our function packs what tasks raise, so this came from Dask: mostly a worker without our package.
        failure = WorkerLostError(
            f"A Dask worker could not run the batch {future.key}: {type(error).__name__}: {error}. "
            "Is joblib_backends installed there, in the same version?"
        )
    failure.__cause__ = error
    return failure


def _drain(waiting: queue.SimpleQueue[Any]) -> list[Any]:
    items = []
    with contextlib.suppress(queue.Empty):
        while True:
            items.append(waiting.get_nowait())
    return items


def _active_client() -> Any:
    try:
        client = distributed.Client.current()  # type: ignore[no-untyped-call]
    except ValueError:
        return None
    return client if client.status == "running" and not client.asynchronous else None


def _connect(config: Config) -> Any:
    try:
        return distributed.Client(  # type: ignore[no-untyped-call]
            config.scheduler, timeout=config.wait_for_workers, set_as_default=False
        )
    except (OSError, TimeoutError) as error:
        raise ClusterUnavailableError(
            f"No Dask scheduler answered at {config.scheduler!r} within wait_for_workers={config.wait_for_workers:g} "
            "seconds: is the address right, and is the scheduler running?"
        ) from error
    except ValueError as error:
        raise ConfigurationError(
            f"scheduler is {config.scheduler!r}, but must be an address such as 'tcp://host:8786': {error}."
        ) from error


def _is_remote(value: Any) -> bool:
    return isinstance(value, distributed.Future) or bool(is_dask_collection(value))


def _nothing() -> None:
    """Do nothing, on a worker."""
