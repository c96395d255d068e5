"""Estimators that fit other estimators side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.ensemble import (
    BaggingClassifier,
    GradientBoostingRegressor,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from .answers import thresholds
from .base import Workload
from .data import blobs, digits


def _bagging(data: Any, n_jobs: int) -> Any:
    bag = BaggingClassifier(DecisionTreeClassifier(max_depth=10), 40, random_state=0, n_jobs=n_jobs).fit(*data)
    return thresholds(bag.estimators_)


def _members() -> list[tuple[str, Any]]:
    return [
        ("svc", SVC(gamma=1e-3)),
        ("bayes", GaussianNB()),
        ("tree", DecisionTreeClassifier(random_state=0)),
        ("forest", RandomForestClassifier(20, random_state=0)),
    ]


def _voting(data: Any, n_jobs: int) -> Any:
    return VotingClassifier(_members(), n_jobs=n_jobs).fit(*data).predict(data[0])


def _stacking(data: Any, n_jobs: int) -> Any:
    stack = StackingClassifier(_members(), DecisionTreeClassifier(random_state=0), cv=3, n_jobs=n_jobs)
    return stack.fit(*data).predict(data[0])


def _one_vs_rest(data: Any, n_jobs: int) -> Any:
    return OneVsRestClassifier(SVC(gamma=1e-3), n_jobs=n_jobs).fit(*data).predict(data[0])


def _outputs() -> Any:
    rng = np.random.default_rng(0)
    data = rng.standard_normal((800, 10))
    return data, data @ rng.standard_normal((10, 6)) + rng.standard_normal((800, 6))


def _multi_output(data: Any, n_jobs: int) -> Any:
    model = MultiOutputRegressor(GradientBoostingRegressor(n_estimators=30, random_state=0), n_jobs=n_jobs)
    return model.fit(*data).predict(data[0])


def _logistic_bagging(data: Any, n_jobs: int) -> Any:
    rows, labels = data
    bag = BaggingClassifier(LogisticRegression(max_iter=200), 16, random_state=0, n_jobs=n_jobs)
    return bag.fit(rows / 16, labels).predict(rows / 16)


WORKLOADS = (
    Workload("bagging", "BaggingClassifier of 40 trees", _bagging, lambda: blobs(2_000), quick=True),
    Workload("bagging-lbfgs", "BaggingClassifier of 16 logistic regressions", _logistic_bagging, lambda: digits(800)),
    Workload("voting", "VotingClassifier of 4 unequal members", _voting, lambda: digits(1_200)),
    Workload("stacking", "StackingClassifier of 4 unequal members", _stacking, lambda: digits(800), quick=True),
    Workload("one-vs-rest", "OneVsRestClassifier of 10 SVC", _one_vs_rest, lambda: digits(1_200)),
    Workload("multi-output", "MultiOutputRegressor of 6 gradient boostings", _multi_output, _outputs),
)
