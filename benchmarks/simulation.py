"""A small discrete-event simulation of one ``Parallel`` call on any number of cores; no clock, no chance.

**Real:** every decision (:class:`CallPlanner`), batch size (``CallPlanner.batch_size``), share of cores
(:func:`cores_for_batch`) and price (the planner's own tables), asked where ``pilot.py`` and ``scheduler.py`` ask.

**Simulated:** joblib's pre-dispatch and slices; cores that all who are ready share equally; the GIL (running threads
that need it for a share g each slow down by the sum of the shares, where that is above 1); OpenMP inside a task, by
Amdahl's law; handing over, which the parent does one batch at a time; placing the data once, mapping it in each task
on a process; worker processes that are all there some seconds after they were asked for; the thread that looks after
a caller who runs a long batch himself.

**Not simulated:** memory bandwidth and caches, hyper-threads, NUMA, clock rates that sink with load, what starting
workers takes from the others, results on their way back, noise, what earlier calls lost without workers; joblib's own
time for each task is a constant. So times are too good, most of all for sums over a large array on many cores. The
prices of a decision are the planner's own: a wrong price in its table shows in ``benchmarks/run.py``, not here.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Final

from simulated_machine import JOBLIB_TASK_S, Batch, Kind, Machine, Task

from joblib_backends.budget import cores_for_batch
from joblib_backends.experience import BatchSeen, Experience
from joblib_backends.pilot import _DECIDE_EVERY_S, _SEEN_ONE_BY_ONE
from joblib_backends.planner import _COSTS, _PLACED_PER_S, CallPlanner, Progress, Readiness
from joblib_backends.rules import Facts, Plan

#: Seconds from asking for process workers until they are there (benchmarks/workers.py).
STARTUP_S: Final = 2.0

#: Seconds that the caller may run a batch before somebody completes others, looks after the rest, and between two
#: looks (relief.py).
_PATIENCE_S: Final = 0.002
_FIRST_LOOK_S: Final = 0.005
_LOOK_EVERY_S: Final = 0.01


@dataclass(frozen=True)
class Setting:
    """Where a call is replayed."""

    cores: int
    #: Whether worker processes and the data are there already.
    is_warm: bool
    startup_s: float = STARTUP_S


@dataclass(frozen=True)
class Replayed:
    """What came of a call."""

    seconds: float
    #: Tasks that ran on each tier.
    n_tasks: dict[str, int]
    experience: Experience | None


class _Joblib:
    """The user's generator, cut into batches as ``Parallel.dispatch_one_batch`` does."""

    def __init__(self, tasks: tuple[Task, ...], n_jobs: int) -> None:
        self._tasks, self._n_jobs = tasks, n_jobs
        self._ready: deque[tuple[Task, ...]] = deque()
        self._n_taken = self.n_dispatched = 0
        self.is_exhausted = False

    @property
    def n_first(self) -> int:
        """The tasks that joblib takes before it waits for results."""
        return 2 * self._n_jobs

    def next_batch(self, size: int, n_jobs: int, *, is_first_slice: bool) -> Batch | None:
        """Return the next batch, or None if the generator, or its first slice, has no more."""
        if not self._ready:
            end = min(self._n_taken + size * n_jobs, self.n_first if is_first_slice else len(self._tasks))
            taken, self._n_taken = self._tasks[self._n_taken : end], max(end, self._n_taken)
            is_last = not is_first_slice and len(taken) < size * n_jobs
            final = max(1, len(taken) // ((10 if is_last else 1) * n_jobs))
            self._ready.extend(taken[i : i + final] for i in range(0, len(taken), final))
        if not self._ready:
            self.is_exhausted = self.is_exhausted or not is_first_slice
            return None
        batch = Batch(self._ready.popleft())
        self.n_dispatched += len(batch.tasks)
        return batch


class _Call:
    """Scheduler and pilot of one call, in simulated time."""

    def __init__(self, kind: Kind, setting: Setting, tier: str, known: Experience | None) -> None:
        self._kind, self._setting = kind, setting
        n_jobs = setting.cores
        facts = Facts(tier, require=kind.require, trusted_on_threads=kind.trusted, n_jobs=n_jobs, cores=n_jobs)
        self._planner = CallPlanner(facts, known, kind.nbytes)
        self._plan: Plan = self._planner.plan
        self._guards = not self._planner.is_fixed and not kind.trusted and kind.require is None
        self._joblib = _Joblib(kind.tasks, n_jobs)
        self._machine = Machine(setting.cores)
        self._waiting: deque[Batch] = deque()
        self._in_flight: list[Batch] = []
        self._arriving: list[tuple[float, int, Batch]] = []
        self._queued: deque[Batch] = deque()
        self._ended: deque[Batch] = deque()
        self._inline: Batch | None = None
        self._look_s = math.inf
        self._workers_s = 0.0 if setting.is_warm else math.inf
        self._opened: set[str] = set()
        self._parent_free_s = 0.0
        self._caller_came = False
        self._n_pending = self._n_seen = self._n_started = 0
        self._decided_s = self._task_s = self._newly_busy_s = 0.0
        self._draws_apart = False
        self._counts: Counter[str] = Counter()

    def run(self) -> Replayed:
        """Return what comes of the call."""
        while self._dispatch(is_first_slice=True):
            pass
        self._caller_came = True
        while self._n_pending:
            # As in the scheduler: what has ended is completed before the caller runs another batch itself.
            if not self._complete_one():
                self._feed()
                self._pass_time()
        return Replayed(self._machine.now, dict(self._counts), self._planner.experience())

    # ---- joblib and the pilot

    def _dispatch(self, *, is_first_slice: bool) -> bool:
        # Before the first batch was met, the pilot does not know of what kind its tasks are.
        size = self._planner.batch_size(self._progress()) if self._joblib.n_dispatched else 1
        n_jobs = 1 if self._joblib.n_dispatched and self._plan.tier == "inline" else self._setting.cores
        batch = self._joblib.next_batch(size, n_jobs, is_first_slice=is_first_slice)
        if batch is None:
            return False
        self._n_pending += len(batch.tasks)
        if self._joblib.n_dispatched == len(batch.tasks):
            self._decide()
        batch.tier = self._plan.tier
        self._waiting.append(batch)
        return True

    def _more_to_come(self) -> bool:
        if self._joblib.is_exhausted:
            return False
        return not self._caller_came or self._joblib.n_dispatched >= self._joblib.n_first

    def _progress(self, running_s: float = 0.0, n_running: int = 1) -> Progress:
        return Progress(self._n_pending, self._more_to_come(), None, self._machine.now, running_s, n_running)

    def _replan(self, running_s: float = 0.0, n_running: int = 1) -> None:
        is_early = self._n_seen <= _SEEN_ONE_BY_ONE
        is_open = not self._planner.is_fixed and (self._n_pending or self._more_to_come())
        if is_open and (is_early or self._machine.now - self._decided_s >= _DECIDE_EVERY_S):
            self._decide(running_s, n_running)
            for batch in self._waiting:
                batch.tier = self._plan.tier

    def _decide(self, running_s: float = 0.0, n_running: int = 1) -> None:
        now = self._machine.now
        self._decided_s = now
        n_ready = self._setting.cores if now >= self._workers_s else 0
        self._plan = self._planner.decide(
            self._progress(running_s, n_running), Readiness(n_ready, self._setting.startup_s)
        )
        if self._plan.start_workers:
            self._start_workers()

    def _start_workers(self) -> None:
        if self._workers_s == math.inf:
            self._workers_s = self._machine.now + self._setting.startup_s

    def _complete_one(self) -> bool:
        """Complete the next batch that has ended, if somebody is there to do it."""
        is_relieved = not self._draws_apart and self._inline is not None and self._inline_s() > _PATIENCE_S
        if not self._ended or not (self._inline is None or is_relieved):
            return False
        batch = self._ended.popleft()
        n_tasks, wall_s = len(batch.tasks), batch.ended_s - batch.began_s
        self._n_pending -= n_tasks
        self._n_seen += 1
        self._counts[batch.tier] += n_tasks
        self._task_s = wall_s / n_tasks
        times = (wall_s, batch.cpu_s, batch.delay_s, self._newly_busy_s)
        n_together = min(len(self._in_flight) + 1, self._setting.cores)
        self._planner.observe(BatchSeen(batch.tier, n_tasks, *times, n_together))
        self._newly_busy_s = 0.0
        self._dispatch(is_first_slice=False)
        self._replan()
        return True

    # ---- the scheduler

    def _inline_s(self) -> float:
        return self._machine.now - self._inline.began_s if self._inline is not None else 0.0

    def _feed(self) -> None:
        """Start what may start."""
        while self._waiting:
            runs_here = self._waiting[0].tier == "inline"
            # Nothing is handed over ahead before the first result.
            waits_to_see = not self._planner.is_fixed and self._n_seen == 0
            ahead = 0 if runs_here or waits_to_see else self._setting.cores
            if len(self._in_flight) >= self._setting.cores + ahead or (runs_here and self._inline is not None):
                return
            self._start(self._waiting.popleft())

    def _start(self, batch: Batch) -> None:
        """Hand a batch over, which keeps the parent busy; it runs when it is there and has a slot."""
        batch.started_s = self._machine.now
        cost, n_tasks = _COSTS[batch.tier], len(batch.tasks)
        there_s = max(self._machine.now, self._parent_free_s) + cost.batch_s + n_tasks * (cost.task_s + JOBLIB_TASK_S)
        if batch.tier not in self._opened:
            self._opened.add(batch.tier)
            there_s += cost.call_s + self._opening_s(batch.tier)
        self._parent_free_s = batch.began_s = there_s
        batch.settle(self._kind, self._threads_for(batch))
        self._in_flight.append(batch)
        if batch.tier == "inline":
            self._inline, self._look_s = batch, there_s + _FIRST_LOOK_S
            self._draws_apart = self._guards and self._more_to_come()
        self._n_started += 1
        heappush(self._arriving, (max(there_s, self._there_at(batch.tier)), self._n_started, batch))

    def _opening_s(self, tier: str) -> float:
        if tier != "processes":
            return 0.0
        self._start_workers()
        return 0.0 if self._setting.is_warm else self._kind.nbytes / _PLACED_PER_S

    def _there_at(self, tier: str) -> float:
        return self._workers_s if tier == "processes" else 0.0

    def _threads_for(self, batch: Batch) -> int:
        now, expected_s, cores = self._machine.now, self._task_s, self._setting.cores
        left = [
            1.0 - (now - other.started_s) / (expected_s * len(other.tasks)) if expected_s else 1.0
            for other in self._in_flight
        ]
        return cores_for_batch(cores, cores, left, len(self._waiting), more_to_come=self._more_to_come())

    def _pass_time(self) -> None:
        """Go to the next event: a batch arrives or ends, or somebody looks after the rest."""
        arrives_s = self._arriving[0][0] if self._arriving else math.inf
        looks_s = self._look_s if self._inline is not None else math.inf
        until_s = min(arrives_s, self._machine.next_end(), looks_s)
        self._newly_busy_s += until_s - self._machine.now if self._in_flight else 0.0
        self._end(self._machine.advance(until_s))
        while self._arriving and self._arriving[0][0] <= self._machine.now:
            self._queued.append(heappop(self._arriving)[2])
        self._begin()
        if self._inline is not None and self._machine.now >= self._look_s:
            self._look_s = self._machine.now + _LOOK_EVERY_S
            if self._inline in self._machine.running:
                self._replan(self._inline_s(), len(self._inline.tasks))

    def _begin(self) -> None:
        """Run the batches that are there, as many at once on a tier as there are jobs."""
        slots = Counter(dict.fromkeys(self._opened, self._setting.cores))
        slots.subtract(batch.tier for batch in self._machine.running)
        for batch in tuple(self._queued):
            if slots[batch.tier] > 0:
                slots[batch.tier] -= 1
                self._queued.remove(batch)
                batch.began_s = self._machine.now
                self._machine.running.append(batch)

    def _end(self, batches: list[Batch]) -> None:
        for batch in batches:
            batch.ended_s = self._machine.now
            self._in_flight.remove(batch)
            self._ended.append(batch)
            if batch is self._inline:
                self._inline = None


def replay(kind: Kind, setting: Setting, tier: str = "auto", known: Experience | None = None) -> Replayed:
    """Return what comes of a call of ``kind`` on a tier, or on those that the planner chooses."""
    return _Call(kind, setting, tier, known).run()


def repeated(kind: Kind, times: int) -> Kind:
    """Return a call with the same tasks so many times."""
    return replace(kind, tasks=kind.tasks * times)
