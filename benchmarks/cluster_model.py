"""A small discrete-event model of a call on a cluster of any size, for ``cluster_simulation.py``; no clock, no chance.

::

    client ──L──> scheduler ──L──> worker (one task runs, one waits) ──L──> scheduler ──L──> client
      one at a time   one at a time                                          (then fetched: two round trips more)

**Modelled:** client and scheduler as servers that do one thing at a time, with what each task costs them; the workers
that the scheduler looks through to find the least busy one, as long as some are idle, and what all say to it now and
then; ten batches per job in flight (``tiers/dask.py``); two of them on a worker, which is Dask's own
``worker-saturation``; round trips; tasks of unequal length, from half to one and a half times the mean; data that is
brought to one host through the scheduler and from there on from host to host in parts (``spread.py``), each host that
has it feeding one other; workers that begin when their host has the data.

**Not modelled:** several links that share a switch, workers that come and go, results larger than some kilobytes,
memory, garbage collection, work stealing. So times are rather too good.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any, Final

from joblib_backends.cluster.copies import PART_NBYTES
from joblib_backends.tiers.dask import _BATCHES_PER_JOB

__all__ = ["Cluster", "Costs", "Load", "Outcome", "arrivals", "limit_of", "shortest_task_s", "simulate", "without"]

#: Tasks that Dask sends to a worker of one thread: worker-saturation 1.1, rounded up.
_PER_WORKER: Final = 2

#: Steps of the golden ratio are as even as steps can be: equal inputs give equal lengths, without chance.
_GOLDEN: Final = (math.sqrt(5) - 1) / 2

#: From here on the workers themselves are the limit.
_IS_BUSY: Final = 0.9


@dataclass(frozen=True)
class Costs:
    """What was measured; seconds of CPU time if nothing else is said."""

    #: Of the client and of the scheduler per task, and of a worker besides the task itself.
    client_s: float
    scheduler_s: float
    worker_s: float
    #: Of the scheduler per task and idle worker, and per sign of life of a worker.
    choice_s: float = 0.0
    heartbeat_s: float = 0.0
    #: Of a round trip, what is neither network nor CPU time of the above: threads that wake each other.
    waits_s: float = 0.0
    #: Bytes a second that distributed brings over a link that is no limit.
    by_scheduler_per_s: float = math.inf
    worker_to_worker_per_s: float = math.inf


@dataclass(frozen=True)
class Cluster:
    """Where a call runs."""

    workers: int
    per_host: int = 8
    #: Of a link, in both directions.
    gbit_per_s: float = 10.0
    #: There and back.
    latency_s: float = 0.5e-3
    #: All processes of the cluster, and all workers one of them, on so many cores: the benchmark.
    shared_cores: float | None = None

    @property
    def hosts(self) -> int:
        """How many hosts there are."""
        return -(-self.workers // self.per_host)

    @property
    def heartbeats_per_s(self) -> float:
        """How many signs of life come to the scheduler: ``distributed.scheduler.heartbeat_interval``."""
        interval_s = 0.5 if self.workers <= 10 else 1 if self.workers < 50 else 2 if self.workers < 200 else None
        return self.workers / (self.workers / 200 + 1 if interval_s is None else interval_s)


@dataclass(frozen=True)
class Load:
    """What runs."""

    n_tasks: int
    #: The mean.
    task_s: float
    #: Of the data that all tasks need.
    nbytes: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What comes of it."""

    seconds: float
    #: The time of all tasks over that of all workers.
    efficiency: float
    tasks_per_s: float
    #: Seconds until the last host has the data.
    data_s: float


def simulate(costs: Costs, cluster: Cluster, load: Load) -> Outcome:
    """Return what comes of a call."""
    return _Call(_adapted(costs, cluster), cluster, load).run()


def _adapted(costs: Costs, cluster: Cluster) -> Costs:
    """Return the costs with what the scheduler does besides, and with cores that are too few."""
    alive = max(0.05, 1.0 - cluster.heartbeats_per_s * costs.heartbeat_s)
    costs = replace(costs, scheduler_s=costs.scheduler_s / alive, choice_s=costs.choice_s / alive)
    if cluster.shared_cores is None:
        return costs
    parts = (costs.client_s, costs.scheduler_s + costs.choice_s * cluster.workers, costs.worker_s)
    # What has the most to do need not wait for a core if the others have one among them.
    stretch = max(1.0, sum(parts) / (cluster.shared_cores * max(parts))) if any(parts) else 1.0
    return replace(
        costs,
        client_s=costs.client_s * stretch,
        scheduler_s=costs.scheduler_s * stretch,
        choice_s=costs.choice_s * stretch,
        worker_s=costs.worker_s * stretch,
    )


def arrivals(costs: Costs, cluster: Cluster, nbytes: float) -> list[float]:
    """Return when each host has the data: the client's own is none of them."""
    if not nbytes:
        return [0.0] * cluster.hosts
    n_parts, link_per_s = math.ceil(nbytes / PART_NBYTES), cluster.gbit_per_s * 1e9 / 8
    # To the scheduler, and from there on; each part is asked for, or acknowledged, before the next.
    first_s = nbytes * (2 / link_per_s + 1 / costs.by_scheduler_per_s) + n_parts * 2 * cluster.latency_s
    round_s = nbytes * (1 / link_per_s + 1 / costs.worker_to_worker_per_s) + n_parts * cluster.latency_s
    return [first_s + round_s * math.ceil(math.log2(host + 1)) for host in range(cluster.hosts)]


class _Call:
    """Events in the order of their time; each server is free again at a time."""

    def __init__(self, costs: Costs, cluster: Cluster, load: Load) -> None:
        self._costs, self._cluster, self._load = costs, cluster, load
        self._one_way_s = cluster.latency_s / 2
        # The client hears of the end, asks, the scheduler asks the worker: half, one and one round trip.
        self._back_s = 2.5 * cluster.latency_s + costs.waits_s
        self._events: list[tuple[float, int, Any]] = []
        self._n_events = 0
        self._client_free_s = self._scheduler_free_s = self._workers_free_s = 0.0
        self._free_at = [0.0] * cluster.workers
        self._n_on = [0] * cluster.workers
        # Workers with room, by how many tasks they have: the scheduler takes the least busy one.
        self._with_room: tuple[OrderedDict[int, None], ...] = tuple(OrderedDict() for _ in range(_PER_WORKER))
        self._queued = self._n_sent = self._n_started = self._n_done = 0
        self._data_s = 0.0

    def run(self) -> Outcome:
        load, cluster = self._load, self._cluster
        for host, at_s in enumerate(arrivals(self._costs, cluster, load.nbytes)):
            self._data_s = max(self._data_s, at_s)
            self._at(at_s, ("host", host))
        for _ in range(min(load.n_tasks, _BATCHES_PER_JOB * cluster.workers)):
            self._send(0.0)
        end_s = 0.0
        handlers = {"host": self._host, "new": self._new, "ended": self._ended, "result": self._result}
        while self._events:
            end_s, _, (what, argument) = heappop(self._events)
            handlers[what](end_s, argument)
        end_s = max(end_s, self._client_free_s)
        useful_s = load.n_tasks * load.task_s / cluster.workers
        return Outcome(end_s, useful_s / end_s, load.n_tasks / end_s, self._data_s)

    def _at(self, time_s: float, event: tuple[str, int]) -> None:
        self._n_events += 1
        heappush(self._events, (time_s, self._n_events, event))

    def _send(self, now: float) -> None:
        """The client makes a batch: half of its work for each."""
        self._n_sent += 1
        self._client_free_s = max(now, self._client_free_s) + self._costs.client_s / 2
        self._at(self._client_free_s + self._one_way_s, ("new", 0))

    def _host(self, now: float, host: int) -> None:
        first = host * self._cluster.per_host
        self._with_room[0].update(
            dict.fromkeys(range(first, min(first + self._cluster.per_host, self._cluster.workers)))
        )
        self._assign(now)

    def _new(self, now: float, _: int) -> None:
        self._schedule(now)
        self._queued += 1
        self._assign(self._scheduler_free_s)

    def _ended(self, now: float, worker: int) -> None:
        self._schedule(now)
        self._put(worker, self._n_on[worker] - 1)
        self._at(self._scheduler_free_s + self._back_s, ("result", 0))
        self._assign(self._scheduler_free_s)

    def _schedule(self, now: float) -> None:
        self._scheduler_free_s = max(now, self._scheduler_free_s) + self._costs.scheduler_s / 2

    def _assign(self, now: float) -> None:
        while self._queued and (n_idle := sum(map(len, self._with_room))):
            worker = next(workers for workers in self._with_room if workers).popitem(last=False)[0]
            self._queued -= 1
            self._scheduler_free_s = max(now, self._scheduler_free_s) + self._costs.choice_s * n_idle
            self._start(worker, self._scheduler_free_s + self._one_way_s)

    def _put(self, worker: int, n_on: int) -> None:
        if self._n_on[worker] < _PER_WORKER:
            self._with_room[self._n_on[worker]].pop(worker, None)
        self._n_on[worker] = n_on
        if n_on < _PER_WORKER:
            self._with_room[n_on][worker] = None

    def _start(self, worker: int, there_s: float) -> None:
        self._put(worker, self._n_on[worker] + 1)
        overhead_s = self._costs.worker_s
        if self._cluster.shared_cores is not None:
            # All workers are one process.
            self._workers_free_s = there_s = max(there_s, self._workers_free_s) + overhead_s
            overhead_s = 0.0
        length_s = self._load.task_s * (0.5 + self._n_started * _GOLDEN % 1.0)
        self._n_started += 1
        self._free_at[worker] = max(there_s, self._free_at[worker]) + overhead_s + length_s
        self._at(self._free_at[worker] + self._one_way_s, ("ended", worker))

    def _result(self, now: float, _: int) -> None:
        self._client_free_s = max(now, self._client_free_s) + self._costs.client_s / 2
        self._n_done += 1
        if self._n_sent < self._load.n_tasks:
            self._send(now)


# ---- questions


def without(part: str, costs: Costs, cluster: Cluster, load: Load) -> tuple[Costs, Cluster, Load]:
    """Return the same call with a part that takes no time."""
    if part == "client":
        return replace(costs, client_s=0.0), cluster, load
    if part == "scheduler":
        return replace(costs, scheduler_s=0.0, choice_s=0.0, heartbeat_s=0.0), cluster, load
    if part == "round trips":
        return replace(costs, waits_s=0.0), replace(cluster, latency_s=0.0), load
    if part == "data":
        return costs, cluster, replace(load, nbytes=0.0)
    raise ValueError(f"part is {part!r}, but must be one of {', '.join(PARTS)}.")


PARTS: Final = ("client", "scheduler", "round trips", "data")


def limit_of(costs: Costs, cluster: Cluster, load: Load) -> tuple[str, Outcome]:
    """Return the part without which the call would end soonest, and what comes of it with all of them.

    "workers" if they are busy all but a tenth of the time; "tail" if it is that some of them have nothing left.
    """
    outcome = simulate(costs, cluster, load)
    if outcome.efficiency >= _IS_BUSY:
        return "workers", outcome
    gains = {
        part: outcome.seconds - simulate(*without(part, costs, cluster, load)).seconds
        for part in PARTS
        if part != "data" or load.nbytes
    }
    best = max(gains, key=lambda part: gains[part])
    lost_s = outcome.seconds * (1.0 - outcome.efficiency)
    return ("tail" if gains[best] < lost_s / 4 else best), outcome


def shortest_task_s(
    costs: Costs, cluster: Cluster, *, per_worker: int, efficiency: float, nbytes: float = 0.0
) -> float:
    """Return the length of tasks from which on the workers are so busy; infinity if none to 10,000 s is enough."""
    low, high = 1e-4, 1e4
    if simulate(costs, cluster, Load(per_worker * cluster.workers, high, nbytes)).efficiency < efficiency:
        return math.inf
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        load = Load(per_worker * cluster.workers, middle, nbytes)
        is_enough = simulate(costs, cluster, load).efficiency >= efficiency
        low, high = (low, middle) if is_enough else (middle, high)
    return high
