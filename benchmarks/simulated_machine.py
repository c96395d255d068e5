"""What is simulated of a machine, for ``simulation.py``: tasks, cores that they share, the calling process's GIL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from joblib_backends.planner import _MAPPED_PER_S

#: joblib's own time for each task, in a plain loop as elsewhere (README.md, "single-tasks").
JOBLIB_TASK_S: Final = 1.5e-6

_DONE_S: Final = 1e-10


class Task(NamedTuple):
    """Seconds of a task that ran alone, with one thread per numerical library."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Kind:
    """A recorded call: its tasks, and what the backend can know of them."""

    name: str
    tasks: tuple[Task, ...]
    trusted: bool = False
    require: str | None = None
    nbytes: int = 0
    #: Part of its time for which a task holds the GIL.
    gil_share: float = 1.0
    #: Part of its time that threads inside a task divide among them.
    parallel_fraction: float = 0.0

    def stretch(self, threads: int) -> float:
        """Return the time of a task with ``threads`` of its own, against one."""
        return 1.0 - self.parallel_fraction + self.parallel_fraction / max(1, threads)

    def loop_seconds(self, cores: int) -> float:
        """Return the seconds of a plain loop, in which threads inside a task have all cores."""
        return sum(task.wall_s for task in self.tasks) * self.stretch(cores) + JOBLIB_TASK_S * len(self.tasks)

    def limit_seconds(self, cores: int) -> float:
        """Return what no scheduler beats: all CPU work over the cores, or the longest task."""
        longest = max(task.wall_s for task in self.tasks) * self.stretch(cores)
        return max(longest, sum(task.cpu_s for task in self.tasks) / cores)


@dataclass(eq=False)
class Batch:
    """Tasks that run one after the other; once it is on a tier, how long it runs there if nothing holds it up."""

    tasks: tuple[Task, ...]
    tier: str = ""
    started_s: float = 0.0
    began_s: float = 0.0
    ended_s: float = 0.0
    left_s: float = 0.0
    cpu_s: float = 0.0
    #: Part of the time that it computes, cores that it then uses, part for which it needs the parent's GIL.
    computes: float = 1.0
    cores: float = 1.0
    gil: float = 0.0
    delay_s: float = 0.0

    def settle(self, kind: Kind, threads: int) -> None:
        """Find out how it is going to run on its tier with so many threads of its own."""
        wall_s, cpu_s = sum(task.wall_s for task in self.tasks), sum(task.cpu_s for task in self.tasks)
        stretch = kind.stretch(threads)
        mapping_s = len(self.tasks) * kind.nbytes / _MAPPED_PER_S if self.tier == "processes" else 0.0
        self.left_s = wall_s * stretch + mapping_s
        self.computes = min(1.0, cpu_s / wall_s) if wall_s > 0 else 1.0
        self.cores = self.computes / stretch
        # A thread's clock does not see the threads that OpenMP starts, a process's does.
        self.cpu_s = cpu_s + mapping_s if self.tier == "processes" else cpu_s * stretch
        self.gil = 0.0 if self.tier == "processes" else min(1.0, kind.gil_share / stretch)


class Machine:
    """Cores, shared equally, and the GIL of the calling process."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self.now = 0.0
        self.running: list[Batch] = []

    def _slowness(self) -> tuple[float, float]:
        """Return how much longer computing takes for who needs the GIL, and for everyone, as things are now."""
        gil = max(1.0, sum(batch.gil for batch in self.running))
        wanted = sum(batch.cores / (gil if batch.gil else 1.0) for batch in self.running)
        return gil, max(1.0, wanted / self.cores)

    def next_end(self) -> float:
        """Return when the first batch ends."""
        gil, busy = self._slowness()
        return min((self.now + batch.left_s * _pace(batch, gil, busy) for batch in self.running), default=math.inf)

    def advance(self, until: float) -> list[Batch]:
        """Let the time pass and return the batches that ended."""
        gil, busy = self._slowness()
        passed, self.now = until - self.now, until
        for batch in self.running:
            ran_s = passed / _pace(batch, gil, busy)
            batch.left_s -= ran_s
            batch.delay_s += ran_s * batch.computes * (gil if batch.gil else 1.0) * (busy - 1.0)
        ended = [batch for batch in self.running if batch.left_s <= _DONE_S]
        self.running = [batch for batch in self.running if batch.left_s > _DONE_S]
        return ended


def _pace(batch: Batch, gil: float, busy: float) -> float:
    """Return the seconds that one second of a batch takes."""
    return 1.0 - batch.computes + batch.computes * (gil if batch.gil else 1.0) * busy
