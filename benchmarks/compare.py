"""The `auto` suite's numbers compared: ratios, geometric means, goals. Pure: the JSON document in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from rows import HYBRID, PLAIN

#: Rows that hybrid is to beat, each picked by hand.
PEERS = (PLAIN, "threading", "loky", "multiprocessing", "dask")

#: What a call that is too small to distribute may take beyond the loop.
SMALL_FACTOR, SMALL_ALLOWANCE_S = 1.10, 0.5e-3

WARM, COLD = "warm", "cold"


@dataclass(frozen=True)
class Row:
    """One workload, as measured on all rows of the suite."""

    name: str
    measured: dict[str, Any]

    @property
    def is_small(self) -> bool:
        """Return whether a plain loop is expected to win."""
        return bool(self.measured["small"])

    def seconds(self, row: str, when: str) -> float | None:
        """Return what ``row`` took, or None if it was not measured, failed or answered differently."""
        result = self.measured["rows"].get(row)
        return result[when] if result and not result["error"] else None

    def best_peer(self, when: str) -> tuple[str, float] | None:
        """Return the fastest peer and its time."""
        times = {peer: taken for peer in PEERS if (taken := self.seconds(peer, when)) is not None}
        return min(times.items(), key=lambda item: item[1]) if times else None

    def against_best(self, when: str) -> float | None:
        """Return hybrid's time divided by that of the fastest peer."""
        best = self.best_peer(when)
        return _ratio(self.seconds(HYBRID, when), best[1] if best else None)

    def beside_best(self, row: str, when: str) -> float | None:
        """Return the time of ``row`` divided by that of the fastest peer, itself if it is that."""
        best = self.best_peer(when)
        return _ratio(self.seconds(row, when), best[1] if best else None)

    def against(self, peer: str, when: str) -> float | None:
        """Return hybrid's time divided by that of ``peer``."""
        return _ratio(self.seconds(HYBRID, when), self.seconds(peer, when))

    def small_excess(self, when: str) -> float | None:
        """Return hybrid's time divided by what the loop's time allows: 1 or less is within."""
        loop = self.seconds(PLAIN, when)
        allowed = None if loop is None else SMALL_FACTOR * loop + SMALL_ALLOWANCE_S * self.measured["calls"]
        return _ratio(self.seconds(HYBRID, when), allowed)


def rows_of(document: dict[str, Any]) -> list[Row]:
    """Return the workloads of a document."""
    return [Row(name, measured) for name, measured in document["workloads"].items()]


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of those values that are there."""
    logarithms = [math.log(value) for value in values if value]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def worst(rows: Iterable[Row], ratio: Callable[[Row], float | None]) -> tuple[float, str] | None:
    """Return the largest ratio and the name of its workload."""
    return max(((value, row.name) for row in rows if (value := ratio(row)) is not None), default=None)


@dataclass(frozen=True)
class Verdict:
    """A goal, its limit, what was measured (None: it was not) and where."""

    goal: str
    limit: float
    measured: float | None
    where: str = ""

    @property
    def is_reached(self) -> bool | None:
        """Return whether the goal is reached; None if it was not measured."""
        return None if self.measured is None else self.measured <= self.limit


def verdicts(document: dict[str, Any]) -> list[Verdict]:
    """Return the goals of the issue, as this document meets them."""
    rows = rows_of(document)
    found = [_worst(rows, WARM, 1.10), _worst(rows, COLD, 1.15)]
    for when in (WARM, COLD):
        found.append(_mean(rows, "best peer", when, 0.90, lambda row, when=when: row.against_best(when)))
    for when, limit in ((WARM, 0.65), (COLD, 0.45)):
        found.append(_mean(rows, "loky", when, limit, lambda row, when=when: row.against("loky", when)))
    for when in (WARM, COLD):
        small = worst((row for row in rows if row.is_small), lambda row, when=when: row.small_excess(when))
        found.append(Verdict(f"small calls: hybrid / (1.10 loop + 0.5 ms per call), {when}", 1.0, *(small or (None,))))
    found.append(Verdict("planner's own cost per batch, µs", 20.0, *(_planning_cost(rows) or (None,))))
    return [*found, Verdict("workloads that hybrid answers wrongly or not at all", 0.0, *_wrong(rows))]


def _worst(rows: list[Row], when: str, limit: float) -> Verdict:
    # Where a loop wins, microseconds against microseconds, the goal is the one for small calls.
    found = worst((row for row in rows if not row.is_small), lambda row: row.against_best(when))
    return Verdict(f"worst hybrid / best peer, {when} (small calls apart)", limit, *(found or (None,)))


def _mean(rows: list[Row], than: str, when: str, limit: float, ratio: Callable[[Row], float | None]) -> Verdict:
    found = worst(rows, ratio)
    where = [f"worst {found[0]:.2f}, {found[1]}"] if found else []
    if missing := sum(ratio(row) is None for row in rows):
        where.append(f"{missing} of {len(rows)} workloads have no ratio")
    mean = geometric_mean(map(ratio, rows))
    return Verdict(f"geometric mean hybrid / {than}, {when}", limit, mean, "; ".join(where))


def _planning_cost(rows: list[Row]) -> tuple[float, str] | None:
    """Return the most microseconds per batch that hybrid's reports give for planning, if they do.

    Of each workload the median of its calls: a garbage collection that happens to run meanwhile is not planning.
    """

    def cost(row: Row) -> float | None:
        reports = row.measured["rows"].get(HYBRID, {}).get("reports", ())
        costs = [
            1e6 * report["planning_seconds"] / report["batches"]
            for report in reports
            if isinstance(report.get("planning_seconds"), float) and report.get("batches")
        ]
        return median(costs) if costs else None

    return worst(rows, cost)


def _wrong(rows: list[Row]) -> tuple[float | None, str]:
    """Return how many workloads hybrid answered differently or not at all, and which."""
    answered = [row for row in rows if HYBRID in row.measured["rows"] and PLAIN in row.measured["rows"]]
    wrong = [row.name for row in answered if row.measured["rows"][HYBRID]["error"]]
    return (float(len(wrong)) if answered else None, ", ".join(wrong))
