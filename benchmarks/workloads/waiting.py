"""Tasks that wait, and tasks that one has to wait for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from joblib import Parallel, delayed

from .base import Workload
from .tasks import collatz


def fetch(seconds: float, i: int) -> int:
    """Return the argument after a wait that stands for a request."""
    time.sleep(seconds)
    return i


def _requests(state: Any, n_jobs: int) -> list[int]:
    tasks = (delayed(fetch)(0.02 + 0.01 * (i % 4), i) for i in range(24))
    return Parallel(n_jobs=n_jobs)(tasks)  # type: ignore[no-any-return]


def _read_slowly(n: int) -> Iterator[Any]:
    """Yield tasks as a reader of files does: each one after a wait."""
    for i in range(n):
        time.sleep(0.015)
        yield delayed(collatz)(10_000 + 100 * i, 1_500)


def _slow_generator(state: Any, n_jobs: int) -> list[int]:
    return Parallel(n_jobs=n_jobs)(_read_slowly(20))  # type: ignore[no-any-return]


WORKLOADS = (
    Workload("requests", "24 tasks that wait 20-50 ms, as for a server", _requests, quick=True),
    Workload("slow-generator", "20 tasks from a generator that takes 15 ms for each", _slow_generator, quick=True),
)
