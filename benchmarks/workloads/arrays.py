"""Plain joblib code on arrays: one large, lists of them, BLAS, and a function of the user's own script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from .base import Workload

Array = np.ndarray[Any, Any]

USER_SCRIPT = Path(__file__).with_name("user_script.py")


def total(data: Array, power: int) -> float:
    """Return the sum over all of a large array, shifted by a number that the task is given."""
    return float(data.sum()) + power


def trimmed_means(parts: list[Array]) -> list[float]:
    """Return a robust mean of each array of a list."""
    return [float(np.sort(part)[len(part) // 10 : -len(part) // 10].mean()) for part in parts]


def singular_values(seed: int, size: int) -> Array:
    """Return the singular values of a random product: BLAS and LAPACK, on as many threads as they are given.

    Rounded, because the number of threads decides the order in which BLAS sums.
    """
    matrix = np.random.default_rng(seed).standard_normal((size, size))
    return np.round(np.linalg.svd(matrix @ matrix.T, compute_uv=False), 6)


def _numbers_80mb() -> Array:
    """Return whole numbers, whose sum is exact: NumPy's order of summation depends on where an array begins."""
    return np.random.default_rng(0).integers(-1_000, 1_000, 10_000_000).astype(float)


def _sums(data: Array, n_jobs: int) -> list[float]:
    return Parallel(n_jobs=n_jobs)(delayed(total)(data, power) for power in range(24))  # type: ignore[no-any-return]


def _lists() -> list[list[Array]]:
    noise = np.random.default_rng(0).standard_normal((12, 25, 20_000))
    return [list(parts) for parts in noise]


def _list_of_arrays(lists: list[list[Array]], n_jobs: int) -> list[list[float]]:
    return Parallel(n_jobs=n_jobs)(delayed(trimmed_means)(parts) for parts in lists)  # type: ignore[no-any-return]


def _blas(state: Any, n_jobs: int) -> list[Array]:
    return Parallel(n_jobs=n_jobs)(delayed(singular_values)(seed, 300) for seed in range(8))  # type: ignore[no-any-return]


def _main_module() -> Any:
    """Define the functions of ``user_script.py`` in ``__main__``, where a script's own functions are."""
    main = vars(sys.modules["__main__"])
    exec(compile(USER_SCRIPT.read_text(), str(USER_SCRIPT), "exec"), main)
    return main["simulate"]


def _user_function(simulate: Any, n_jobs: int) -> list[float]:
    return Parallel(n_jobs=n_jobs)(delayed(simulate)(seed) for seed in range(16))  # type: ignore[no-any-return]


WORKLOADS = (
    Workload("array-sums", "24 sums over one array of 80 MB", _sums, _numbers_80mb, quick=True),
    Workload("list-of-arrays", "12 lists of 25 arrays of 160 kB each", _list_of_arrays, _lists, quick=True),
    Workload("blas", "8 tasks of matrix product and SVD", _blas, quick=True),
    Workload("main-function", "16 runs of a function of the user's own script", _user_function, _main_module),
)
