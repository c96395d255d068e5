"""What is known of a kind of task: what the batches of a call showed, and what earlier calls left. Pure numbers.

All times are seconds. A task's time is cleared of the time in which its thread was ready to run and the machine was
busy with others, so that a busy machine is not mistaken for code that does not scale. What remains beyond the CPU time
is waiting: for the GIL, for memory, for I/O.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

__all__ = ["BatchSeen", "Experience", "TierSeen", "solo_seconds"]

#: How much the newest call counts against all earlier ones.
_NEWEST: Final = 0.5

#: Calls after which what is known of tiers that are not used is forgotten, since the machine may have been busy then.
_FORGETS_AFTER: Final = 64

#: Below this share of CPU time a task on a tier was kept waiting.
_WAITS: Final = 0.75

#: Tasks that together used about one core or more, and waited, waited for the GIL; with less it was something outside.
_ONE_CORE: Final = 0.75

#: Seconds below which a time is none.
_SHORTEST_S: Final = 1e-9

#: Seconds beyond which a time is nonsense: a year.
_LONGEST_S: Final = 3.2e7


class BatchSeen(NamedTuple):
    """What a finished batch showed."""

    tier: str
    n_tasks: int
    #: Seconds from its start to its end where it ran, of which ``delay_s`` ready to run on a busy machine.
    wall_s: float
    cpu_s: float
    delay_s: float = 0.0
    #: Seconds since the batch before it in which the call had anything running. The time in which a slow generator
    #: kept everybody waiting is not among them; what handing over and taking back cost is.
    #: None if batches ran on other tiers, too: then it tells nothing of this one.
    busy_s: float | None = 0.0
    #: Batches of the call that ran at that time, itself among them.
    n_together: int = 1


@dataclass
class TierSeen:
    """The sums over the batches of a call on one tier."""

    n_batches: int = 0
    n_together: int = 0
    n_tasks: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    busy_s: float = 0.0
    delay_s: float = 0.0
    #: Tasks that got done in ``busy_s``.
    n_paced: int = 0

    def add(self, batch: BatchSeen) -> None:
        """Take a batch in; times that a jumping clock made are taken as zero."""
        wall_s, cpu_s, delay_s = _sane(batch.wall_s), _sane(batch.cpu_s), _sane(batch.delay_s)
        self.n_batches += 1
        self.n_together += batch.n_together
        self.n_tasks += batch.n_tasks
        self.wall_s += max(wall_s - delay_s, min(cpu_s, wall_s))
        self.cpu_s += cpu_s
        if batch.busy_s is not None:
            self.busy_s += _sane(batch.busy_s)
            self.delay_s += min(delay_s, wall_s)
            self.n_paced += batch.n_tasks

    @property
    def task_s(self) -> float:
        """The mean time of a task here, beside its neighbours."""
        return self.wall_s / max(1, self.n_tasks)

    @property
    def efficiency(self) -> float:
        """CPU time over time: 1 for a task that computes and is never kept from it. Zero times count as that."""
        return self.cpu_s / self.wall_s if self.wall_s > 0 else 1.0

    def pace_s(self, n_jobs: int) -> float:
        """Return the seconds in which the call got a task done here, all jobs together, were the machine not busy."""
        n_jobs = max(1, n_jobs)
        pace_s = (self.busy_s - self.delay_s / n_jobs) / max(1, self.n_paced)
        return max(pace_s, self.cpu_s / max(1, self.n_tasks) / n_jobs)

    def useful_slots(self, n_jobs: int, cores: int) -> float:
        """Return how many of ``n_jobs`` such tasks a machine with ``cores`` can run at full speed at once."""
        return min(n_jobs, max(1.0, cores / max(self.efficiency, 1e-3)))


@dataclass(frozen=True)
class Experience:
    """What earlier calls showed of a kind of task.

    Parameters
    ----------
    solo_s : float
        Seconds of a task that runs alone.
    n_tasks : float
        Tasks in a call.
    task_s : mapping of str to float
        Seconds of a task on each tier that was used, beside its neighbours.
    efficiency : mapping of str to float
        CPU time over time there.
    pace_s : mapping of str to float
        Seconds in which a call there got a task done, all jobs together.
    n_calls : float
        Calls that showed it.
    """

    solo_s: float
    n_tasks: float
    task_s: Mapping[str, float] = field(default_factory=dict)
    efficiency: Mapping[str, float] = field(default_factory=dict)
    pace_s: Mapping[str, float] = field(default_factory=dict)
    n_calls: float = 1.0

    def merged(self, newer: Experience) -> Experience:
        """Return what is known after a newer call.

        Tiers that it did not use keep what was known of them for some calls; then they get another chance.
        """
        older = self if (self.n_calls + 1) % _FORGETS_AFTER else Experience(self.solo_s, self.n_tasks)
        return Experience(
            _mean(self.solo_s, newer.solo_s),
            _mean(self.n_tasks, newer.n_tasks),
            _merged(older.task_s, newer.task_s),
            _merged(older.efficiency, newer.efficiency),
            _merged(older.pace_s, newer.pace_s),
            self.n_calls + 1,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a file."""
        return {
            "solo_s": self.solo_s,
            "n_tasks": self.n_tasks,
            "task_s": dict(self.task_s),
            "efficiency": dict(self.efficiency),
            "pace_s": dict(self.pace_s),
            "n_calls": self.n_calls,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Experience:
        """Return what :meth:`as_dict` wrote.

        Raises
        ------
        ValueError
            If ``data`` is anything else, a number out of its range included.
        """
        if not isinstance(data, dict) or data.keys() != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("an entry is not that of a kind of task")
        numbers = {name: _number(data[name]) for name in ("solo_s", "n_tasks", "n_calls")}
        by_tier = {name: _numbers(data[name]) for name in ("task_s", "efficiency", "pace_s")}
        if by_tier["task_s"].keys() != by_tier["efficiency"].keys():
            raise ValueError("it is not known of each tier what is known of another")
        return cls(numbers["solo_s"], numbers["n_tasks"], **by_tier, n_calls=numbers["n_calls"])


def solo_seconds(seen: Mapping[str, TierSeen]) -> float | None:
    """Return the mean time of a task that runs alone, from all that was seen of a call; None if nothing was.

    The calling thread shows it directly. On threads, tasks that waited while all of them together used one core waited
    for each other's GIL: alone they need their CPU time. Elsewhere, and with less than a core in all, what they waited
    for does not go away. All tasks count, wherever they ran: one that was long must not stand for those that were not.
    """
    n_tasks = sum(tier.n_tasks for tier in seen.values())
    if not n_tasks:
        return None
    return sum(_alone_s(name, tier) for name, tier in seen.items()) / n_tasks


def _alone_s(name: str, tier: TierSeen) -> float:
    """Return the seconds that all tasks of ``tier`` would have taken one by one."""
    if name != "threads":
        return tier.wall_s
    cores_used = tier.efficiency * tier.n_together / max(1, tier.n_batches)
    waited_for_others = tier.efficiency < _WAITS and cores_used >= _ONE_CORE
    return tier.cpu_s if waited_for_others else tier.wall_s


def _sane(seconds: float) -> float:
    return seconds if 0.0 <= seconds <= _LONGEST_S else 0.0


def _mean(older: float, newer: float) -> float:
    return (1 - _NEWEST) * older + _NEWEST * newer


def _merged(older: Mapping[str, float], newer: Mapping[str, float]) -> dict[str, float]:
    return {**older, **{name: _mean(older.get(name, value), value) for name, value in newer.items()}}


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _LONGEST_S:
        raise ValueError("it is not a number of seconds or tasks")
    # What is next to nothing is nothing: divided by, it would be more than any number.
    return float(value) if value >= _SHORTEST_S else 0.0


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("it is not a number for each tier")
    return {name: _number(number) for name, number in value.items()}
