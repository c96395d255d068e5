"""What is done and waits to be finished, and who does that: the caller, or a thread of the crew.

Tiers fill the queue from threads of theirs; the completer takes out one after the other and does what runs code of
joblib and of the user.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Final

from .batches import Batch
from .crew import Crew
from .worker import Outcome

__all__ = ["LOOK_INTERVAL_S", "Completer", "GetOutcome"]

#: Seconds after which a waiting consumer of a generator looks for itself. A batch is done when joblib's callback has
#: counted it, which saves joblib's own 10 ms poll; but the callback advances the user's generator too, and one that
#: takes longer to yield, or waits for the very result, must not hold the result back.
LOOK_INTERVAL_S: Final = 0.010

GetOutcome = Callable[[], Outcome]
Finish = Callable[[Batch, GetOutcome], None]


class Completer:
    """The queue of what is done. Thread-safe.

    Parameters
    ----------
    crew : Crew
        Where the completer's thread comes from.
    finish : weakref.WeakMethod
        Finishes one batch. Weak, because the call has the completer: a cycle would keep the data that was placed for
        the call in its files until the garbage collector comes.
    is_caller : bool
        Whether the calling thread, which waits anyway, is the completer; else a thread starts with the first batch.
    """

    def __init__(self, crew: Crew, finish: weakref.WeakMethod[Finish], *, is_caller: bool) -> None:
        self._crew = crew
        self._finish = finish
        self._lock = threading.Lock()
        self._has_thread = is_caller
        self._done: queue.SimpleQueue[tuple[Batch, GetOutcome] | None] = queue.SimpleQueue()

    def __repr__(self) -> str:
        return f"<Completer {self._done.qsize()} done>"

    def put(self, batch: Batch, get_outcome: GetOutcome) -> None:
        """Leave a batch that is done. Raises what starting a thread raises; then nobody would finish anything."""
        if not self._has_thread:
            self._start()
        self._done.put((batch, get_outcome))

    def wake(self) -> None:
        """Have whoever waits for something to finish look for other things to do; a thread ends."""
        self._done.put(None)

    def finish_next(self, wait_s: float | None) -> bool:
        """Finish the next batch that is done, after at most ``wait_s`` seconds; return whether something came."""
        try:
            item = self._done.get(timeout=wait_s) if wait_s != 0.0 else self._done.get_nowait()
        except queue.Empty:
            return False
        if item is not None:
            self._finish_one(*item)
        return True

    def _finish_one(self, batch: Batch, get_outcome: GetOutcome) -> None:
        finish = self._finish()
        if finish is not None:
            finish(batch, get_outcome)

    def _start(self) -> None:
        with self._lock:
            starts, self._has_thread = not self._has_thread, True
        if not starts:
            return
        try:
            self._crew.run(self._finish_all)
        except BaseException:
            self._has_thread = False
            raise

    def _finish_all(self) -> None:
        """Finish batches until the call ends. The body of the crew's thread."""
        while (item := self._done.get()) is not None:
            self._finish_one(*item)
            # An idle thread must not keep the last batch's data alive.
            del item
