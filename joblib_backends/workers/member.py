"""A worker as its pool sees it: what it runs, what is on its way to it, what has come from it.

Everything but ``read`` is under the pool's lock; ``read`` belongs to the collector.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from typing import Final

from . import frames
from .calls import Batch
from .process import WorkerProcess

__all__ = ["Member"]

#: Seconds that a worker has to end when it is told so; its own limit for exit functions is 5.
_END_TIMEOUT_S: Final = 6.0


class Member:
    """One worker of a pool.

    Notes
    -----
    A worker runs one batch at a time and sends its outcome before it reads the next: as long as the outcome of the
    running one has not come, the prefetched one has not been started, and may be given to another worker. A socket
    whose reader died tells whether all of it had been read, so a batch that was sent to a dying worker can be told
    from one that killed it.
    """

    def __init__(self, process: WorkerProcess, preparation: bytes) -> None:
        self.process = process
        #: What the worker last took over from the parent.
        self.preparation = preparation
        self.running: Batch | None = None
        self.prefetched: Batch | None = None
        #: Whether its loop runs.
        self.is_ready = False
        #: Whether the pool has given it up; what still comes from it is for nobody.
        self.is_doomed = False
        #: Whether the connection has ended.
        self.is_cut = False
        self.started_at = 0.0
        self.idle_since = 0.0
        #: When to kill it, if it should have ended by then; seconds of ``time.monotonic``.
        self.deadline: float | None = None
        self._outbox: deque[memoryview] = deque()
        self._reader = frames.FrameReader()

    def __repr__(self) -> str:
        state = "doomed" if self.is_doomed else "busy" if self.running else "idle" if self.is_ready else "starting"
        return f"<Member {self.process!r} {state}>"

    @property
    def has_unsent(self) -> bool:
        """Whether bytes wait for the worker to read."""
        return bool(self._outbox)

    @property
    def has_unread(self) -> bool:
        """Whether the last ``read`` took a part only of what had come."""
        return self._reader.has_more

    def give(self, batch: Batch, preparation: bytes, now: float) -> bool:
        """Send a batch, to run now or next; return whether bytes of it are left to be written."""
        if self.running is None:
            self.running, self.started_at = batch, now
            batch.queue.n_running += 1
        else:
            self.prefetched = batch
            batch.queue.n_prefetched += 1
        if preparation is not self.preparation:
            self._outbox.extend(map(memoryview, frames.pack(frames.PREPARE, preparation)))
            self.preparation = preparation
        self._outbox.extend(map(memoryview, frames.pack(frames.BATCH, batch.body)))
        self.flush()
        return self.has_unsent

    def flush(self) -> None:
        """Write what the kernel takes now. A worker that is gone is noticed by who reads."""
        while self._outbox:
            piece = self._outbox[0]
            try:
                n = self.process.sock.send(piece)
            except BlockingIOError:
                return
            except OSError:
                self._reader.was_reset = True
                self._outbox.clear()
                return
            if n < len(piece):
                self._outbox[0] = piece[n:]
                return
            self._outbox.popleft()

    def finish(self, now: float) -> Batch | None:
        """Take the running batch out, whose outcome has come; the prefetched one runs now."""
        batch = self.running
        if batch is None:
            return None
        batch.queue.n_running -= 1
        batch.queue.note(now - self.started_at)
        self.running, self.prefetched = self.prefetched, None
        self.started_at = self.idle_since = now
        if self.running is not None:
            self.running.queue.n_prefetched -= 1
            self.running.queue.n_running += 1
        return batch

    @property
    def overdue_at(self) -> float | None:
        """When what runs has run for too long, on the clock of ``give``; None for never."""
        if self.running is None or self.running.timeout_s is None:
            return None
        return self.started_at + self.running.timeout_s

    @property
    def has_not_started(self) -> bool:
        """Whether what it seems to run never was: the kernel says that it died with that batch unread."""
        return self.prefetched is None and self._reader.was_reset

    def take_back(self) -> Batch | None:
        """Take the batch out that was sent ahead and is not started as long as the other one runs."""
        prefetched, self.prefetched = self.prefetched, None
        if prefetched is not None:
            prefetched.queue.n_prefetched -= 1
        return prefetched

    def drop(self) -> tuple[Batch | None, Batch | None]:
        """Take both batches out: the one that ran, and the one that was never started."""
        running, self.running = self.running, None
        if running is not None:
            running.queue.n_running -= 1
        prefetched = self.take_back()
        self._outbox.clear()
        return running, prefetched

    def end(self, *, by_force: bool) -> None:
        """Have the process end: now, or after its exit functions, for which it has a time of its own."""
        self.is_doomed = True
        self.deadline = time.monotonic() + _END_TIMEOUT_S
        if by_force:
            self.process.kill()
        else:
            with contextlib.suppress(OSError):
                self.process.sock.shutdown(socket.SHUT_WR)

    def read(self) -> tuple[list[frames.Frame], bool]:
        """Return the frames that have come, and whether the connection has ended."""
        return self._reader.read(self.process.sock)
