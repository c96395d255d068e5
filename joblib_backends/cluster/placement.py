"""Which workers of a cluster may run the tasks of a call, and how many of them at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config import Config
from .client import descriptions, nthreads

__all__ = ["Placement", "most_slots"]


@dataclass(frozen=True)
class Placement:
    """What is asked of the workers of a call. Hashable, so that calls which ask the same share a connection.

    Parameters
    ----------
    workers : tuple
        Names, addresses or hosts; none means all workers.
    resources : tuple
        Pairs of a resource and what a task takes of it.
    priority : float
        Dask's own number: tasks with a higher one come first.
    """

    workers: tuple[str | int, ...] = ()
    resources: tuple[tuple[str, float], ...] = ()
    priority: float = 0

    @classmethod
    def of(cls, config: Config) -> Placement:
        """Return what ``config`` asks for."""
        return cls(config.workers or (), tuple(sorted((config.resources or {}).items())), config.priority)

    def __str__(self) -> str:
        asked = [f"workers={list(self.workers)!r}"] if self.workers else []
        asked += [f"resources={dict(self.resources)!r}"] if self.resources else []
        return " and ".join(asked)

    @property
    def has_numbers(self) -> bool:
        """Whether workers are asked for by number, which some clusters have as text and others not."""
        return any(str(name).isdigit() for name in self.workers)

    def numbered_as(self, names: Collection[Any]) -> Placement:
        """Return the same, with numbers as the workers of a cluster have them in their ``names``.

        To Dask, 0 and "0" are two names. A number that nobody has is text: Dask's scheduler answers one that it does
        not know by cutting off the client.
        """
        known = {str(name): name for name in names}
        workers = tuple(name if name in names else known.get(str(name), str(name)) for name in self.workers)
        return replace(self, workers=workers)

    def names(self, address: str, worker: Mapping[str, Any]) -> bool:
        """Return whether a worker is among those that are asked for by name, address or host."""
        return not {address, worker["host"], worker["name"]}.isdisjoint(self.workers)

    @property
    def options(self) -> dict[str, Any]:
        """What ``Client.map`` and ``Client.submit`` are to be told; nothing that is Dask's own default.

        Not ``retries``: what is repeated, and how often, is decided here and not by Dask.
        """
        asked = {"workers": list(self.workers), "resources": dict(self.resources), "priority": self.priority}
        return {name: value for name, value in asked.items() if value}

    def slots(self, client: Any, timeout_s: float) -> dict[str, int]:
        """Return how many tasks each of the workers that match can run at once, by address.

        Raises
        ------
        ClusterUnavailableError
            If the scheduler does not answer within ``timeout_s`` seconds.
        """
        if not self.workers and not self.resources:
            return nthreads(client, timeout_s)  # the shorter answer by far, on a large cluster
        found = {
            address: self._slots_of(address, worker) for address, worker in descriptions(client, timeout_s).items()
        }
        return {address: n_slots for address, n_slots in found.items() if n_slots}

    def _slots_of(self, address: str, worker: Mapping[str, Any]) -> int:
        if self.workers and not self.names(address, worker):
            return 0
        supplied = worker["resources"]
        rooms: list[int] = [math.floor(supplied.get(name, 0) / needed) for name, needed in self.resources]
        return min([int(worker["nthreads"]), *rooms])


def most_slots(client: Any, placement: Placement, slots: Mapping[str, int]) -> int:
    """Return how many tasks a cluster can run at once when it has grown as far as it may, if that is known.

    It is for a client that was made with its cluster, as ``Client(cluster)``: then the cluster knows how many workers
    ``cluster.scale`` has asked for, and ``cluster.adapt`` may. Those to come are taken to be like the smallest that is
    there. An adaptive cluster without a maximum, or one that only its scheduler's address stands for, counts as it is.
    """
    there = sum(slots.values())
    if not slots or placement.workers:
        return there  # who grows by name is not known
    return there + max(0, _most_workers(getattr(client, "cluster", None)) - len(slots)) * min(slots.values())


def _most_workers(cluster: Any) -> int:
    asked_for = len(getattr(cluster, "plan", ()))
    # No public attribute of a cluster has it, only what ``adapt`` once returned to the user.
    adaptive = getattr(cluster, "_adaptive", None)
    is_adapting = getattr(adaptive, "periodic_callback", None) is not None
    maximum = getattr(adaptive, "maximum", math.inf) if is_adapting else math.inf
    return max(asked_for, int(maximum)) if math.isfinite(maximum) else asked_for
