"""Distances: compiled code that scikit-learn asks to run on threads."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import pairwise_distances
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
    return pairwise_distances(data, metric="manhattan", n_jobs=n_jobs)


def _noise() -> Any:
    return np.random.default_rng(0).standard_normal((1_500, 60))


WORKLOADS = (
    Workload("knn", "KNeighborsClassifier.predict, k-d tree", _knn, _knn_data),
    Workload("distances", "pairwise_distances, 18 MB of answer", _distances, _noise, quick=True),
)
