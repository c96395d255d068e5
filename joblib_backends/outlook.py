"""What ``tier="auto"`` would do with calls of this process, and why: rules and planner are asked, no call is made."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, NamedTuple

from .backend import facts_of
from .budget import available_cores
from .config import Config
from .planner import CallPlanner, Progress, Readiness
from .rules import Facts, choose_tier

__all__ = ["Forecast", "outlook"]

#: Kinds of calls, and what the planner is told of them.
_KINDS: Final[dict[str, dict[str, Any]]] = {
    "scikit-learn's own": {"trusted_on_threads": True},
    "your functions": {},
    "prefer='threads'": {"prefer": "threads"},
    "prefer='processes'": {"prefer": "processes"},
    "require='sharedmem'": {"require": "sharedmem"},
    "in a Dask client": {"cluster": "a Dask client is active in this process", "cluster_was_given": False},
    "client=, scheduler=": {"cluster": "a Dask client or scheduler was given", "cluster_was_given": True},
}


class Forecast(NamedTuple):
    """Where calls of one kind may run, and where they begin."""

    #: Among which the cheapest is taken, by what is measured while the call runs.
    tiers: tuple[str, ...]
    begins: str
    reason: str

    @property
    def words(self) -> str:
        """A sentence of it."""
        if len(self.tiers) == 1:
            return f"{self.begins}: {self.reason}"
        return f"begins {self.begins}, then the cheapest of {', '.join(self.tiers)}: {self.reason}"


def outlook(config: Config) -> dict[str, Forecast]:
    """Return what would become of calls with ``n_jobs=-1`` that say no more than ``config``, by kind."""
    cores = available_cores(config)
    own = dataclasses.replace(
        facts_of(config, None), has_task_timeout=config.task_timeout is not None, n_jobs=cores, cores=cores
    )
    return {kind: _forecast(_told(own, told)) for kind, told in _KINDS.items()}


def _told(own: Facts, told: dict[str, Any]) -> Facts:
    # A cluster that the environment names is there already, and used.
    return own if "cluster" in told and own.cluster is not None else dataclasses.replace(own, **told)


def _forecast(facts: Facts) -> Forecast:
    chosen = choose_tier(facts)
    if facts.n_jobs == 1 and chosen.tier != "dask":
        return Forecast(("inline",), "inline", "there is one core, so n_jobs=-1 is a plain loop of joblib's")
    planner = CallPlanner(facts)
    begins = planner.decide(Progress(), Readiness()).tier
    others = f"{chosen.tier}, because " if len(planner.allowed) > 1 else ""
    return Forecast(planner.allowed, begins, f"{others}{chosen.reason}")
