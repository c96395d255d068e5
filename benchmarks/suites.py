"""The suites: `auto` asks whether ``tier="auto"`` beats every backend picked by hand, `calls` what a call costs.

`cluster` has the workloads of `auto`, for ``benchmarks/cluster.py``: the Dask tier beside the processes tier.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import rows


class Timed(Protocol):
    """What the harness needs of a workload."""

    @property
    def name(self) -> str:
        """The name on the command line."""

    @property
    def repeats(self) -> int:
        """Most warm calls in each process."""

    def prepare(self, row: str) -> Callable[[], Any]:
        """Build the data and return what is to be timed on ``row``."""

    def units(self, row: str) -> int:
        """Return by what the measured seconds are divided."""


@dataclass(frozen=True)
class Suite:
    """Workloads, the rows on which they run, and how they are run.

    Parameters
    ----------
    name : str
        Name on the command line.
    themes : tuple of str
        Modules with ``WORKLOADS``. A child imports only the one that it needs: what a process has imported is part
        of what starting workers costs.
    rows : mapping
        Row -> the context in which a workload runs there.
    is_pinned : bool
        Whether numerical libraries are held to one thread by environment variables, in every row. Users do not
        pin, and the threads that a backend grants are part of what it is.
    warm_budget_s : float
        Seconds of warm calls after which a process makes no more of them.
    settles_s : float
        Seconds from the entry of the context for which hybrid's calls after the first are not timed: it may still be
        starting workers beside them, which the other rows never do.
    """

    name: str
    themes: tuple[str, ...]
    rows: Mapping[str, Callable[[], AbstractContextManager[Any]]]
    is_pinned: bool
    warm_budget_s: float = math.inf
    settles_s: float = 0.0

    def modules(self) -> dict[str, str]:
        """Return the name of each workload and the module where it is."""
        return {workload.name: theme for theme in self.themes for workload in _workloads_of(theme)}

    def workload(self, name: str, theme: str) -> Any:
        """Return the workload called ``name`` of the module ``theme``."""
        return next(workload for workload in _workloads_of(theme) if workload.name == name)

    def has_enough(self, warm: list[float]) -> bool:
        """Return whether the warm calls of one process suffice: two if they are long, one if it is very long."""
        spent = sum(warm)
        return spent > self.warm_budget_s and (len(warm) >= 2 or spent > 4 * self.warm_budget_s)


def _workloads_of(theme: str) -> tuple[Any, ...]:
    workloads: tuple[Any, ...] = importlib.import_module(theme).WORKLOADS
    return workloads


_AUTO_THEMES = tuple(
    f"workloads.{theme}"
    for theme in (
        "tasks", "waiting", "arrays", "text", "searches", "evaluation", "ensembles", "meta_estimators", "neighbors"
    )
)  # fmt: skip

SUITES = {
    "auto": Suite("auto", _AUTO_THEMES, rows.AUTO_ROWS, is_pinned=False, warm_budget_s=1.0, settles_s=3.0),
    "cluster": Suite("cluster", _AUTO_THEMES, rows.CLUSTER_ROWS, is_pinned=False, warm_budget_s=1.0),
    "calls": Suite("calls", ("calls",), rows.CALLS_ROWS, is_pinned=True),
}
