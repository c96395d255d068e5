"""Distances: compiled code that scikit-learn asks to run on threads, and large results.

``pairwise_distances(n_jobs=-1)`` itself names joblib's threading backend, so that no context reaches it: the slices
are given out as it does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.metrics.pairwise import manhattan_distances
from sklearn.neighbors import KNeighborsClassifier

from .base import Workload
from .data import blobs


def _knn_data() -> Any:
    data, labels = blobs(12_000, 8)
    return KNeighborsClassifier(algorithm="kd_tree").fit(data[:6_000], labels[:6_000]), data[6_000:]


def _knn(state: Any, n_jobs: int) -> Any:
    model, rows = state
    return model.set_params(n_jobs=n_jobs).predict(rows)


def _distances(data: Any, n_jobs: int) -> Any:
    tasks = (delayed(manhattan_distances)(data[i : i + 150], data) for i in range(0, len(data), 150))
    return np.vstack(Parallel(n_jobs=n_jobs)(tasks))


def _noise() -> Any:
    return np.random.default_rng(0).standard_normal((2_000, 60))


WORKLOADS = (
    Workload("knn", "KNeighborsClassifier.predict, k-d tree", _knn, _knn_data),
    Workload("distances", "manhattan_distances by slices, 32 MB of results", _distances, _noise, quick=True),
)
