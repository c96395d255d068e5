"""Somebody who does the caller's part while it runs a batch itself and that takes long.

Where work is small the calling thread runs it, and nothing is handed over. But then nobody completes what others have
done, starts what waits, or asks whether another tier pays, if one batch turns out to be long, to wait for its
neighbours, or never to end. So a thread of the crew looks up, a few milliseconds apart, and helps out until the caller
is back.

Thread-safe: the caller writes what it does, the crew's thread reads it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from .crew import Crew

__all__ = ["Relief"]

#: Seconds after which a batch in the calling thread takes long: moving the rest elsewhere costs less than this.
_PATIENCE_S: Final = 0.002

#: Seconds between two looks while the caller runs one short batch after the other: from the first, up to the last.
#: Each takes the interpreter lock from the caller for a moment, 50 µs of a call that may take a few milliseconds.
_FIRST_LOOK_S: Final = 0.005
_LAST_LOOK_S: Final = 0.02

#: Seconds between two looks while the caller is in a long batch and nothing may be completed beside it.
_NEXT_LOOK_S: Final = 0.002


class Relief:
    """Stands by for the thread that makes one call.

    Parameters
    ----------
    crew : Crew
        Lends the thread, once the caller runs its first batch and until the call ends.
    help_out : callable
        Called with whether batches may be completed meanwhile; does one thing that is due, or waits for it for a
        moment.
    """

    def __init__(self, crew: Crew, help_out: Callable[[bool], object]) -> None:
        self._crew = crew
        self._help_out: Callable[[bool], object] | None = help_out
        self._is_over = threading.Event()
        self._runs = False
        self._busy_since: float | None = None
        self._n_tasks = 1
        self._may_complete = False

    def __repr__(self) -> str:
        return f"<Relief {'on duty' if self.is_on_duty else 'standing by'}>"

    @property
    def is_on_duty(self) -> bool:
        """Whether the caller is in a batch now."""
        return self._busy_since is not None

    @property
    def running(self) -> tuple[float, int]:
        """The seconds for which the caller has been in a batch that takes long, and its tasks; else zeros."""
        since = self._busy_since
        seconds = 0.0 if since is None else time.perf_counter() - since
        return (seconds, self._n_tasks) if seconds > _PATIENCE_S else (0.0, 0)

    @contextmanager
    def standing_by(self, n_tasks: int, *, may_complete: bool) -> Iterator[None]:
        """Note that the caller runs a batch of ``n_tasks`` inside the block."""
        self._n_tasks, self._may_complete = n_tasks, may_complete
        self._busy_since = time.perf_counter()
        if not self._runs:
            self._runs = True
            self._crew.run(self._look_after)
        try:
            yield
        finally:
            self._busy_since = None

    def end(self) -> None:
        """Let the thread go."""
        self._is_over.set()
        # The call holds this object and is held by its method.
        self._help_out = None

    def _look_after(self) -> None:
        """Look up until the call ends. The body of the crew's thread."""
        pause = _FIRST_LOOK_S
        while not self._is_over.wait(pause):
            pause = min(_LAST_LOOK_S, 2 * pause)
            help_out = self._help_out
            while help_out is not None and self.running[1]:
                help_out(self._may_complete)
                if not self._may_complete and self._is_over.wait(_NEXT_LOOK_S):
                    return
                help_out = self._help_out
            # Between two looks nothing of the call is held.
            del help_out
