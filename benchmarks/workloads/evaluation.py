"""Cross-validation and inspection of estimators, alone and again and again."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_selection import RFECV
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegressionCV, SGDClassifier
from sklearn.model_selection import cross_val_predict, cross_val_score, learning_curve
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from .base import Workload
from .data import blobs, digits


def _boosting(data: Any, n_jobs: int) -> Any:
    return cross_val_score(HistGradientBoostingClassifier(max_iter=40, random_state=0), *data, cv=5, n_jobs=n_jobs)


def _five_times(data: Any, n_jobs: int) -> Any:
    trees = [DecisionTreeClassifier(max_depth=depth, random_state=0) for depth in (2, 4, 6, 8, 10)]
    return [cross_val_score(tree, *data, cv=5, n_jobs=n_jobs) for tree in trees]


def _predictions(data: Any, n_jobs: int) -> Any:
    return cross_val_predict(SVC(gamma=1e-3), *data, cv=5, n_jobs=n_jobs)


def _learning_curve(data: Any, n_jobs: int) -> Any:
    sgd = SGDClassifier(random_state=0, max_iter=15, tol=None)
    return learning_curve(sgd, *data, train_sizes=np.linspace(0.2, 1.0, 5), cv=5, n_jobs=n_jobs)


def _elimination(data: Any, n_jobs: int) -> Any:
    selection = RFECV(DecisionTreeClassifier(max_depth=8, random_state=0), cv=4, n_jobs=n_jobs).fit(*data)
    return selection.ranking_, np.asarray(selection.cv_results_["mean_test_score"])


def _fitted_forest() -> Any:
    data = blobs(800, 10)
    return RandomForestClassifier(20, random_state=0).fit(*data), *data


def _importance(state: Any, n_jobs: int) -> Any:
    return permutation_importance(*state, n_repeats=4, random_state=0, n_jobs=n_jobs).importances


def _penalty_path(data: Any, n_jobs: int) -> Any:
    model = LogisticRegressionCV(Cs=4, cv=4, max_iter=100, n_jobs=n_jobs)
    rows, labels = data
    return model.fit(rows / 16, labels).predict(rows / 16)


WORKLOADS = (
    Workload(
        "boosting-cv",
        "cross_val_score of HistGradientBoosting, which uses OpenMP",
        _boosting,
        lambda: blobs(3_000),
        quick=True,
    ),
    Workload(
        "repeated-cv", "5 short calls of cross_val_score, trees", _five_times, lambda: blobs(1_500), calls=5, quick=True
    ),
    Workload("cross-val-predict", "cross_val_predict of SVC on digits", _predictions, digits),
    Workload("learning-curve", "learning_curve of SGD, 5 sizes x 5 folds", _learning_curve, lambda: digits(900)),
    Workload("rfecv", "RFECV of a tree, 4 folds", _elimination, lambda: blobs(1_200)),
    Workload("importance", "permutation_importance of a forest, 10 features", _importance, _fitted_forest),
    Workload("logistic-cv", "LogisticRegressionCV, 4 folds", _penalty_path, lambda: digits(700)),
)
