"""Threads that stay between calls, because starting one costs 70 µs and a warm call uses three.

A crew is held by contexts and open calls, and ends with the last of them. It grows to the most threads that were
ever busy at once and never makes work wait for a thread, so calls that nest cannot wait for each other's threads.
The threads are daemons: a task that hangs delays neither Ctrl-C nor the end of the interpreter.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from .hearing import Heard, belonging_to, current

__all__ = ["Crew"]

Body = Callable[[], object]
_Inbox = queue.SimpleQueue["Body | None"]


@dataclass
class _Roster:
    """What a crew and its threads share; the threads must not hold the crew, whose end is theirs."""

    idle: deque[_Inbox] = field(default_factory=deque)
    is_over: bool = False

    def end(self) -> None:
        self.is_over = True
        while self.idle:
            self.idle.pop().put(None)


class Crew:
    """Runs bodies, each in a thread of its own. Thread-safe: a deque's ``pop`` and ``append`` are atomic."""

    _shared: ClassVar[weakref.ref[Crew] | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def shared(cls) -> Crew:
        """Return the crew of this process; it lives while some context or call holds it."""
        with cls._lock:
            crew = cls._shared() if cls._shared is not None else None
            if crew is None:
                crew = cls()
                cls._shared = weakref.ref(crew)
            return crew

    def __init__(self) -> None:
        self._roster = _Roster()
        weakref.finalize(self, self._roster.end).atexit = False

    def __repr__(self) -> str:
        return f"<Crew {len(self._roster.idle)} idle threads>"

    def run(self, body: Body) -> None:
        """Run ``body``, which must not raise, in an idle thread or a new one.

        In a worker, the batch that is heard in the calling thread hears that one, too.
        """
        heard = current()
        if heard is not None:
            body = functools.partial(_run_heard, heard, body)
        try:
            inbox = self._roster.idle.pop()
        except IndexError:
            inbox = queue.SimpleQueue()
            name = "joblib_backends-crew"
            threading.Thread(target=_serve, args=(self._roster, inbox), name=name, daemon=True).start()
        inbox.put(body)


def _run_heard(heard: Heard, body: Body) -> None:
    with belonging_to(heard):
        body()


def _serve(roster: _Roster, inbox: _Inbox) -> None:
    """Run one body after the other until the crew is over. The body of a crew's thread."""
    while (body := inbox.get()) is not None:
        body()
        del body
        roster.idle.append(inbox)
        # Race: the crew may have ended while the body ran, with this thread not among the idle ones.
        if roster.is_over:
            return


def _forget_in_child() -> None:
    # A forked child has the parent's crew without its threads.
    Crew._shared, Crew._lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
