"""Somebody who does the caller's part while it runs a batch itself and that takes long.

Where work is small the calling thread runs it, and nothing is handed over. But then nobody completes what others have
done, starts what waits, or asks whether another tier pays, if one batch turns out to be long, to wait for its
neighbours, or never to end.

Who runs where: the caller notes what it does; one thread of the crew, the lookout, looks at all callers of the process;
for one that is in a long batch it lends another thread of the crew, which helps out until the caller is back.

Each look takes the interpreter lock from the caller and gives it back: two wake-ups of a thread, some 0.3 ms. Where
earlier calls showed how long the tasks are, the lookout looks seldom (looks 5 ms apart made a forest's predictions take
25 % longer, looks 50 ms apart 2 %). It stays for a moment after the last call, because to wake a thread costs a small
call a tenth of its time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Final, NamedTuple

from .crew import Crew

__all__ = ["Relief", "Running"]

#: Seconds after which a batch in the calling thread takes long, of which nothing was expected: moving the rest
#: elsewhere costs less than this.
_PATIENCE_S: Final = 0.002

#: Times its expected length after which a batch takes long.
_LONG: Final = 2.0

#: Seconds between two looks at a caller whose tasks nobody has seen, and at one whose tasks are known.
_LOOK_INTERVAL_S: Final = 0.005
_SELDOM_S: Final = 0.05

#: Seconds between two samples of the CPU time of the process: a task may go on with more threads than it began with.
_SAMPLE_S: Final = 0.015

#: Seconds for which the lookout stays without anybody to look after.
_STAYS_S: Final = 0.5

#: Seconds between two looks of who helps out while nothing may be completed; each wait is longer than the one before.
_HELP_INTERVAL_S: Final = 0.002

#: Seconds after which batches are completed in any case: others may be waiting for what is dispatched then.
_MUST_COMPLETE_S: Final = 1.0


class Running(NamedTuple):
    """A batch of the calling thread that takes long; nothing by default."""

    #: For how long it has been running.
    seconds: float = 0.0
    n_tasks: int = 0
    #: Cores that this process has been using of late.
    cores: float = 0.0


class Relief:
    """Stands by for the thread that makes one call.

    Parameters
    ----------
    crew : Crew
        Lends the threads.
    help_out : callable
        Called with whether batches may be completed meanwhile; does one thing that is due, or waits for it for a
        moment.
    """

    def __init__(self, crew: Crew, help_out: Callable[[bool], object]) -> None:
        self._crew = crew
        self._help_out: Callable[[bool], object] | None = help_out
        self._is_watched = False
        self._has_help = False
        self._busy_since: float | None = None
        self._n_tasks = 1
        self._patience_s = _PATIENCE_S
        # Of time and CPU time, the last two of this batch.
        self._samples = ((0.0, 0.0), (0.0, 0.0))
        self._may_complete = False
        #: Seconds between two looks at this caller.
        self.look_interval_s = _LOOK_INTERVAL_S

    def __repr__(self) -> str:
        return f"<Relief {'on duty' if self.is_on_duty else 'standing by'}>"

    @property
    def is_on_duty(self) -> bool:
        """Whether the caller is in a batch now."""
        return self._busy_since is not None

    @property
    def running(self) -> Running:
        """What the caller runs, if that takes long."""
        since = self._busy_since
        seconds = 0.0 if since is None else time.perf_counter() - since
        if seconds <= self._patience_s:
            return Running()
        return Running(seconds, self._n_tasks, self._cores_used())

    def _cores_used(self) -> float:
        """Return how many cores this process has used since the sample before the last, or the batch's begin."""
        now, cpu = time.perf_counter(), time.process_time()
        if now - self._samples[1][0] > _SAMPLE_S:
            self._samples = (self._samples[1], (now, cpu))
        before, cpu_before = self._samples[0]
        return (cpu - cpu_before) / max(now - before, 1e-6)

    @contextmanager
    def standing_by(self, n_tasks: int, expected_s: float, *, may_complete: bool) -> Iterator[None]:
        """Note that the caller runs a batch of ``n_tasks`` inside the block, for ``expected_s``, 0 if unknown."""
        self._n_tasks, self._may_complete = n_tasks, may_complete
        # However long it is: workers may come meanwhile, and nobody else would see that they did.
        self._patience_s = max(_PATIENCE_S, min(_LONG * expected_s, _SELDOM_S))
        began = time.perf_counter()
        self._samples = ((began, time.process_time()),) * 2
        self._busy_since = began
        if not self._is_watched:
            self._is_watched = True
            self.look_interval_s = _SELDOM_S if expected_s else _LOOK_INTERVAL_S
            _Lookout.get().watch(self, self._crew)
        try:
            yield
        finally:
            self._busy_since = None

    def end(self) -> None:
        """Note that the call is over."""
        if self._is_watched:
            _Lookout.get().leave(self)
        # The call holds this object and is held by its method.
        self._help_out = None

    def look(self) -> None:
        """Have somebody help out if the caller takes long. Called by the lookout."""
        if self.running.seconds and not self._has_help:
            self._has_help = True
            # From now on somebody else looks at what it does.
            self.look_interval_s = _SELDOM_S
            try:
                self._crew.run(self._help)
            except BaseException:
                self._has_help = False
                raise

    def _help(self) -> None:
        """Help out until the caller is back. The body of the crew's thread."""
        interval_s = _HELP_INTERVAL_S
        try:
            while (help_out := self._help_out) is not None and (running_s := self.running.seconds):
                may_complete = self._may_complete or running_s > _MUST_COMPLETE_S
                help_out(may_complete)
                del help_out
                if not may_complete:
                    time.sleep(interval_s)
                    interval_s = min(2 * interval_s, _SELDOM_S)
        finally:
            self._has_help = False


class _Lookout:
    """Looks at all callers of the process that run batches themselves. Thread-safe."""

    _of_process: ClassVar[_Lookout | None] = None
    _class_lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get(cls) -> _Lookout:
        with cls._class_lock:
            if cls._of_process is None:
                cls._of_process = cls()
            return cls._of_process

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[Relief] = set()
        self._is_there = False
        self._sleeps_s = _SELDOM_S
        self._wake = threading.Event()

    def watch(self, relief: Relief, crew: Crew) -> None:
        starts = False
        try:
            with self._lock:
                self._watched.add(relief)
                starts, self._is_there = not self._is_there, True
                wakes = relief.look_interval_s < self._sleeps_s
            if starts:
                crew.run(self._look_out)
            elif wakes:
                self._wake.set()
        except BaseException as error:
            self._is_there = self._is_there and not starts
            # Without a thread the call goes on alone; the next one tries again.
            if not isinstance(error, RuntimeError):
                raise

    def leave(self, relief: Relief) -> None:
        with self._lock:
            self._watched.discard(relief)

    def _look_out(self) -> None:
        """Look at everybody until nobody has been there for a while. The body of the crew's thread."""
        try:
            self._look_until_alone()
        except BaseException:
            # Not where it left by itself: by then another may be there.
            self._is_there = False
            raise

    def _look_until_alone(self) -> None:
        last_seen = time.perf_counter()
        while True:
            with self._lock:
                self._sleeps_s = min((caller.look_interval_s for caller in self._watched), default=_SELDOM_S)
            self._wake.wait(self._sleeps_s)
            self._wake.clear()
            with self._lock:
                watched = list(self._watched)
                if not watched and time.perf_counter() - last_seen > _STAYS_S:
                    self._is_there = False
                    return
            if watched:
                last_seen = time.perf_counter()
            # Between two looks nothing of a call is held.
            while watched:
                with contextlib.suppress(RuntimeError):  # no thread can be started now
                    watched.pop().look()


def _forget_in_child() -> None:
    # A forked child has no lookout, whatever its parent's knows, and perhaps a lock that nobody will let go.
    _Lookout._of_process, _Lookout._class_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
