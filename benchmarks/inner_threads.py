"""What a second thread inside of a task brings, and what it costs: does CPU time tell how well a task divides?

It does not: most of this code uses the time of two cores and is hardly faster for it, or slower. So the planner does
not judge by the CPU time of the process how a task would do with one core (README.md, "What does not decide").

    python benchmarks/inner_threads.py
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
from machine import describe_machine, machine_line
from sklearn.cluster import KMeans
from sklearn.datasets import make_classification
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

_REPEATS = 7


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield names and pieces of code with threads inside."""
    for n in (1_000, 5_000, 30_000):
        data, y = make_classification(n, 20, random_state=0)
        boosting = HistGradientBoostingClassifier(max_iter=20, random_state=0)
        means, logistic = KMeans(8, n_init=1, random_state=0), LogisticRegression(max_iter=200)
        neighbors = KNeighborsClassifier(algorithm="brute")
        yield f"boosting, {n} rows", lambda model=boosting, data=data, y=y: model.fit(data, y)
        yield f"k-means, {n} rows", lambda model=means, data=data: model.fit(data)
        yield f"logistic regression, {n} rows", lambda model=logistic, data=data, y=y: model.fit(data, y)
        yield f"neighbours, {n} rows", lambda model=neighbors, data=data, y=y: model.fit(data, y).predict(data[:1_000])
    matrix = np.random.default_rng(0).random((800, 800))
    yield "matrix product, 800", lambda: matrix @ matrix
    yield "singular values, 300", lambda: np.linalg.svd(matrix[:300, :300])


def timed(run: Callable[[], Any], threads: int) -> tuple[float, float]:
    """Return the median seconds of ``run``, and of the CPU time over it, with so many threads inside."""
    seconds, shares = [], []
    with threadpool_limits(threads):
        run()
        for _ in range(_REPEATS):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds.append(time.perf_counter() - wall)
            shares.append((time.process_time() - cpu) / seconds[-1])
    return median(seconds), median(shares)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print(machine_line(describe_machine()), "", sep="\n")
    print("| code | one thread, ms | two, ms | times as fast | cores used by two |")
    print("|------|---------------:|--------:|--------------:|------------------:|")
    for name, run in cases():
        (one, _), (two, cores) = timed(run, 1), timed(run, 2)
        print(f"| {name} | {1e3 * one:.1f} | {1e3 * two:.1f} | {one / two:.2f} | {cores:.2f} |", flush=True)


if __name__ == "__main__":
    main()
