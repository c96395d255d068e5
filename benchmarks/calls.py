"""The `calls` suite: what a call, a task and a second search cost on each tier, and what they are meant to cost.

Tasks stand at module level, to pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

from joblib import Parallel, delayed
from rows import CALLS_PEERS, CALLS_STANDARD_ROWS, PLAIN


@dataclass(frozen=True)
class Goal:
    """``row`` is at least ``times`` as fast as ``than``; a workload states what it is meant to show."""

    row: str
    than: str
    times: float = 1.0
    when: str = "warm"

    def __str__(self) -> str:
        return f"{self.row} at least {self.times:g} times as fast as {self.than} ({self.when})"

    def is_met(self, results: dict[str, Any]) -> bool | None:
        """Return whether ``results`` meet the goal, or None when a row is missing or failed."""
        ours, theirs = results.get(self.row), results.get(self.than)
        if ours is None or theirs is None or ours.error or theirs.error:
            return None
        return bool(getattr(ours, self.when) * self.times <= getattr(theirs, self.when))


@dataclass(frozen=True)
class NothingMoved:
    """The calls of ``row`` after the first move no bytes, by the backend's own report."""

    row: str

    def __str__(self) -> str:
        return f"{self.row} moves nothing from its second call on"

    def is_met(self, results: dict[str, Any]) -> bool | None:
        """Return whether ``results`` meet the goal, or None when the row is missing or failed."""
        result = results.get(self.row)
        if result is None or result.error or len(result.reports) < 2:
            return None
        return all(report.get("nbytes_moved") == 0 for report in result.reports[1:])


@dataclass(frozen=True)
class CallsWorkload:
    """What is run on each row.

    Parameters
    ----------
    name : str
        Name on the command line and in the files.
    question : str
        What the numbers decide.
    run : callable
        Called with what ``setup`` returned, under the row's backend; uses it through ``joblib.Parallel``
        and returns an answer that does not depend on where it ran.
    plain : callable
        The same without joblib, for the same answer.
    setup : callable
        Called with the name of the row; builds the data. Not timed.
    repeats : int
        Warm calls in each process.
    tasks : callable
        Tasks in one call on a row, when the table is to show seconds per task instead of per call.
    rows : tuple of str
        Rows that take part.
    goals : tuple
        What is meant to hold.
    """

    name: str
    question: str
    run: Callable[[Any], Any]
    plain: Callable[[Any], Any]
    setup: Callable[[str], Any] = str
    repeats: int = 5
    tasks: Callable[[str], int] | None = None
    rows: tuple[str, ...] = CALLS_STANDARD_ROWS
    goals: tuple[Goal | NothingMoved, ...] = ()

    def prepare(self, row: str) -> Callable[[], Any]:
        """Build the data and return what is to be timed on ``row``."""
        state = self.setup(row)
        run = self.plain if row == PLAIN else self.run
        return lambda: run(state)

    def units(self, row: str) -> int:
        """Return by what the measured seconds are divided: the tasks of a call, or 1."""
        return self.tasks(row) if self.tasks else 1

    @property
    def unit(self) -> str:
        """Return what one number in the table is the time of."""
        return "task" if self.tasks else "call"


# A warm call of two tasks that do nothing: what one call costs. -------------------------------------------


def no_op(i: int) -> int:
    """Return the argument."""
    return i


def _two_tasks(state: Any) -> list[int]:
    return Parallel()(delayed(no_op)(i) for i in range(2))  # type: ignore[no-any-return]


TWO_TASKS = CallsWorkload(
    name="two-tasks",
    question="What does one call cost when the workers are there already?",
    run=_two_tasks,
    plain=lambda state: [no_op(i) for i in range(2)],
    repeats=30,
    goals=tuple(
        Goal(f"hybrid {tier}", peer, 20) for tier in ("threads", "processes") for peer in ("loky", "threading")
    ),
)

# Many tiny tasks, batched by joblib. ----------------------------------------------------------------------


def _tiny_tasks(state: Any) -> list[float]:
    return Parallel()(delayed(sqrt)(i**2) for i in range(5_000))  # type: ignore[no-any-return]


TINY_TASKS = CallsWorkload(
    name="tiny-tasks",
    question="What do 5,000 tasks of a microsecond each cost, with batch_size='auto'?",
    run=_tiny_tasks,
    plain=lambda state: [sqrt(i**2) for i in range(5_000)],
    goals=tuple(Goal("hybrid auto", peer) for peer in CALLS_PEERS),
)

# One task per batch: what a batch costs. ------------------------------------------------------------------


def _n_single_tasks(row: str) -> int:
    # Only so that no row needs minutes; the table shows seconds per task.
    return 300 if "dask" in row or row == "client.submit" else 2_000


def _single_tasks(row: str) -> bool:
    n_tasks = _n_single_tasks(row)
    if row == "client.submit":
        results = _bare_submits(n_tasks)
    else:
        results = Parallel(batch_size=1)(delayed(no_op)(i) for i in range(n_tasks))
    return bool(results == list(range(n_tasks)))


def _bare_submits(n_tasks: int) -> list[int]:
    from distributed import get_client

    client = get_client()
    return client.gather([client.submit(no_op, i, pure=False) for i in range(n_tasks)])  # type: ignore[no-any-return]


SINGLE_TASKS = CallsWorkload(
    name="single-tasks",
    question="How many batches a second does each tier reach, with batch_size=1?",
    run=_single_tasks,
    plain=lambda row: [no_op(i) for i in range(_n_single_tasks(row))] == list(range(_n_single_tasks(row))),
    repeats=3,
    tasks=_n_single_tasks,
    rows=(PLAIN, "sequential", *CALLS_PEERS, "client.submit", *CALLS_STANDARD_ROWS[4:]),
    goals=(
        Goal("hybrid inline", "sequential"),
        Goal("hybrid threads", "threading"),
        Goal("hybrid processes", "loky"),
        Goal("hybrid dask", "dask", 2),
        Goal("hybrid dask", "client.submit", 0.8),
    ),
)

# The same search twice over an array of 240 MB. -----------------------------------------------------------


def _search_data(row: str) -> tuple[Any, Any, Any]:
    import numpy as np
    from sklearn.model_selection import GridSearchCV
    from sklearn.naive_bayes import GaussianNB

    generator = np.random.default_rng(0)
    data = generator.standard_normal((1_000_000, 30))
    labels = (data[:, 0] + generator.standard_normal(len(data)) > 0).astype(int)
    return GridSearchCV(GaussianNB(), {"var_smoothing": [1e-9, 1e-3, 0.1, 1.0]}, cv=2), data, labels


def _search(state: tuple[Any, Any, Any], n_jobs: int | None = None) -> dict[str, Any]:
    search, data, labels = state
    search.set_params(n_jobs=n_jobs).fit(data, labels)
    timings = ("mean_fit_time", "std_fit_time", "mean_score_time", "std_score_time")
    table = {name: list(column) for name, column in search.cv_results_.items() if name not in timings}
    return {"best": search.best_params_, "table": table}


SEARCH_TWICE = CallsWorkload(
    name="search-twice",
    question="What does a second search over the same 240 MB cost, under one context?",
    run=_search,
    plain=lambda state: _search(state, n_jobs=1),
    setup=_search_data,
    repeats=2,
    goals=(
        *(NothingMoved(f"hybrid {tier}") for tier in ("auto", "processes", "dask")),
        *(Goal(f"hybrid {tier}", "loky") for tier in ("auto", "processes")),
    ),
)

WORKLOADS = (TWO_TASKS, TINY_TASKS, SINGLE_TASKS, SEARCH_TWICE)
