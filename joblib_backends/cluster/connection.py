"""A client of a Dask cluster, and what all calls on it share: one for each cluster and way to use it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final

from ..config import Config
from ..errors import ClusterUnavailableError, ConfigurationError
from .address import address_of, is_named
from .client import (
    GONE,
    active_client,
    address_and_certificates,
    check_blocks,
    check_is_of_this_process,
    close,
    connect,
    descriptions,
    future_of,
    is_alive,
)
from .exchange import Exchange
from .outfit import Outfit
from .placement import Placement, most_slots
from .ticket import Cancel, Ticket

__all__ = ["Connection"]

#: Seconds for which the number of slots of a cluster is taken as known; asking costs 2 ms, and joblib asks often.
_CAPACITY_VALID_S: Final = 1.0

#: Seconds to wait for a cluster that was found missing, within so many seconds of that: each of joblib's questions
#: before a call would wait as long as the first one.
_WAIT_AGAIN_S: Final = 1.0
_MISSING_FOR_S: Final = 60.0

#: What a forked child must neither use nor let go of: the end of a client waits for threads of the parent.
_of_parent: Final[list[object]] = []


class Connection:
    """A client, and the exchange that all calls on it share.

    Thread-safe: callers only put into ``outbox``; what is scattered is known to the exchange alone.
    """

    _connections: ClassVar[weakref.WeakValueDictionary[object, Connection]] = weakref.WeakValueDictionary()
    _missing_since: ClassVar[dict[object, float]] = {}
    #: What one thread at a time holds that makes the connection of a key, which may take several times ``wait_s``.
    _making: ClassVar[weakref.WeakValueDictionary[object, threading.Lock]] = weakref.WeakValueDictionary()
    #: Guards ``_making``; nothing is waited for under it.
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get(cls, config: Config) -> Connection:
        """Return the connection for the client or address that ``config`` means."""
        client = config.client if config.client is not None else None if config.scheduler else _client_here(config)
        if client is None and config.outer_task is not None and not config.scheduler:
            return cls._get_in_task(config)
        if client is None and not is_named(config):
            raise ConfigurationError(
                "tier='dask' has no cluster: give scheduler='tcp://host:8786' or 'local', or client=Client(...), or "
                "make a distributed.Client before the call."
            )
        # A connection waits as long as it was told to.
        how = Placement.of(config), config.wait_for_workers
        if client is not None:
            check_is_of_this_process(client)
            return cls._get((id(client), how), config, lambda: client)
        with cls._patient(config.scheduler, config.wait_for_workers) as wait_s:
            address = address_of(config, wait_s)
        key = (address_and_certificates(config, address), how)
        return cls._get(key, config, lambda: cls._connect(key, config, address), owns_client=True)

    @classmethod
    def _get(cls, key: object, config: Config, client: Callable[[], Any], *, owns_client: bool = False) -> Connection:
        with cls._making_lock(key):
            connection = cls._connections.get(key)
            if connection is None or not connection._is_current():
                connection = cls(client(), config, owns_client)
                cls._connections[key] = connection
        # Without the lock: the user may have put code in the place of what shows warnings.
        connection.outfit.tell()
        return connection

    @classmethod
    def _get_in_task(cls, config: Config) -> Connection:
        """Return the connection of the worker in whose task a call is made."""
        outer_task = config.outer_task

        def make_client() -> Any:
            try:
                return outer_task.make_client(config.wait_for_workers)
            except (OSError, TimeoutError) as error:
                raise ClusterUnavailableError(
                    f"The scheduler of the Dask worker that runs {outer_task!r} did not answer within "
                    f"wait_for_workers={config.wait_for_workers:g} seconds: is it still running?"
                ) from error

        key = (outer_task.worker_id, Placement.of(config), config.wait_for_workers)
        connection = cls._get(key, config, make_client, owns_client=True)
        outer_task.keep(connection)
        return connection

    @classmethod
    def _making_lock(cls, key: object) -> threading.Lock:
        with cls._lock:
            lock = cls._making.get(key)
            if lock is None:
                lock = cls._making[key] = threading.Lock()
            return lock

    @classmethod
    def leave_to_parent(cls) -> None:
        """Start anew in a forked child, which has the connections of its parent without their threads."""
        _of_parent.extend(cls._connections.values())
        cls._connections, cls._making = weakref.WeakValueDictionary(), weakref.WeakValueDictionary()
        cls._lock = threading.Lock()

    @classmethod
    def _connect(cls, key: object, config: Config, address: str) -> Any:
        with cls._patient(key, config.wait_for_workers) as wait_s:
            return connect(config, address, wait_s)

    @classmethod
    @contextlib.contextmanager
    def _patient(cls, key: object, wait_s: float) -> Iterator[float]:
        """Give the seconds that may be waited for what ``key`` stands for, and remember whether it was missing."""
        try:
            yield cls._patience(key, wait_s)
        except ClusterUnavailableError:
            cls._missing_since[key] = time.monotonic()
            raise
        cls._missing_since.pop(key, None)

    @classmethod
    def _patience(cls, key: object, wait_s: float) -> float:
        is_missing = time.monotonic() - cls._missing_since.get(key, -_MISSING_FOR_S) < _MISSING_FOR_S
        return min(wait_s, _WAIT_AGAIN_S) if is_missing else wait_s

    def __init__(self, client: Any, config: Config, owns_client: bool) -> None:
        check_blocks(client)
        self.client = client
        wait_s = config.wait_for_workers
        self._may_be_misnumbered = False
        placement = self._numbered(Placement.of(config), wait_s)
        self._placement = placement
        self.outbox: queue.SimpleQueue[Ticket | Cancel | None] = queue.SimpleQueue()
        self._wait_s = wait_s
        self._n_slots = (0, -_CAPACITY_VALID_S)
        self._held: dict[int, tuple[Any, str]] = {}
        self._remote_objects: dict[str, Any] = {}
        # Who has sent the batch in which a call is made has given the workers what they need.
        is_in_batch = config.outer_task is not None and config.outer_task.n_slots is not None
        self.outfit = Outfit(client, wait_s, placement, is_provided=is_in_batch)
        self._provide(owns_client)
        exchange = Exchange(
            client, self.outbox, self._remote_objects, self.outfit, wait_s, placement, owns_client=owns_client
        )
        exchange.start()
        # The threads hold the exchange and not the connection, so they end with it.
        weakref.finalize(self, self.outbox.put, None).atexit = False

    def __repr__(self) -> str:
        return f"<Connection {self.client!r}>"

    def _numbered(self, placement: Placement, wait_s: float) -> Placement:
        if not placement.has_numbers:
            return placement
        found: Mapping[str, Mapping[str, Any]] = {}
        # A cluster that does not answer now is found out by who asks it next.
        with contextlib.suppress(ClusterUnavailableError):
            found = descriptions(self.client, wait_s)
        placement = placement.numbered_as([worker["name"] for worker in found.values()])
        self._may_be_misnumbered = not any(placement.names(*worker) for worker in found.items())
        return placement

    def _is_current(self) -> bool:
        """Return whether calls may use this; not if it has seen no worker that could tell it how they are numbered."""
        return is_alive(self.client) and not self._may_be_misnumbered

    def _provide(self, owns_client: bool) -> None:
        # Here, so that what the workers lack is the caller's to hear; a cluster that does not answer now is found out
        # by who asks it next, and gets what it must have with the first batch.
        try:
            with contextlib.suppress(*GONE):
                if self.client.status == "running":
                    self.outfit.provide()
        except BaseException:
            if owns_client:
                close(self.client)
            raise

    def n_slots(self) -> int:
        """Return how many batches can run at once, on all workers that match; wait for the first one."""
        n_slots, asked = self._n_slots
        if n_slots and time.monotonic() - asked < _CAPACITY_VALID_S and self.client.status == "running":
            return n_slots
        with self._patient((self._address(), self._placement), self._wait_s) as wait_s:
            slots = self._placement.slots(self.client, wait_s)
            if not slots:
                self._wait_for_a_worker(wait_s)
                slots = self._placement.slots(self.client, wait_s)
        n_slots = most_slots(self.client, self._placement, slots)
        self._n_slots = (n_slots, time.monotonic())
        return n_slots

    def _address(self) -> str:
        # A client that was closed has none.
        return str(getattr(self.client.scheduler, "address", None) or self.client)

    def _wait_for_a_worker(self, wait_s: float) -> None:
        # A task, and not Client.wait_for_workers: an adaptive cluster starts workers when there is something to do.
        try:
            self.client.submit(int, pure=False, **self._placement.options).result(timeout=wait_s)
        except GONE as error:
            such = f" with {self._placement}" if str(self._placement) else ""
            raise ClusterUnavailableError(
                f"The Dask scheduler at {self.client.scheduler.address} has had no worker{such} for {wait_s:g} "
                f"seconds. Start workers, or wait longer with wait_for_workers={2 * self._wait_s:g}."
            ) from error

    def hold_remote(self, value: Any) -> str:
        """Have ``value``, a Dask collection or future, computed in one place of the cluster, and return its key."""
        known = self._held.get(id(value))
        if known is None:
            future = future_of(self.client, value)
            known = self._held[id(value)] = (value, str(future.key))
            self._remote_objects[known[1]] = future
        return known[1]


def _client_here(config: Config) -> Any:
    """Return the client that is active in this process, or None; whose it is does not matter to a batch in a worker."""
    is_in_batch = config.outer_task is not None and config.outer_task.n_slots is not None
    return None if is_in_batch else active_client()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Connection.leave_to_parent)
