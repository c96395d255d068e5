"""Which tiers a call may run on: what is demanded, what was asked for, what is safe. What is cheapest comes after that.

Pure, as the planner: facts in, decision and reason out.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Facts", "Plan", "allowed_tiers", "choose_tier"]


@dataclass(frozen=True)
class Facts:
    """What is known of a call before it runs.

    Parameters
    ----------
    tier : str
        What the user asked for; "auto" leaves it to the planner.
    prefer, require : str or None
        joblib's hints.
    cluster : str or None
        Why Dask is to be used, in words ("a client was given"), or None.
    cluster_was_given : bool
        Whether the user named the cluster; then it is used even where a loop would do.
    is_daemonic : bool
        Whether this process may not start processes.
    trusted_on_threads : bool
        Whether the batch may run beside others in a process (``thread_safety.py``).
    is_nested : bool
        Whether the call runs inside a task.
    caller_waits : bool
        Whether the calling thread waits for all results; one that consumes a generator has other things to do.
    has_timeout : bool
        Whether it waits for so long only: a task that it runs itself cannot be left behind.
    has_task_timeout : bool
        Whether each task may run for so long only: where it runs, it must be possible to end it.
    kills_workers : bool
        Whether a worker died over such tasks: in this process they would end it.
    cluster_is_lost : bool
        Whether the cluster is gone, and the call goes on without it.
    n_jobs, cores : int
        Batches that may run at once, and cores of this machine to run them on.
    """

    tier: str = "auto"
    prefer: str | None = None
    require: str | None = None
    cluster: str | None = None
    cluster_was_given: bool = True
    is_daemonic: bool = False
    trusted_on_threads: bool = False
    is_nested: bool = False
    caller_waits: bool = True
    has_timeout: bool = False
    has_task_timeout: bool = False
    kills_workers: bool = False
    cluster_is_lost: bool = False
    n_jobs: int = 2
    cores: int = 2

    @property
    def wants_cluster(self) -> bool:
        """Whether calls without a demand for shared memory go to a cluster."""
        is_wanted = self.tier == "dask" or (self.tier == "auto" and self.cluster is not None)
        return is_wanted and not self.cluster_is_lost

    @property
    def chooses(self) -> bool:
        """Whether the tier is left to rules and cost."""
        return self.tier == "auto" or (self.tier == "dask" and self.cluster_is_lost)

    @property
    def needs_processes(self) -> bool:
        """Whether tasks must run where they can be ended, or end, without this process."""
        return self.has_task_timeout or self.kills_workers


@dataclass(frozen=True)
class Plan:
    """The tier of a batch and the reason, as the report shows it."""

    tier: str
    reason: str
    #: Whether process workers are to be started in the background, because they are going to pay.
    start_workers: bool = False
    #: Seconds that the rest of the call was predicted to take, if anything was known.
    predicted_s: float | None = None


def choose_tier(facts: Facts) -> Plan:
    """Return the plan for a batch of which nothing is measured: what is demanded, asked for, or safe."""
    if facts.require == "sharedmem":
        tier = "inline" if facts.tier == "inline" else "threads"
        return Plan(tier, "require='sharedmem' needs the parent's memory")
    if facts.is_daemonic and facts.tier == "processes":
        return Plan("threads", "this process is a daemon, which may not start the processes that were asked for")
    if not facts.chooses:
        return Plan(facts.tier, f"tier={facts.tier!r} was asked for")
    return _choose_automatically(facts)


def _choose_automatically(facts: Facts) -> Plan:
    if facts.cluster is not None and not facts.cluster_is_lost:
        return Plan("dask", facts.cluster)
    if facts.prefer == "threads":
        return Plan("threads", "prefer='threads' was asked for")
    if facts.is_daemonic:
        return Plan("threads", "this process is a daemon, which may not start processes")
    if facts.prefer == "processes":
        return Plan("processes", "prefer='processes' was asked for")
    if facts.needs_processes:
        why = "a task may take too long" if facts.has_task_timeout else "a worker died over such a task"
        return Plan("processes", f"{why}, and only a process can be ended alone")
    if facts.trusted_on_threads:
        return Plan("threads", "the function and all it works on come from scikit-learn, or are marked thread_safe")
    return Plan("processes", "the function is not known to be safe on threads")


def allowed_tiers(facts: Facts) -> tuple[str, ...]:
    """Return the tiers among which cost decides; one if there is nothing to decide.

    The calling thread is allowed where it waits, for as long as it takes: there a task runs as with ``n_jobs=1``.
    """
    chosen = choose_tier(facts).tier
    if not facts.chooses or not facts.caller_waits or facts.cluster_is_lost:
        return (chosen,)
    if chosen == "dask" and facts.cluster_was_given:
        return (chosen,)
    may_leave = chosen == "threads" and facts.prefer is None and facts.require is None
    elsewhere = ("processes",) if may_leave and not facts.is_daemonic and not facts.is_nested else ()
    keeps_caller = not facts.has_timeout and not facts.needs_processes
    return (*(("inline",) if keeps_caller else ()), chosen, *elsewhere)
