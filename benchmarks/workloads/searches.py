"""Grid searches: small and large data, pandas, nested ``n_jobs``."""

from __future__ import annotations

from typing import Any

from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from .answers import search_answer
from .base import Workload
from .data import blobs, digits, frame, iris, noise_108mb


def _search(estimator: Any, grid: Any, cv: int, data: Any, n_jobs: int) -> Any:
    return search_answer(GridSearchCV(estimator, grid, cv=cv, n_jobs=n_jobs).fit(*data))


def _iris_search(data: Any, n_jobs: int) -> Any:
    return _search(DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2, 3]}, 3, data, n_jobs)


def _svc_search(data: Any, n_jobs: int) -> Any:
    return _search(SVC(), {"C": [1, 10], "gamma": [1e-3, 1e-4]}, 5, data, n_jobs)


def _tree_search(data: Any, n_jobs: int) -> Any:
    grid = {"max_depth": [4, 8, None], "min_samples_leaf": [1, 5, 20, 50]}
    return _search(DecisionTreeClassifier(random_state=0), grid, 5, data, n_jobs)


def _large_search(data: Any, n_jobs: int) -> Any:
    return _search(GaussianNB(), {"var_smoothing": [1e-9, 1e-3, 0.1]}, 2, data, n_jobs)


def _nested_forest(data: Any, n_jobs: int) -> Any:
    forest = RandomForestClassifier(40, random_state=0, n_jobs=n_jobs)
    return _search(forest, {"max_features": [0.1, 0.3, 0.5]}, 3, data, n_jobs)


def _pandas_search(data: Any, n_jobs: int) -> Any:
    numbers = [f"x{i}" for i in range(6)]
    columns = make_column_transformer((StandardScaler(), numbers), (OneHotEncoder(), ["city", "plan"]))
    pipe = make_pipeline(columns, LogisticRegression(max_iter=200))
    return _search(pipe, {"logisticregression__C": [0.01, 0.1, 1.0, 10.0]}, 5, data, n_jobs)


WORKLOADS = (
    Workload(
        "iris-search", "GridSearchCV of a tree on 150 rows, 3 x 3 fits", _iris_search, iris, 10, small=True, quick=True
    ),
    Workload("svc-search", "GridSearchCV of SVC on digits, 4 x 5 fits", _svc_search, digits, quick=True),
    Workload("tree-search", "GridSearchCV of a tree, 12 x 5 fits", _tree_search, lambda: blobs(1_500)),
    Workload("large-search", "GridSearchCV of naive Bayes on 108 MB, 3 x 2", _large_search, noise_108mb, quick=True),
    Workload(
        "nested-forest", "GridSearchCV of a forest, n_jobs=-1 in both", _nested_forest, lambda: blobs(1_200), quick=True
    ),
    Workload("pandas-search", "GridSearchCV of a ColumnTransformer pipeline, 4 x 5 fits", _pandas_search, frame),
)
