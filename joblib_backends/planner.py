"""Which tier a batch runs on, and why: facts in, decision and reason out. No clock, no I/O, no process.

In this version ``auto`` is a fixed rule; a cost model takes the place of :func:`choose_tier` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Facts", "Plan", "choose_tier"]


@dataclass(frozen=True)
class Facts:
    """What the rule may know about a batch and where it is.

    Parameters
    ----------
    tier : str
        What the user asked for; "auto" leaves it to the rule.
    prefer, require : str or None
        joblib's hints.
    cluster : str or None
        Why Dask is to be used, in words ("a client was given"), or None.
    is_daemonic : bool
        Whether this process may not start processes.
    trusted_on_threads : bool
        Whether the batch may run beside others in a process (``thread_safety.py``).
    """

    tier: str = "auto"
    prefer: str | None = None
    require: str | None = None
    cluster: str | None = None
    is_daemonic: bool = False
    trusted_on_threads: bool = False

    @property
    def wants_cluster(self) -> bool:
        """Whether calls without a demand for shared memory go to a cluster."""
        return self.tier == "dask" or (self.tier == "auto" and self.cluster is not None)


@dataclass(frozen=True)
class Plan:
    """The tier of a batch and the reason, as the report shows it."""

    tier: str
    reason: str


def choose_tier(facts: Facts) -> Plan:
    """Return the plan for a batch: first what is demanded, then what was asked for, then the rule."""
    if facts.require == "sharedmem":
        tier = "inline" if facts.tier == "inline" else "threads"
        return Plan(tier, "require='sharedmem' needs the parent's memory")
    if facts.is_daemonic and facts.tier == "processes":
        return Plan("threads", "this process is a daemon, which may not start the processes that were asked for")
    if facts.tier != "auto":
        return Plan(facts.tier, f"tier={facts.tier!r} was asked for")
    return _choose_automatically(facts)


def _choose_automatically(facts: Facts) -> Plan:
    if facts.cluster is not None:
        return Plan("dask", facts.cluster)
    if facts.prefer == "threads":
        return Plan("threads", "prefer='threads' was asked for")
    if facts.is_daemonic:
        return Plan("threads", "this process is a daemon, which may not start processes")
    if facts.prefer == "processes":
        return Plan("processes", "prefer='processes' was asked for")
    if facts.trusted_on_threads:
        return Plan("threads", "the function and all it works on come from scikit-learn, or are marked thread_safe")
    return Plan("processes", "the function is not known to be safe on threads")
