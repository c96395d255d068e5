"""Asks the planner at the right moments, with the right numbers; the planner itself knows no clock and no process.

One pilot for each call. It finds out what kind of task the call has, looks up what is known of it, says which tier a
batch goes to, has process workers started in the background when they are going to pay, and keeps what the call taught.

Thread-safe. The lock is held while the planner thinks, some 10 µs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from .budget import seconds_to_limit, share_of
from .config import Config
from .crew import Crew
from .experience import BatchSeen, Experience
from .kinds import kind_of
from .planner import CallPlanner, Progress, Readiness
from .profile import Profile
from .rules import Facts, Plan, choose_tier
from .thread_safety import TrustCheck, innermost, root_package
from .tiers import load_tier, loaded_tier
from .worker import Spent
from .workers.preload import packages_of

__all__ = ["Pilot"]

_log = logging.getLogger(__name__)

#: Seconds between two decisions; of an unknown kind of task, once the first few batches were seen one by one.
_DECIDE_EVERY_S: Final = 0.02
_SEEN_ONE_BY_ONE: Final = 4

#: Seconds that a worker start is expected to take before one was measured, without scikit-learn and with it
#: (benchmarks/workers.py).
_STARTUP_S: Final = 0.3
_STARTUP_WITH_SKLEARN_S: Final = 1.2


#: Kinds of tasks over which workers of this process died: they never run in it.
_deadly: Final[set[str]] = set()


class _Missed:
    """Seconds that the calls of this process lost because no workers were there; many short calls make a long one."""

    seconds: float = 0.0


class Pilot:
    """The plan of one call, as it changes.

    Parameters
    ----------
    facts : Facts
        What is known before the first task; whether its code may run on threads is found out here.
    config : Config
        Of the call.
    profile : Profile, optional
        Where experience is kept; None looks nothing up and keeps nothing.
    n_tasks : int, optional
        Tasks of the call, where it has a length.
    """

    def __init__(
        self, facts: Facts, config: Config, profile: Profile | None = None, n_tasks: int | None = None
    ) -> None:
        self._facts = facts
        self._config = config
        self._profile = profile
        #: Tasks of the call, where it has a length.
        self.n_tasks = n_tasks
        self._lock = threading.Lock()
        self._kind = ""
        self._packages: frozenset[str] = frozenset()
        self._planner = CallPlanner(facts)
        self._trust = TrustCheck()
        self._is_met = False
        self._n_seen = 0
        self._started = time.perf_counter()
        self._decided = 0.0
        self._workers_asked = False
        self._cannot_start = False
        self._count_ready: Callable[[], int] | None = None
        self._limits_threads = False
        self._known: Experience | None = None
        self._glues = True
        self._uses_threads = False
        self._sizes_batches = False
        self._items: Any = None
        self._task_s = 0.0
        self._busy_s = 0.0
        self.plan = choose_tier(facts)
        #: CPU time spent on finding out and deciding; other threads run in between.
        self.planning_s = 0.0
        #: Seconds that the call was predicted to take when something was first known of it.
        self.predicted_s: float | None = None

    def __repr__(self) -> str:
        return f"<Pilot of {self._kind or 'nothing yet'}, {self.plan.tier}>"

    @property
    def adapts(self) -> bool:
        """Whether the plan may change while the call runs."""
        return not self._planner.is_fixed

    @property
    def has_timeout(self) -> bool:
        """Whether the caller waits for each result for so long only."""
        return self._facts.has_timeout

    @property
    def runs_in_caller(self) -> bool:
        """Whether batches are now left to the thread that asks for results."""
        tier = loaded_tier(self.plan.tier)
        return tier is not None and tier.runs_in_caller

    def guards(self, function: Callable[[], Any]) -> bool:
        """Return whether a batch in the calling thread gets random streams of its own: one that may not use threads."""
        facts = self._facts
        # On threads, where they were asked for, tasks draw from the global generators too.
        if not self.adapts or facts.require or facts.prefer == "threads":
            return False
        return not facts.trusted_on_threads or (self._trust_matters() and not self._trusts(function))

    @property
    def guards_generator(self) -> bool:
        """Whether the user's generator of tasks must not draw from the streams of tasks in the calling thread.

        In a nested call it is part of a task, and draws as that does.
        """
        facts = self._facts
        return self.adapts and not (facts.is_nested or facts.require or facts.prefer == "threads")

    def has_left_caller(self, function: Callable[[], Any]) -> bool:
        """Return whether a batch that was left to the calling thread must not run there any more."""
        return self._uses_threads and self.plan_for(function).tier != "inline"

    # ---- before a batch

    def meet(self, function: Callable[[], Any], n_pending: int) -> None:
        """Find out about the call by its first batch, and make the first plan."""
        if self._is_met:
            return
        with self._lock:
            if self._is_met:
                return
            self._started, started = time.perf_counter(), time.thread_time()
            if self._trust_matters():
                self._facts = dataclasses.replace(self._facts, trusted_on_threads=self._trusts(function))
            self._planner = CallPlanner(self._facts)
            self.plan = self._planner.plan
            # On a cluster each batch costs milliseconds: what is known of the tasks says at once how many go together.
            if self.adapts or self.plan.tier == "dask":
                kind = kind_of(function, self._facts.n_jobs)
                if kind.name in _deadly:
                    self._facts = dataclasses.replace(self._facts, kills_workers=True)
                known = None if self._profile is None else self._profile.lookup(kind.name)
                self._kind = kind.name
                self._planner = CallPlanner(self._facts, known, kind.nbytes)
                self._known = known
                self._limits_threads = bool(share_of(self._config, 1).limits)
                if "processes" in self._planner.allowed:
                    self._items = getattr(function, "items", None) or [(function, (), {})]
                self._decide(Progress(n_pending, n_tasks=self.n_tasks))
            self._glues = self._may_glue(function)
            self._is_met = True
            self.planning_s += time.thread_time() - started

    def _trust_matters(self) -> bool:
        facts = self._facts
        return facts.chooses and not (facts.prefer or facts.require or facts.wants_cluster or facts.is_daemonic)

    def plan_for(self, function: Callable[[], Any]) -> Plan:
        """Return the plan for one batch: that of the call, unless this batch must not run beside others here."""
        plan = self.plan
        self._uses_threads = self._uses_threads or plan.tier == "threads"
        # Where some of the call run on threads, the calling thread is beside them.
        if not self._uses_threads or plan.tier not in ("inline", "threads") or not self._trust_matters():
            return plan
        started = time.thread_time()
        is_trusted = self._trusts(function)
        self.planning_s += time.thread_time() - started
        return plan if is_trusted else choose_tier(self._distrusting())

    def _distrusting(self) -> Facts:
        return dataclasses.replace(self._facts, trusted_on_threads=False)

    def _trusts(self, function: Callable[[], Any]) -> bool:
        try:
            return self._trust.allows(getattr(function, "items", None) or [(function, (), {})])
        except RuntimeError:
            # A task that runs already changes what it was given.
            return False

    def _may_glue(self, function: Callable[[], Any]) -> bool:
        """Return whether tasks may share a batch.

        On threads tasks of a user may wait for each other, and would for ever in one batch; joblib makes none there.
        scikit-learn's own do not.
        """
        if self._facts.require is None and self._facts.prefer != "threads":
            return True
        items: Any = getattr(function, "items", None)
        return bool(items) and root_package(innermost(items[0][0])) == "sklearn"

    def batch_size(self, n_pending: int, *, more_to_come: bool) -> int:
        """Return how many tasks to put into the next batches."""
        if not self._glues:
            return 1
        self._sizes_batches = True
        started = time.thread_time()
        with self._lock:
            size = self._planner.batch_size(Progress(n_pending, more_to_come, self.n_tasks))
            self.planning_s += time.thread_time() - started
        return size

    @property
    def task_s(self) -> float:
        """Seconds of a task, by the last batch; 0 if none was seen."""
        return self._task_s

    @property
    def expected_task_s(self) -> float:
        """Seconds of a task, by the last batch, else by earlier calls; 0 if nothing is known."""
        return self._task_s or (0.0 if self._known is None else self._known.solo_s)

    # ---- after a batch, or while one takes long

    @property
    def has_seen_nothing(self) -> bool:
        """Whether all that is planned may have to be planned anew with the first result."""
        return self.adapts and self._n_seen == 0

    def observe(
        self, tier: str, n_tasks: int, spent: Spent, busy_s: float, n_together: int, *, is_mixed: bool = False
    ) -> None:
        """Take in what a finished batch spent.

        ``busy_s`` is how long the call has been running anything so far, ``n_together`` how many batches it ran then,
        ``is_mixed`` whether anything ran on another tier since the batch was started.
        """
        self._task_s = spent.wall / max(1, n_tasks)
        if not self.adapts and not self._sizes_batches:
            return
        started = time.thread_time()
        with self._lock:
            self._n_seen += 1
            newly_busy_s, self._busy_s = max(0.0, busy_s - self._busy_s), max(busy_s, self._busy_s)
            times = (spent.wall, spent.cpu, spent.delay, None if is_mixed else newly_busy_s)
            self._planner.observe(BatchSeen(tier, n_tasks, *times, n_together))
            self.planning_s += time.thread_time() - started

    def replan(
        self,
        n_pending: int,
        *,
        more_to_come: bool,
        running: tuple[float, int, float] = (0.0, 0, 0.0),
        in_caller: Callable[[], Any] | None = None,
    ) -> bool:
        """Decide again if there is something to decide and enough was seen; return whether the tier changed.

        ``running`` has the seconds for which the caller has been running a batch, its tasks, and the cores that they
        used; ``in_caller`` is that batch: if it is not to be trusted beside others in this process, none will be on
        threads.
        """
        if not self.adapts or not self._is_met or not (n_pending or more_to_come):
            return False
        now = time.perf_counter()
        is_early = self._n_seen <= _SEEN_ONE_BY_ONE and self._known is None
        if not is_early and now - self._decided < _DECIDE_EVERY_S:
            return False
        with self._lock:
            before, started = self.plan.tier, time.thread_time()
            progress = Progress(n_pending, more_to_come, self.n_tasks, now - self._started, *running)
            self._decide(progress)
            if self.plan.tier == "threads" and in_caller is not None and self._is_alone(in_caller):
                self._facts = self._distrusting()
                self._planner.restrict(self._facts)
                self._decide(progress)
            self.planning_s += time.thread_time() - started
            return self.plan.tier != before

    def lost_worker(self) -> None:
        """Note that a worker died over a task: from now on none runs in this process, unless that was asked for."""
        with self._lock:
            if self._kind:
                _deadly.add(self._kind)
            self._restrict(kills_workers=True)

    def leave_cluster(self) -> None:
        """Go on without the cluster, which is lost."""
        with self._lock:
            self._restrict(cluster_is_lost=True)

    def _restrict(self, **facts: Any) -> None:
        self._facts = dataclasses.replace(self._facts, **facts)
        self._planner.restrict(self._facts)
        self.plan = self._planner.plan

    def _is_alone(self, function: Callable[[], Any]) -> bool:
        """Return whether no other batch of the call may run in this process beside ``function``."""
        return not self._uses_threads and self._trust_matters() and not self._trusts(function)

    def _decide(self, progress: Progress) -> None:
        self._decided = time.perf_counter()
        workers = self._readiness()
        plan = self._planner.decide(progress, workers)
        if workers.n_ready:
            # Nothing is to be started any more; the first task's data must not live as long as the call.
            self._items = None
        if self.predicted_s is None and plan.predicted_s is not None:
            self.predicted_s = self._decided - self._started + plan.predicted_s
        self.plan = plan
        if plan.start_workers and not self._workers_asked:
            self._workers_asked = True
            items, self._items = self._items, None
            # Aside, because what starts them may have to be imported first, 20 ms.
            start = functools.partial(_start_workers, self._config, self._facts.n_jobs, items)
            try:
                Crew.shared().run(start)
            except RuntimeError as error:
                _log.debug("No thread can be started now, and the call goes on without workers: %s", error)

    def _readiness(self) -> Readiness:
        threads_s = seconds_to_limit() if self._limits_threads else 0.0
        tier = loaded_tier("processes") if "processes" in self._planner.allowed else None
        if tier is None or self._cannot_start:
            return Readiness(0, _expected_startup_seconds(), _Missed.seconds, threads_s)
        try:
            if self._count_ready is None:
                # Kept: to find the workers of an initializer, its arguments must be pickled.
                self._count_ready = tier.ready_counter(self._config)
            n_ready = self._count_ready()
        except Exception as error:
            # An initializer that cannot travel, in a call that may not need workers at all.
            _log.debug("Process workers cannot be used: %s", error)
            self._cannot_start, n_ready = True, 0
        startup_s = tier.startup_seconds() or _expected_startup_seconds()
        return Readiness(n_ready, startup_s, _Missed.seconds, threads_s)

    def end(self, *, failed: bool) -> dict[str, str]:
        """Keep what the call taught; return the reason for the last plan's tier with the numbers of the whole call."""
        if not self._is_met or not self._kind:
            return {}
        with self._lock:
            learned = self._planner.experience()
            if learned is None:
                return {}
            if self._profile is not None and not failed:
                self._profile.learn(self._kind, learned)
            if not self.adapts:
                return {}
            workers = self._readiness()
            _Missed.seconds = 0.0 if workers.n_ready else _Missed.seconds + self._planner.missed()
            return {self.plan.tier: self._planner.explain(workers)}


def _expected_startup_seconds() -> float:
    return _STARTUP_WITH_SKLEARN_S if "sklearn" in sys.modules else _STARTUP_S


def _start_workers(config: Config, n_jobs: int, items: Any) -> None:
    """Have process workers started for such tasks. Runs in a thread of the crew."""
    try:
        load_tier("processes").start_workers(config, n_jobs, packages_of(items))
    except Exception as error:
        # The call goes on where it is. If it ever needs the workers, it will say what is wrong with them.
        _log.debug("Process workers were not started ahead of time: %s", error)
