"""The thread of a pool: waits for what its workers send, for their ends, and for the time when they have idled enough.

It decides nothing: the pool is told what came, and says when to look again.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from typing import Any, Final, Protocol

from .frames import Frame
from .member import Member
from .process import End
from .server import ForkServer

__all__ = ["Collector", "Told"]

#: Seconds that a process has between the end of its connection and its own end, before it is killed.
_CUT_TIMEOUT_S: Final = 1.0

#: Seconds in which a process whose sentinel has ended becomes one that can be waited for.
_REAP_TIMEOUT_S: Final = 0.2


class Told(Protocol):
    """What a collector tells; called in its thread."""

    def came(self, member: Member, received: list[Frame]) -> None:
        """Frames of a worker have come."""

    def cut(self, member: Member) -> None:
        """The connection to a worker has ended; its process follows."""

    def ended(self, member: Member, end: End) -> None:
        """A worker is gone."""

    def look_after(self, collector: Collector) -> float | None:
        """Return the seconds until the pool wants to be asked again; negative to end the thread."""

    def failed(self, error: BaseException) -> None:
        """The thread itself has failed and is over."""


class Collector:
    """A selector over the workers of a pool, and the thread that runs it. ``add`` and ``wake`` from any thread."""

    def __init__(self, pool: Told) -> None:
        self._pool = pool
        self._woken, self._waker = socket.socketpair()
        try:
            self._selector = selectors.DefaultSelector()
        except BaseException:
            self._woken.close()
            self._waker.close()
            raise
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, (self._drain, None))
        self._new: deque[Member] = deque()
        self._members: set[Member] = set()
        self.thread = threading.Thread(target=self._run, name="joblib_backends-pool", daemon=True)

    def start(self) -> None:
        """Start the thread; it ends when the pool says so."""
        self.thread.start()

    def add(self, member: Member) -> None:
        """Listen to a worker from now on."""
        self._new.append(member)
        self.wake()

    def wake(self) -> None:
        """Have the thread look again: something is to be written, or to be ended."""
        if threading.current_thread() is not self.thread:
            with contextlib.suppress(OSError):  # full: it will wake; closed: it is over
                self._waker.send(b"\0")

    def forget_in_child(self) -> None:
        """Close the copies of a forked child; ``unregister`` would act on the parent's."""
        for member in (*self._members, *self._new):
            member.process.forget_in_child()
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            # Never silently: somebody waits for every batch.
            for member in list(self._members):
                member.process.kill()
                member.process.close()
            self._pool.failed(error)
        finally:
            self._selector.close()
            self._woken.close()
            self._waker.close()
            ForkServer.stop_idle()

    def _turn(self) -> bool:
        timeout = self._pool.look_after(self)
        if timeout is not None and timeout < 0:
            return False
        self._update()
        deadlines = [member.deadline for member in self._members if member.deadline is not None]
        if deadlines:
            until = max(0.0, min(deadlines) - time.monotonic())
            timeout = until if timeout is None else min(timeout, until)
        for key, events in self._selector.select(timeout):
            act, member = key.data
            if member is None or member in self._members:
                act(member, events)
        now = time.monotonic()
        for member in [m for m in self._members if m.deadline is not None and m.deadline <= now]:
            self._finish(member)
        return True

    def _update(self) -> None:
        """Listen to new workers, and for room where something is left to be written."""
        while self._new:
            member = self._new.popleft()
            self._members.add(member)
            self._selector.register(member.process.sock, selectors.EVENT_READ, (self._take, member))
            self._selector.register(member.process.sentinel, selectors.EVENT_READ, (self._see_end, member))
        for member in self._members:
            if not member.is_cut:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if member.has_unsent else 0)
                if self._selector.get_key(member.process.sock).events != wanted:
                    self._selector.modify(member.process.sock, wanted, (self._take, member))

    def _drain(self, _: Any, __: int) -> None:
        with contextlib.suppress(OSError):
            self._woken.recv(4096)

    def _take(self, member: Member, events: int) -> None:
        if events & selectors.EVENT_READ:
            received, is_over = member.read()
            if received:
                self._pool.came(member, received)
            if is_over:
                # Its exit code comes a moment later.
                self._cut(member)
                self._pool.cut(member)
                member.deadline = time.monotonic() + _CUT_TIMEOUT_S
        elif events & selectors.EVENT_WRITE:
            self._pool.came(member, [])

    def _see_end(self, member: Member, _: int) -> None:
        self._selector.unregister(member.process.sentinel)
        if not member.process.has_ended():
            return  # its server is gone, and it is not: the end of its connection will tell
        # What it sent before it died is still there, and counts. The end of the connection may never come: a process
        # that a task started may hold it open.
        while not member.is_cut:
            received, is_over = member.read()
            if received:
                self._pool.came(member, received)
            if is_over or not (received or member.has_unread):
                self._cut(member)
        self._finish(member)

    def _cut(self, member: Member) -> None:
        if not member.is_cut:
            member.is_cut = True
            self._selector.unregister(member.process.sock)

    def _finish(self, member: Member) -> None:
        """Let go of a process that is gone, or should be."""
        self._members.discard(member)
        self._cut(member)
        with contextlib.suppress(KeyError):
            self._selector.unregister(member.process.sentinel)
        end = time.monotonic() + _REAP_TIMEOUT_S
        while member.process.exit_code() is None and member.deadline is None and time.monotonic() < end:
            time.sleep(0.001)
        ended = member.process.how_it_ended()
        if member.process.exit_code() is None:
            member.process.kill()
        member.process.close()
        self._pool.ended(member, ended)
