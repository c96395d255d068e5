"""The first batches of a list: held back until it is known among how many the cores are to be shared.

A search whose candidates have steps in common is held until all of it is known, or what can be had of it in a moment:
then tasks that need the same run one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from .batches import Batch

__all__ = ["Opening"]

#: Seconds for which the first batches are held back at most, while the user's generator yields.
_HOLD_S: Final = 0.002

#: Seconds, and tasks, that are spent at most on taking the tasks of a search from its generator before any starts; and
#: tasks per job if nothing is known of them: joblib makes batches of one then, too slow for thousands of short ones.
_GATHER_S: Final = 0.25
_GATHER_TASKS: Final = 20_000
_GATHER_UNKNOWN: Final = 64


class Opening:
    """What is held back, and for how long. In the caller's thread.

    Parameters
    ----------
    n_jobs : int
        Batches that may run at once.
    is_held : bool
        Whether the call holds anything back at all.
    """

    def __init__(self, n_jobs: int, *, is_held: bool) -> None:
        self._n_jobs = n_jobs
        self._gathered: list[Batch] = []
        self._since = 0.0
        #: Whether nothing may start yet.
        self.is_held = is_held

    def __repr__(self) -> str:
        return f"<Opening {len(self._gathered)} gathered{', held' if self.is_held else ''}>"

    def is_due(self, n_waiting: int) -> bool:
        """Return whether there is a batch for each job, or the user's generator is slow to yield the next."""
        return n_waiting >= self._n_jobs or self._seconds() > _HOLD_S

    def gather(self, batch: Batch, n_tasks: int) -> bool:
        """Hold a batch of a search, one of ``n_tasks`` tasks so far; return whether that took long enough."""
        self._gathered.append(batch)
        return n_tasks >= _GATHER_TASKS or self._seconds() > _GATHER_S

    def take_rest(self, n_tasks: Callable[[], int], take_more: Callable[[], bool], *, is_known: bool) -> None:
        """Take the tasks of a search from its generator, so that it is known which of them share what."""
        limit = _GATHER_TASKS if is_known else _GATHER_UNKNOWN * self._n_jobs
        end = time.perf_counter() + _GATHER_S
        while time.perf_counter() < end and n_tasks() < limit and take_more():
            pass

    def release(self) -> list[Batch]:
        """Hold nothing any more; return the batches of a search that were held."""
        gathered, self._gathered = self._gathered, []
        self.is_held = False
        return gathered

    def _seconds(self) -> float:
        now = time.perf_counter()
        self._since = self._since or now
        return now - self._since
