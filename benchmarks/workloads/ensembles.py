"""Forests: fitting, and predicting in calls that are too small to distribute."""

from __future__ import annotations

from typing import Any

from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier

from .answers import thresholds
from .base import Workload
from .data import blobs


def _fit_forest(data: Any, n_jobs: int) -> Any:
    return thresholds(RandomForestClassifier(150, random_state=0, n_jobs=n_jobs).fit(*data).estimators_)


def _fit_extra_trees(data: Any, n_jobs: int) -> Any:
    return thresholds(ExtraTreesRegressor(80, random_state=0, n_jobs=n_jobs).fit(*data).estimators_)


def _fitted() -> Any:
    # Trees grown to the end vote 0 or 1: their sums are exact in every order.
    data, labels = blobs(1_000)
    return RandomForestClassifier(50, random_state=0).fit(data, labels), data


def _predict_one_row(state: Any, n_jobs: int) -> Any:
    forest, data = state
    return forest.set_params(n_jobs=n_jobs).predict_proba(data[:1])


def _predict_forty(state: Any, n_jobs: int) -> Any:
    forest, data = state
    forest.set_params(n_jobs=n_jobs)
    return [forest.predict(data[25 * i : 25 * i + 25]) for i in range(40)]


WORKLOADS = (
    Workload("forest-fit", "RandomForestClassifier, 150 trees", _fit_forest, lambda: blobs(2_000), quick=True),
    Workload("extra-trees-fit", "ExtraTreesRegressor, 80 trees", _fit_extra_trees, lambda: blobs(2_000)),
    Workload(
        "forest-one-row", "a forest of 50 trees predicts one row", _predict_one_row, _fitted, 20, small=True, quick=True
    ),
    Workload(
        "forest-40-predictions",
        "a forest of 50 trees predicts 25 rows, 40 times",
        _predict_forty,
        _fitted,
        calls=40,
        small=True,
        quick=True,
    ),
)
