"""The messages of scikit-learn's callbacks, from Dask workers that cannot reach who listens to them.

::

    worker: outlet.py ──event──> the client's event loop ──inbox──> relay thread ──> delivery.py: listener

Invariants: what a batch has said is delivered before its outcome is, in the order in which each worker said it; and
nothing is delivered for a batch that has ended, such as one that an aborted call has left running.

The first holds because the scheduler sends one stream to a client: all messages of a batch are in the inbox before
the client hears that it has ended, and its end goes behind them.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from . import sklearn_transport
from .client import unsubscribe
from .delivery import Delivery, Message
from .ticket import Ticket

__all__ = ["Relay"]

_log = logging.getLogger(__name__)

#: An event of a worker: its outlet, a number, and (key of the batch, address of the listener, message) of each.
_Event = tuple[str, int, list[Message]]


class _Inbox:
    """What has arrived and is not yet delivered: events, and ends of batches behind them; None ends the thread.

    All of a relay that its client holds.
    """

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[_Event | Callable[[], object] | None] = queue.SimpleQueue()
        #: Events that came, counted by the client's event loop, and those of them that are delivered.
        self.n_events = self.n_delivered = 0

    def take(self, event: tuple[float, _Event]) -> None:
        """Called on the client's event loop."""
        self.n_events += 1
        self.items.put(event[1])


class Relay:
    """Delivers the messages of the batches of one connection.

    Parameters
    ----------
    client : distributed.Client
        The client.

    Notes
    -----
    Thread-safe. It costs nothing until a batch with a callback of scikit-learn's is made in this process.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._topic = f"joblib_backends-callbacks-{uuid.uuid4().hex}"
        self._inbox = _Inbox()
        self._tickets: weakref.WeakValueDictionary[str, Ticket] = weakref.WeakValueDictionary()
        self._n_seen: dict[str, int] = {}
        self._is_subscribed = False
        self._has_thread = False
        self._lock = threading.Lock()
        self._delivery: Delivery | None = None
        self._deaf: set[str] = set()

    def __repr__(self) -> str:
        return f"<Relay {self._inbox.n_delivered}/{self._inbox.n_events} events>"

    def listen(self, tickets: Iterable[Ticket]) -> str | None:
        """Deliver what these batches will say; return the topic for their workers, None if nothing is to be said.

        To be called before they are sent, or what they say first would be missed.
        """
        if not sklearn_transport.handles_have_left():
            return None
        for ticket in tickets:
            self._tickets[ticket.key] = ticket
            ticket.add_done_callback(self._settle)
        if not self._has_thread:
            self._has_thread = True
            threading.Thread(target=self._deliver_all, name="joblib_backends-dask-relay", daemon=True).start()
        if not self._is_subscribed:
            self._client.subscribe_topic(self._topic, self._inbox.take)
            self._is_subscribed = True
        return self._topic

    def subscribe_again(self) -> None:
        """Subscribe with the next batches: there may be another scheduler, which does not know of us."""
        self._is_subscribed = False

    def after_messages(self, end: Callable[[], object]) -> None:
        """Call ``end`` when all that has arrived by now is delivered; here and now if it is."""
        # In this order: what comes meanwhile is not of a batch that has ended.
        n_events = self._inbox.n_events
        with self._lock:
            must_wait = self._has_thread and self._inbox.n_delivered < n_events
            if must_wait:
                self._inbox.items.put(end)
        if not must_wait:
            end()

    def close(self) -> None:
        """End the thread, after what has arrived by now."""
        if self._is_subscribed:
            with contextlib.suppress(Exception):  # the client may be closed
                unsubscribe(self._client, self._topic)
        self._inbox.items.put(None)

    def _settle(self, ended: Future[Any]) -> None:
        """Let the message come to its end that is being delivered: none may come after the end of its batch."""
        delivery = self._delivery
        if delivery is not None:
            delivery.settle(ended)

    # ---- relay thread

    def _deliver_all(self) -> None:
        while (item := self._inbox.items.get()) is not None:
            self._handle(item)
            # A thread that waits must hold no ticket.
            del item
        with self._lock:
            # From here on, ends wait for nobody.
            self._has_thread = False
        with contextlib.suppress(queue.Empty):
            while True:
                if (item := self._inbox.items.get_nowait()) is not None:
                    self._handle(item)

    def _handle(self, item: _Event | Callable[[], object]) -> None:
        if callable(item):
            item()
            return
        try:
            self._deliver(*item)
        except Exception:
            _log.warning("Messages of callbacks could not be delivered", exc_info=True)
        finally:
            self._inbox.n_delivered += 1

    def _deliver(self, outlet: str, number: int, messages: list[Message]) -> None:
        # A worker that was not told that its event had arrived sends it again.
        if number < self._n_seen.get(outlet, 0):
            return
        self._n_seen[outlet] = number + 1
        left = messages
        try:
            while left:
                self._delivery = Delivery(left, self._tickets.get, self._deaf)
                self._delivery.start()
                left = self._delivery.wait()
        finally:
            self._delivery = None
