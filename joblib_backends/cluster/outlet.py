"""The messages of scikit-learn's callbacks on a Dask worker that cannot reach who listens to them.

::

    fit ──send──> Outlet ──scheduler.log_event──> Dask's scheduler ──event──> the client: relay.py
                 (one per worker, in order)       (bytes to it)

A batch adopts the listeners whose handles it brings. A connection to one of them that fails on this host is made to
the outlet instead. The scheduler has one request of a worker at a time; what is said meanwhile goes with the next one,
so that ten thousand workers that say much cost it longer requests and not more of them.

``send`` returns when the message is in the outlet, and not, as scikit-learn's own, when it was consumed: that would
be a journey through the cluster for each. What that is there for is kept: one sender is heard in order, a task is
heard before its outcome arrives (the batch ends when the scheduler has all of its messages), and who says more than
the scheduler can take waits. Inner calls say what they have to say to the worker that made them, which passes it on
behind what it said itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import pickle
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Final, NamedTuple

from ..worker import is_packing_results
from . import sklearn_transport

__all__ = ["relaying"]

_log = logging.getLogger(__name__)

#: Bytes of messages that a worker may have waiting before who says more must wait, too.
_MOST_WAITING: Final = 1 << 20

#: Bytes of messages in one event, unless a single message is longer. Schedulers keep the last 1,000 events of a topic
#: (``distributed.admin.low-level-log-length``), and as long as they run: 16 MB at worst for a connection of a client.
#: A message of a progress bar has 200 bytes; mostly it goes alone.
_MOST_IN_EVENT: Final = 16_384

#: Seconds after which a scheduler that does not answer is taken for gone, and with it who listens.
_PATIENCE_S: Final = 60.0

#: Seconds between the tries to hand an event to the scheduler.
_PAUSES_S: Final = (0.1, 1.0, 5.0)


class _Message(NamedTuple):
    """A message on its way out."""

    topic: str
    #: The batch that it comes from, and the listener that it is for.
    key: str
    address: str
    #: A pickle: nobody opens it before the client.
    pickled: bytes


@contextlib.contextmanager
def relaying(worker: Any, topic: str | None) -> Iterator[None]:
    """Relay what callbacks of the batch in this block say, to the client that listens to ``topic``; None for none.

    When the block ends, the scheduler has all of it: before the news that the batch has ended.

    Parameters
    ----------
    worker : distributed.Worker
        The worker that runs the batch, in this thread.
    topic : str or None
        Where the client listens.
    """
    if topic is None:
        yield
        return
    route = _Route(Outlet.of(worker), topic, str(worker.get_current_task()))
    token = _current.set(route)
    try:
        with sklearn_transport.adopting(route.adopt):
            yield
    finally:
        _current.reset(token)
        route.close()


# ---- which way

#: Guards the routes, and what waits in all outlets.
_changed = threading.Condition()

#: The batches that run now and have adopted a listener, the latest last.
_routes: Final[dict[str, list[_Route]]] = {}

#: For processes that a batch starts: a listener here in the place of the one that they cannot reach either.
_stands_in: Final[dict[str, Any]] = {}

#: The listeners that they can reach.
_reached: Final[set[str]] = set()

_current: ContextVar[_Route | None] = ContextVar("current", default=None)


class _Route:
    """The way of the messages of one batch."""

    def __init__(self, outlet: Outlet, topic: str, key: str) -> None:
        self._outlet = outlet
        self._topic = topic
        self._key = key
        self._adopted: set[str] = set()

    def adopt(self, address: str) -> None:
        """Take over the messages for a listener, should it be out of reach."""
        sklearn_transport.take(sklearn_transport.Detour(_connect, _substitute))
        with _changed:
            if address not in self._adopted:
                self._adopted.add(address)
                _routes.setdefault(address, []).append(self)

    def put(self, address: str, pickled: bytes) -> Outlet:
        """Put a message into the outlet; the caller holds the lock."""
        self._outlet.put(_Message(self._topic, self._key, address, pickled))
        return self._outlet

    def close(self) -> None:
        """Let go of the listeners, and see the messages out."""
        with _changed:
            for address in self._adopted:
                _routes[address].remove(self)
            unused = [address for address in self._adopted if not _routes[address]]
            handles = [_stands_in.pop(address, None) for address in unused]
            for address in unused:
                del _routes[address]
                _reached.discard(address)
        for address, handle in zip(unused, handles, strict=True):
            sklearn_transport.forget_connection(address, _Connection)
            if handle is not None:
                sklearn_transport.close_listener(handle)
        if self._adopted:
            self._outlet.flush()


def _connect(address: str) -> _Connection | None:
    with _changed:
        return _Connection(address) if address in _routes else None


def _substitute(handle: Any) -> Any:
    """Return what inner calls get in the place of a handle that is of no use to their workers."""
    address = handle.address
    # In a result it goes home, where its listener is.
    if address not in _routes or address in _reached or is_packing_results():
        return handle
    if address not in _stands_in and sklearn_transport.can_be_reached(handle):
        _reached.add(address)
        return handle
    with _changed:
        if address in _routes and address not in _stands_in:
            _stands_in[address] = sklearn_transport.open_listener(functools.partial(_say, address))
        return _stands_in.get(address, handle)


def _say(address: str, message: Any) -> None:
    """Say something to a listener, in any thread of this process."""
    pickled = pickle.dumps(message, protocol=5)
    with _changed:
        routes = _routes.get(address)
        if not routes:
            raise ConnectionResetError(
                f"A callback has a message for {address}, which this Dask worker can only relay while a batch of the "
                "call runs, and none does. Does a thread go on after the task that started it?"
            )
        # In a thread that a task has started nobody knows which batch it is. Under the lock, so that the batch that is
        # chosen cannot end without this message.
        own = _current.get()
        outlet = (own if own in routes else routes[-1]).put(address, pickled)
    outlet.wait_for_room()


class _Connection:
    """Stands for the connection to a listener that is out of reach."""

    def __init__(self, address: str) -> None:
        self._address = address

    def send(self, message: Any) -> None:
        _say(self._address, message)

    def recv(self) -> None:
        """Acknowledge what was sent."""

    def close(self) -> None:
        """Do nothing: it may have been a trial."""


# ---- out


class Outlet:
    """What the batches of one worker have to say.

    Thread-safe: tasks put messages in their threads, the worker's event loop hands them to the scheduler.
    """

    _outlets: ClassVar[weakref.WeakKeyDictionary[Any, Outlet]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, worker: Any) -> Outlet:
        """Return the outlet of a worker."""
        with _changed:
            if worker not in cls._outlets:
                cls._outlets[worker] = cls(worker)
            return cls._outlets[worker]

    def __init__(self, worker: Any) -> None:
        self._worker = weakref.ref(worker)
        self._loop = worker.loop
        # By name and number the client knows an event that comes twice.
        self._name = uuid.uuid4().hex
        self._n_events = 0
        self._waiting: deque[_Message] = deque()
        self._nbytes = 0
        self._n_put = self._n_sent = 0
        self._is_sending = False

    def __repr__(self) -> str:
        return f"<Outlet {len(self._waiting)} messages, {self._nbytes}/{_MOST_WAITING} B>"

    def put(self, message: _Message) -> None:
        """Put a message behind the others; the caller holds the lock."""
        self._waiting.append(message)
        self._nbytes += len(message.pickled)
        self._n_put += 1
        if not self._is_sending:
            self._is_sending = True
            self._loop.add_callback(self._send_all)

    def wait_for_room(self) -> None:
        """Wait while too much is waiting.

        Raises
        ------
        ConnectionError
            If the scheduler has taken nothing for long.
        """
        with _changed:
            if not _changed.wait_for(lambda: self._nbytes <= _MOST_WAITING, _PATIENCE_S):
                raise ConnectionError(
                    f"The messages of a callback wait on a Dask worker, {self._nbytes} bytes: its scheduler has not "
                    f"taken them for {_PATIENCE_S:g} seconds. Is it still running, or overloaded?"
                )

    def flush(self) -> None:
        """Wait until the scheduler has what was put so far, or is taken for gone."""
        with _changed:
            n_put = self._n_put
            if not _changed.wait_for(lambda: self._n_sent >= n_put, _PATIENCE_S):
                _log.warning("A Dask scheduler has not taken %d messages of callbacks", n_put - self._n_sent)

    async def _send_all(self) -> None:
        """Hand over what waits, one event at a time. Runs on the worker's event loop."""
        while messages := self._next_event():
            try:
                await self._publish(messages)
            except Exception:
                _log.warning("%d messages of callbacks are lost", len(messages), exc_info=True)
            finally:
                with _changed:
                    self._n_sent += len(messages)
                    self._nbytes -= sum(len(message.pickled) for message in messages)
                    _changed.notify_all()

    def _next_event(self) -> list[_Message]:
        """Take messages that go together: for one client, and not too many."""
        messages: list[_Message] = []
        nbytes = 0
        with _changed:
            while self._waiting:
                message = self._waiting[0]
                nbytes += len(message.pickled)
                if messages and (nbytes > _MOST_IN_EVENT or message.topic != messages[0].topic):
                    break
                messages.append(self._waiting.popleft())
            self._is_sending = bool(messages)
        return messages

    async def _publish(self, messages: list[_Message]) -> None:
        """Hand an event to the scheduler, and wait until it has passed it on.

        A request, and not ``Worker.log_event``, which only puts it behind all else that the worker has to say: the
        answer is what holds back a worker that says more than the scheduler can take.
        """
        event = (self._name, self._n_events, [(key, address, pickled) for _, key, address, pickled in messages])
        self._n_events += 1
        for pause_s in (*_PAUSES_S, None):
            worker = self._worker()
            if worker is None:
                return
            try:
                await worker.scheduler.log_event(topic=messages[0].topic, msg=event)
            except OSError:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
            else:
                return


def _forget_in_child() -> None:
    # A task may fork while another one has it.
    global _changed
    _changed = threading.Condition()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
