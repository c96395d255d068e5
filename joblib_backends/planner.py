"""Which tier the batches of a call run on, and why: facts and observations in, decision and reason out.

No clock, no I/O, no process: every number comes in as an argument. First what is *allowed* (``rules.py``), then what is
*cheapest*, in here.

The cost of finishing a call on a tier, in seconds::

    tasks left x task there / tasks that run at once there                  the work
    + batches left x cost of handing one over                               dispatch
    + bytes to place                                                        data, processes only
    + what it costs to get going there                                      call

Where a tier was used, in this call or an earlier one of the same kind, all of this was measured at once, as the pace at
which tasks got done; only for a tier that was never tried it is derived from the time of a task that runs alone.
Workers that are not there yet are started when what calls lost without them, or are going to lose, is more than what
their start costs those that work meanwhile; they are used when they are there.

How much is left is known if the call has a length or the kind of task was seen before. If not, as much again as was
done: whoever waits at most as long as it has worked pays at most twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .experience import BatchSeen, Experience, TierSeen, solo_seconds
from .rules import Facts, Plan, allowed_tiers, choose_tier

__all__ = ["CallPlanner", "Progress", "Readiness"]


@dataclass(frozen=True)
class Progress:
    """Where a call is.

    Parameters
    ----------
    n_pending : int
        Tasks that were submitted and are not finished.
    more_to_come : bool
        Whether the user's generator has not ended.
    n_tasks : int or None
        Tasks of the whole call where it has a length.
    elapsed_s : float
        Seconds since its first task was submitted.
    running_s : float
        Seconds for which the calling thread has been running a batch that takes long, else 0.
    n_running : int
        Tasks of that batch.
    cores_used : float
        Cores that this process has been using of late.
    """

    n_pending: int = 0
    more_to_come: bool = True
    n_tasks: int | None = None
    elapsed_s: float = 0.0
    running_s: float = 0.0
    n_running: int = 1
    cores_used: float = 1.0


@dataclass(frozen=True)
class Readiness:
    """What is there to run tasks on.

    Parameters
    ----------
    n_ready : int
        Process workers that are there.
    startup_s : float
        Seconds that their start takes.
    missed_s : float
        Seconds that calls before this one lost without them.
    threads_s : float
        Seconds that go by before a first batch can run on threads.
    """

    n_ready: int = 0
    startup_s: float = 1.0
    missed_s: float = 0.0
    threads_s: float = 0.0


@dataclass(frozen=True)
class _Cost:
    """What a tier costs in the parent, in seconds: a call, a batch, a task (benchmarks, suite "calls")."""

    call_s: float
    batch_s: float
    #: Time of each task that no two of them spend at once: pickling it, or holding the GIL around what releases it.
    task_s: float
    #: A batch should run for so long, or handing it over is felt: fifty times its cost.
    batch_runs_s: float


_COSTS: Final = {
    "inline": _Cost(0.0, 30e-6, 0.0, 5e-3),
    "threads": _Cost(250e-6, 60e-6, 20e-6, 5e-3),
    "processes": _Cost(800e-6, 200e-6, 5e-6, 20e-3),
    "dask": _Cost(15e-3, 2e-3, 10e-6, 0.2),
}
_UNKNOWN_COST: Final = _COSTS["dask"]

#: Seconds for each job by which a batch on a cluster should last: the scheduler gives away some 1,200
#: batches a second, however many workers there are (benchmarks/cluster_size.py).
_SCHEDULED_S: Final = 1e-3

#: Another tier must promise to finish in this part of the time to be worth a move.
_WORTH_A_MOVE: Final = 0.87

#: What a task is thought to cost on a tier that was never tried, against running alone, before any measurement.
_FIRST_GUESS: Final = {"threads": 1.1, "processes": 1.05}

#: Bytes a second at which large buffers are hashed and copied to shared memory (benchmarks, row "search-twice"), and at
#: which a worker faults a fresh mapping in.
_PLACED_PER_S: Final = 1.2e9
_MAPPED_PER_S: Final = 5e9

#: What a worker start on an idle core costs those that work meanwhile, as a part of what it takes: the first worker's
#: imports use memory and the disk. Measured on 2 cores with scikit-learn: a loop of 0.26 s took 0.12 s longer.
_START_COSTS: Final = 0.1

#: Seconds that a tier must have been busy before its pace counts: the first few tasks come one by one.
_HAS_A_PACE_S: Final = 0.01

#: Times its usual length after which a batch of the calling thread is one that takes long.
_LONG: Final = 2.0

#: Cores used by a task, and part of all cores, from which others are kept from it.
_SEVERAL_CORES: Final = 1.3
_MOST_CORES: Final = 0.6

#: Seconds after which a task of a new kind has shown whether it has threads of its own.
_SHOWS_ITS_THREADS_S: Final = 0.05

#: Worker starts that a long task of the calling thread may outlast before the others are sent to workers that are not
#: there: by then something is wrong, and only a worker that fails to start can say what.
_OVERDUE: Final = 10

#: Seconds around the one task of a batch that count as its own: the first of tiny tasks seem longer than they are.
_ROUND_A_TASK_S: Final = 5e-6

#: How much larger a batch may be than the largest before it: task times are not known to be even.
_GROWTH: Final = {"inline": 8}
_GROWTH_ELSEWHERE: Final = 4

#: Parts into which the rest of a call is cut per job, so that no straggler holds the end up.
_PARTS_PER_JOB: Final = 4


class CallPlanner:
    """Decides for one call, again and again while it runs.

    Parameters
    ----------
    facts : Facts
        Of the call.
    known : Experience, optional
        What earlier calls of this kind of task showed.
    nbytes : int, default=0
        Bytes of the large arrays among the arguments of a task.

    Notes
    -----
    Not thread-safe: its owner calls it under one lock.
    """

    def __init__(self, facts: Facts, known: Experience | None = None, nbytes: int = 0) -> None:
        self._facts = facts
        self._allowed = allowed_tiers(facts)
        self._known = known
        self._nbytes = nbytes
        self._seen: dict[str, TierSeen] = {}
        self._n_done = 0
        self._largest_batch = 1
        self.plan = choose_tier(facts)

    def __repr__(self) -> str:
        return f"<CallPlanner {self.plan.tier}, {self._n_done} tasks seen>"

    @property
    def allowed(self) -> tuple[str, ...]:
        """The tiers among which cost decides."""
        return self._allowed

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to decide."""
        return len(self._allowed) == 1

    def restrict(self, facts: Facts) -> None:
        """Go on with other facts, which allow less."""
        self._facts, self._allowed = facts, allowed_tiers(facts)
        if self.plan.tier not in self._allowed:
            self.plan = self._begin()

    def observe(self, batch: BatchSeen) -> None:
        """Take in what a finished batch showed."""
        self._seen.setdefault(batch.tier, TierSeen()).add(batch)
        self._n_done += batch.n_tasks
        self._largest_batch = max(self._largest_batch, batch.n_tasks)

    def experience(self) -> Experience | None:
        """Return what this call taught, or None if it saw nothing."""
        solo_s = solo_seconds(self._seen)
        if solo_s is None:
            return None
        return Experience(
            solo_s,
            self._n_done,
            {name: seen.task_s for name, seen in self._seen.items()},
            {name: min(1.0, seen.efficiency) for name, seen in self._seen.items()},
            # A tier that had only a part of the call shows no pace of its own.
            {
                name: seen.pace_s(self._facts.n_jobs)
                for name, seen in self._seen.items()
                if seen.n_paced > 0.9 * self._n_done
            },
        )

    # ---- the decision

    def decide(self, progress: Progress, workers: Readiness) -> Plan:
        """Return the plan for the batches from now on."""
        if not self.is_fixed and not self._needs_the_cores(progress):
            solo_s = self._solo_seconds(progress)
            self.plan = self._begin() if solo_s is None else self._cheapest(solo_s, progress, workers)
        return self.plan

    def _needs_the_cores(self, progress: Progress) -> bool:
        """Return whether the calling thread is in a task that uses the cores by itself, or that may be about to.

        Its threads wait for each other again and again, and wait long for one that others keep from its core: with a
        second fold beside it the first of a boosting on two cores took up to four times as long. What begins with one
        thread and goes on with many is seen after a while only.
        """
        if self.plan.tier != "inline" or not progress.running_s:
            return False
        if self._facts.is_nested and self._facts.wants_cluster:
            return False  # the process is a Dask worker's, and what it uses may be another task's
        is_new = self._known is None and not self._seen and progress.running_s < _SHOWS_ITS_THREADS_S
        return is_new or progress.cores_used > max(_SEVERAL_CORES, _MOST_CORES * self._facts.cores)

    def _begin(self) -> Plan:
        """Return the plan while nothing is known: what is allowed, safe, and costs nothing to start."""
        # A call in a task, of which there may be thousands, first shows that it is worth the way to the cluster.
        goes_there = self._facts.wants_cluster and not self._facts.is_nested
        if goes_there or "inline" not in self._allowed:
            return choose_tier(self._facts)
        return Plan("inline", "nothing was known of its tasks, so the calling thread began with them")

    def _cheapest(self, solo_s: float, progress: Progress, workers: Readiness) -> Plan:
        n_left = self._n_left(progress)
        costs = {tier: self._seconds_on(tier, solo_s, n_left) for tier in self._allowed}
        if "threads" in costs and "threads" not in self._seen:
            costs["threads"] += workers.threads_s
        are_overdue = progress.running_s > _OVERDUE * workers.startup_s
        usable = {tier: cost for tier, cost in costs.items() if tier != "processes" or workers.n_ready or are_overdue}
        if progress.running_s > _LONG * progress.n_running * self._usual_seconds() and len(usable) > 1:
            # The calling thread is in a long task: it is not there for others, which it may even be waiting for.
            usable.pop("inline", None)
        best = min(usable, key=lambda tier: usable[tier])
        if self._seen and self.plan.tier in usable and usable[best] > _WORTH_A_MOVE * usable[self.plan.tier]:
            best = self.plan.tier
        starts = "processes" in costs and not workers.n_ready and self._pays(costs, best, progress, workers)
        # Words are made when something changes: a decision is made for many batches, and takes longer with them.
        changes = best != self.plan.tier or starts or self.plan.predicted_s is None
        reason = self._reason(best, solo_s, n_left, costs, workers) if changes else self.plan.reason
        return Plan(best, reason, starts, usable[best])

    def _pays(self, costs: Mapping[str, float], best: str, progress: Progress, workers: Readiness) -> bool:
        """Return whether workers that are not there yet are going to be worth their start."""
        saved_s = costs[best] - costs["processes"]
        if saved_s <= (1 - _WORTH_A_MOVE) * costs[best]:
            return False
        start_costs_s = self._start_costs(best) * workers.startup_s
        saved = saved_s / costs[best]
        # Whoever has lost as much as a start costs loses at most twice what was to be lost.
        if workers.missed_s + saved * progress.elapsed_s > start_costs_s:
            return True
        return self._knows_how_many(progress) and saved * (costs[best] - workers.startup_s) > start_costs_s

    def _start_costs(self, tier: str) -> float:
        """Return the part of a worker start by which the work on ``tier`` is held up."""
        cores = self._facts.cores
        seen = self._seen.get(tier)
        efficiency = min(1.0, seen.efficiency) if seen is not None else 1.0
        idle = cores - efficiency * (1 if tier == "inline" else min(cores, self._facts.n_jobs))
        # Without an idle core it takes its CPU time from the work, which all cores share.
        return max(_START_COSTS, min(1.0, 1.0 - idle) / cores)

    def _is_as_known(self, tier: str, solo_s: float) -> bool:
        """Return whether tasks are thought to take what they took in earlier calls.

        For the calling thread, which nobody relieves of a batch once it runs, only if this call's first ones did.
        """
        if self._known is None or tier != "inline":
            return self._known is not None
        return self._n_done > 0 and solo_s <= _LONG * self._known.solo_s + _ROUND_A_TASK_S

    def _knows_how_many(self, progress: Progress) -> bool:
        return progress.n_tasks is not None or not progress.more_to_come or self._known is not None

    def _n_left(self, progress: Progress) -> int:
        if progress.n_tasks is not None:
            return max(progress.n_pending, progress.n_tasks - self._n_done)
        if not progress.more_to_come:
            return progress.n_pending
        expected = 0 if self._known is None else round(self._known.n_tasks)
        if expected > self._n_done + progress.n_pending:
            return expected - self._n_done
        return max(progress.n_pending, self._n_done)

    def _solo_seconds(self, progress: Progress) -> float | None:
        """Return the seconds of a task alone: measured, else known, and no less than what those that run have taken."""
        usual_s = self._usual_seconds()
        if progress.running_s > progress.n_running * usual_s:
            return (self._n_done * usual_s + progress.running_s) / (self._n_done + progress.n_running)
        return usual_s if self._seen or self._known is not None else None

    def _usual_seconds(self) -> float:
        """Return the seconds of a task alone, as far as tasks have ended; 0 if none has."""
        measured = solo_seconds(self._seen)
        if measured is None:
            measured = None if self._known is None else self._known.solo_s
        return measured or 0.0

    def _seconds_on(self, tier: str, solo_s: float, n_left: int) -> float:
        """Return the predicted seconds of what is left on ``tier``."""
        cost = _COSTS.get(tier, _UNKNOWN_COST)
        n_batches = -(-n_left // self._best_size(tier, solo_s, n_left))
        if tier == "inline":
            return cost.batch_s * n_batches + n_left * solo_s
        pace_s = self._measured_pace(tier, solo_s)
        if pace_s is not None:
            return max(n_left * pace_s, solo_s if n_left else 0.0)
        handing_over = (0.0 if tier in self._seen else cost.call_s) + cost.batch_s * n_batches
        task_s, slots = self._task_seconds_on(tier, solo_s)
        work = n_left * max(task_s / max(1.0, min(slots, n_left)), cost.task_s)
        return handing_over + work + (self._nbytes / _PLACED_PER_S if self._must_place(tier) else 0.0)

    def _measured_pace(self, tier: str, solo_s: float) -> float | None:
        """Return the seconds in which a task gets done on ``tier``, if that was measured now or earlier."""
        seen = self._seen.get(tier)
        if seen is not None and seen.n_batches >= 2 * self._facts.n_jobs and seen.busy_s > _HAS_A_PACE_S:
            return seen.pace_s(self._facts.n_jobs)
        if self._known is None or tier not in self._known.pace_s:
            return None
        # This call's tasks may be longer or shorter than those of earlier ones.
        longer = solo_s / self._known.solo_s if self._known.solo_s > 0 else 1.0
        return self._known.pace_s[tier] * longer

    def _must_place(self, tier: str) -> bool:
        """Return whether the data is not on ``tier`` yet."""
        return tier == "processes" and tier not in self._seen

    def _task_seconds_on(self, tier: str, solo_s: float) -> tuple[float, float]:
        """Return the seconds of a task beside its neighbours, and how many of them run at once."""
        n_jobs, cores = self._facts.n_jobs, self._facts.cores if tier != "dask" else self._facts.n_jobs
        seen = self._seen.get(tier)
        if seen is not None and seen.n_batches:
            return seen.task_s, seen.useful_slots(n_jobs, cores)
        if self._known is not None and tier in self._known.task_s:
            known = _one_task(self._known.task_s[tier], self._known.efficiency[tier])
            longer = solo_s / self._known.solo_s if self._known.solo_s > 0 else 1.0
            return known.task_s * longer, known.useful_slots(n_jobs, cores)
        mapping_s = self._nbytes / _MAPPED_PER_S if tier == "processes" else 0.0
        slots = _one_task(1.0, self._alone_efficiency()).useful_slots(n_jobs, cores)
        return solo_s * _FIRST_GUESS.get(tier, 1.05) + mapping_s, slots

    def _alone_efficiency(self) -> float:
        seen = self._seen.get("inline")
        if seen is not None and seen.n_tasks:
            return seen.efficiency
        return 1.0 if self._known is None else self._known.efficiency.get("inline", 1.0)

    def _reason(self, best: str, solo_s: float, n_left: int, costs: Mapping[str, float], workers: Readiness) -> str:
        parts = [f"{n_left} tasks of ~{_readable(solo_s)}"]
        threads = self._seen.get("threads")
        if threads is not None:
            parts.append(f"thread efficiency {threads.efficiency:.2f}")
        if self._nbytes:
            parts.append(f"{self._nbytes / 1e6:.0f} MB of data")
        predicted = ", ".join(f"{tier} ~{_readable(cost)}" for tier, cost in costs.items() if tier != best)
        text = f"{', '.join(parts)}: ~{_readable(costs[best])} here, {predicted}"
        if "processes" in costs and not workers.n_ready and best != "processes":
            text += f" and {_readable(workers.startup_s)} of start-up"
        return text

    def missed(self) -> float:
        """Return the seconds that this call would have been shorter with process workers there from its start."""
        solo_s = solo_seconds(self._seen)
        if solo_s is None or "processes" not in self._allowed:
            return 0.0
        here_s, there_s = (self._seconds_on(tier, solo_s, self._n_done) for tier in (self.plan.tier, "processes"))
        return max(0.0, here_s - there_s)

    def explain(self, workers: Readiness) -> str:
        """Return why the call ran where it did, with the numbers of all its tasks."""
        solo_s = solo_seconds(self._seen) or 0.0
        costs = {tier: self._seconds_on(tier, solo_s, self._n_done) for tier in self._allowed}
        return self._reason(self.plan.tier, solo_s, self._n_done, costs, workers)

    # ---- batches

    def batch_size(self, progress: Progress) -> int:
        """Return how many tasks to put into the next batches.

        As many as run long enough to hide what handing over costs on the tier of the plan. Long tasks are not glued
        together, no batch is much larger than one that is known to have gone well, and towards the end every job gets
        several.
        """
        solo_s = self._solo_seconds(progress)
        if solo_s is None:
            return 1
        tier, n_left = self.plan.tier, self._n_left(progress)
        size = self._best_size(tier, solo_s, n_left)
        if not self._is_as_known(tier, solo_s):
            size = min(size, _GROWTH.get(tier, _GROWTH_ELSEWHERE) * self._largest_batch)
        if tier == "inline" and self._knows_how_many(progress):
            size = _equal_parts(n_left - progress.n_pending, size)
        return max(1, size)

    def _best_size(self, tier: str, solo_s: float, n_left: int) -> int:
        """Return the size of batches on ``tier`` where ``n_left`` tasks are left, and known to be alike."""
        runs_s = _COSTS.get(tier, _UNKNOWN_COST).batch_runs_s
        if tier == "dask":
            runs_s = max(runs_s, self._facts.n_jobs * _SCHEDULED_S)
        size = int(runs_s / solo_s) if solo_s > 0 else 1 << 16
        if tier != "inline":
            size = min(size, n_left // (_PARTS_PER_JOB * self._facts.n_jobs))
        elif n_left * solo_s > runs_s:
            # If they are longer than it seems, the other jobs must find something to take.
            size = min(size, n_left // self._facts.n_jobs)
        return max(1, size)


def _equal_parts(n_tasks: int, size: int) -> int:
    """Return the size of equal batches of at most ``size``: of one that would not be full joblib makes ten."""
    return n_tasks // -(-n_tasks // size) if size > 0 and n_tasks > 0 else size


def _one_task(wall_s: float, efficiency: float) -> TierSeen:
    return TierSeen(n_batches=1, n_tasks=1, wall_s=wall_s, cpu_s=wall_s * efficiency)


def _readable(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds * 1e6:.2g} µs"
