"""Plain joblib code: many tiny tasks, few long ones, pure Python, compiled code, tasks of uneven length."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from .base import Workload


def collatz(start: int, n: int) -> int:
    """Return the steps of ``n`` Collatz sequences: a loop in pure Python, about 10 µs per number."""
    steps = 0
    for number in range(start, start + n):
        while number > 1:
            number = number // 2 if number % 2 == 0 else 3 * number + 1
            steps += 1
    return steps


def sort_noise(seed: int, size: int) -> float:
    """Return the median of random numbers, by sorting them: one long piece of compiled code without the GIL."""
    values = np.random.default_rng(seed).standard_normal(size)
    values.sort()
    return float(values[size // 2])


def compress(seed: int) -> int:
    """Return the compressed size of 400 kB of text: compiled code that releases the GIL."""
    letters = np.random.default_rng(seed).integers(97, 113, 400_000, dtype=np.uint8)
    return len(zlib.compress(letters.tobytes(), 6))


def _tiny(state: Any, n_jobs: int) -> list[float]:
    return Parallel(n_jobs=n_jobs)(delayed(sqrt)(i**2) for i in range(5_000))  # type: ignore[no-any-return]


def _short(state: Any, n_jobs: int) -> list[int]:
    return Parallel(n_jobs=n_jobs)(delayed(collatz)(1 + i, 50) for i in range(600))  # type: ignore[no-any-return]


def _few_long(state: Any, n_jobs: int) -> list[float]:
    tasks = (delayed(sort_noise)(seed, 6_000_000) for seed in range(3))
    return Parallel(n_jobs=n_jobs)(tasks)  # type: ignore[no-any-return]


def _pure_python(state: Any, n_jobs: int) -> list[int]:
    tasks = (delayed(collatz)(10_000 + 100 * i, 6_000) for i in range(30))
    return Parallel(n_jobs=n_jobs)(tasks)  # type: ignore[no-any-return]


def _compiled(state: Any, n_jobs: int) -> list[int]:
    return Parallel(n_jobs=n_jobs)(delayed(compress)(seed) for seed in range(60))  # type: ignore[no-any-return]


def _mixed_sizes() -> list[int]:
    """Return the sizes of 200 short tasks and, among them, a huge one."""
    return [100] * 120 + [20_000] + [100] * 80


def _mixed(sizes: list[int], n_jobs: int) -> list[int]:
    return Parallel(n_jobs=n_jobs)(delayed(collatz)(5_000, n) for n in sizes)  # type: ignore[no-any-return]


def _consumed_one_by_one(state: Any, n_jobs: int) -> list[int]:
    tasks = (delayed(collatz)(10_000 + 100 * i, 1_500) for i in range(20))
    results: Iterator[int] = Parallel(n_jobs=n_jobs, return_as="generator")(tasks)
    return [steps + collatz(1_000, 300) for steps in results]


WORKLOADS = (
    Workload("tiny-tasks", "5,000 tasks of a microsecond", _tiny, repeats=10, small=True, quick=True),
    Workload("short-tasks", "600 tasks of a sixth of a millisecond, pure Python", _short, quick=True),
    Workload("few-long", "3 long tasks, NumPy sorts", _few_long),
    Workload("pure-python", "30 tasks, loops in pure Python", _pure_python, quick=True),
    Workload("compiled", "60 tasks of zlib, which releases the GIL", _compiled, quick=True),
    Workload("mixed-lengths", "a huge task among 200 short ones, pure Python", _mixed, _mixed_sizes, quick=True),
    Workload("return-as-generator", "20 results consumed one by one, with work between", _consumed_one_by_one),
)
