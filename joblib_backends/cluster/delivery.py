"""Hands the messages of one event to scikit-learn's listeners, in a thread that can be left behind.

A listener is code of somebody else's, in this process or at the other end of a socket. One that has stopped to listen
keeps the thread that speaks to it, and nothing else: who waits goes on without it.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from ..crew import Crew
from . import sklearn_transport
from .ticket import Ticket

__all__ = ["Delivery", "Message"]

_log = logging.getLogger(__name__)

#: (key of the batch, address of the listener, message)
Message = tuple[str, str, bytes]

#: Seconds that the end of a batch waits for the message that is being delivered; scikit-learn's own listeners take
#: microseconds, they only put it on a list.
_SETTLE_S: Final = 1.0

#: Looks at a message that is being delivered, and seconds between two of them, after which its listener has stopped to
#: listen. Looks and not seconds: while this process is stopped, nobody listens.
_MOST_LOOKS: Final = 10
_LOOK_S: Final = 1.0


class _Current(NamedTuple):
    """What is being delivered now."""

    #: The id of the ticket: a thread that is left behind must hold none.
    ticket: int
    address: str
    pickled: bytes
    thread: int
    since: float


class Delivery:
    """The messages of one event.

    Parameters
    ----------
    messages : iterable
        The messages.
    find : callable
        Returns the ticket of a batch by its key, None if it is gone.
    deaf : set
        The addresses of listeners that have stopped to listen; here it is added to.

    Notes
    -----
    Thread-safe. No listener is called under the lock.
    """

    def __init__(self, messages: Iterable[Message], find: Callable[[str], Ticket | None], deaf: set[str]) -> None:
        self._messages = deque(messages)
        self._find = find
        self._deaf = deaf
        self._lock = threading.Lock()
        self._ended, self._moved_on = threading.Condition(self._lock), threading.Condition(self._lock)
        self._current: _Current | None = None
        self._is_over = self._is_left = False

    def __repr__(self) -> str:
        return f"<Delivery of {len(self._messages)} messages, after one to {self._current and self._current.address}>"

    def start(self) -> None:
        """Deliver in a thread of the crew."""
        Crew.shared().run(self._deliver_all)

    def wait(self) -> list[Message]:
        """Wait for the end; return what a listener holds up that has stopped to listen."""
        n_looks, seen = 0, None
        with self._lock:
            while not self._ended.wait_for(lambda: self._is_over, _LOOK_S):
                n_looks = n_looks + 1 if self._current is seen else 1
                seen = self._current
                if seen is not None and n_looks >= _MOST_LOOKS:
                    self._is_left = True
                    break
            else:
                return []
        self._deaf.add(seen.address)
        _log.warning(
            "A callback of scikit-learn has not taken a message for %g seconds, at %s: it gets no more of them",
            _MOST_LOOKS * _LOOK_S,
            seen.address,
        )
        return list(self._messages)

    def settle(self, ticket: object) -> None:
        """Let the message come to its end that is being delivered for a batch, which has ended; not for long."""
        with self._lock:
            current = self._current
            # A listener may itself end the batch.
            if current is None or current.ticket != id(ticket) or current.thread == threading.get_ident():
                return
            remaining_s = current.since + _SETTLE_S - time.monotonic()
            self._moved_on.wait_for(lambda: self._current is not current, max(0.0, remaining_s))

    # ---- the crew's thread

    def _deliver_all(self) -> None:
        while (current := self._next()) is not None:
            try:
                sklearn_transport.deliver(current.address, pickle.loads(current.pickled))
            except Exception:
                _log.warning("A message of a callback could not be delivered to %s", current.address, exc_info=True)

    def _next(self) -> _Current | None:
        """Return what is to be delivered next; None when this thread is no longer needed."""
        with self._lock:
            self._current = None
            self._moved_on.notify_all()
            while self._messages and not self._is_left:
                key, address, pickled = self._messages.popleft()
                ticket = self._find(key)
                # Neither has it ended, nor was it sent again, which would say the same twice. Under the lock: who ends
                # it from here on waits for this message.
                if ticket is not None and ticket.key == key and not ticket.done() and address not in self._deaf:
                    thread, now = threading.get_ident(), time.monotonic()
                    self._current = _Current(id(ticket), address, pickled, thread, now)
                    return self._current
            self._is_over = True
            self._ended.notify_all()
            return None
