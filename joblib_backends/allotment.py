"""What a batch gets when it starts: its share of the cores as things are then, and whether there is memory for it."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

from .batches import Batch, BatchQueue
from .budget import Share, available_cores, cores_for_batch, cores_per_task
from .config import Config
from .memory import LOOK_AGAIN_S, MemoryWatch
from .tiers import Tier

__all__ = ["Allotment"]

#: Seconds of a call before it looks at memory, which takes 30 µs: short calls need not.
_NO_LOOK_AT_MEMORY_S: Final = 0.1


class Allotment:
    """The cores and the memory of one call. Thread-safe: what two threads race for is equal.

    Parameters
    ----------
    config : Config
        Of the call.
    n_jobs : int
        Batches that may run at once.
    queue : BatchQueue
        What waits and runs.
    look_again : weakref.WeakMethod
        Called in a thread of its own some time after memory was short, if the call is still there.
    """

    def __init__(
        self, config: Config, n_jobs: int, queue: BatchQueue, look_again: weakref.WeakMethod[Callable[[], object]]
    ) -> None:
        self._config = config
        self._queue = queue
        self._look_again = look_again
        self._is_looking = False
        # Of the task that makes this call, if it is a nested one: other threads do not know it.
        self._cores = available_cores(config)
        self._shares: dict[tuple[str, int], Share] = {}
        self._opened = time.perf_counter()
        #: Batches that may run at once.
        self.n_jobs = n_jobs

    def __repr__(self) -> str:
        return f"<Allotment of {self._cores} cores to {self.n_jobs} jobs>"

    @property
    def n_local_jobs(self) -> int:
        """Batches that may run at once on this machine."""
        return min(self.n_jobs, self._cores)

    def share_for(self, batch: Batch, tier: Tier, task_s: float, *, more_to_come: bool) -> Share:
        """Return what a batch may use that starts now; ``task_s`` is what a task is expected to take, 0 if unknown."""
        cores = self._cores_for(batch, tier.n_slots or self._cores, task_s, more_to_come)
        # Kept: to look into the environment for each batch takes 8 µs.
        share = self._shares.get((tier.name, cores))
        if share is None:
            share = self._shares[tier.name, cores] = tier.share(self._config, cores)
        return share

    def _cores_for(self, batch: Batch, cores: int, task_s: float, more_to_come: bool) -> int:
        if more_to_come or len(self._queue) >= self.n_jobs:
            # Every job will have something to run.
            return cores_per_task(cores, self.n_jobs)
        left = self._queue.parts_left(batch, task_s)
        return cores_for_batch(cores, self.n_jobs, left, len(self._queue), more_to_come=more_to_come)

    def has_memory(self) -> bool:
        """Return whether there is memory for a batch more beside those that run here; if not, it is asked again."""
        if not self._queue.is_running or time.perf_counter() - self._opened < _NO_LOOK_AT_MEMORY_S:
            return True
        if self._queue.runs_on("dask") or MemoryWatch.shared().allows_another():
            return True
        if not self._is_looking:
            self._is_looking = True
            timer = threading.Timer(LOOK_AGAIN_S, self._look)
            timer.name = "joblib_backends-memory-is-short"
            timer.daemon = True
            timer.start()
        return False

    def _look(self) -> None:
        self._is_looking = False
        look_again = self._look_again()
        if look_again is not None:
            look_again()
