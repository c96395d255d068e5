"""The workloads: what is run, why, and what it is meant to show. Tasks stand at module level, to pickle."""

from __future__ import annotations

from math import sqrt
from typing import Any

from harness import PLAIN, STANDARD_ROWS, Goal, NothingMoved, Workload
from joblib import Parallel, delayed

# A warm call of two tasks that do nothing: what one call costs. -------------------------------------------


def no_op(i: int) -> int:
    """Return the argument."""
    return i


def _two_tasks(state: Any) -> list[int]:
    return Parallel()(delayed(no_op)(i) for i in range(2))  # type: ignore[no-any-return]


TWO_TASKS = Workload(
    name="two-tasks",
    question="What does one call cost when the workers are there already?",
    run=_two_tasks,
    plain=lambda state: [no_op(i) for i in range(2)],
    repeats=30,
    goals=tuple(
        Goal(f"hybrid {tier}", peer, 20)
        for tier in ("threads", "processes")
        for peer in ("loky", "threading")
    ),
)

# Many tiny tasks, batched by joblib. ----------------------------------------------------------------------


def _tiny_tasks(state: Any) -> list[float]:
    return Parallel()(delayed(sqrt)(i**2) for i in range(5_000))  # type: ignore[no-any-return]


TINY_TASKS = Workload(
    name="tiny-tasks",
    question="What do 5,000 tasks of a microsecond each cost, with batch_size='auto'?",
    run=_tiny_tasks,
    plain=lambda state: [sqrt(i**2) for i in range(5_000)],
    goals=tuple(Goal("hybrid auto", peer) for peer in ("loky", "threading", "dask")),
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


SINGLE_TASKS = Workload(
    name="single-tasks",
    question="How many batches a second does each tier reach, with batch_size=1?",
    run=_single_tasks,
    plain=lambda row: [no_op(i) for i in range(_n_single_tasks(row))] == list(range(_n_single_tasks(row))),
    repeats=3,
    tasks=_n_single_tasks,
    rows=(PLAIN, "sequential", *STANDARD_ROWS[1:4], "client.submit", *STANDARD_ROWS[4:]),
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


SEARCH_TWICE = Workload(
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

WORKLOADS = {workload.name: workload for workload in (TWO_TASKS, TINY_TASKS, SINGLE_TASKS, SEARCH_TWICE)}
