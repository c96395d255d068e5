"""Searches fit each common prefix of their pipelines once, and answer as plain scikit-learn does.

Steps that are counted take a few milliseconds each: what takes less is not worth sharing, and is not shared.
"""

import json
import os
import pickle
import time
import warnings
from collections import Counter

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from conftest import REAL_TIERS, make_hybrid, resident_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_classification
from sklearn.decomposition import PCA
from sklearn.exceptions import FitFailedWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    StratifiedKFold,
    validation_curve,
)
from sklearn.model_selection import _validation as sklearn_validation
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from test_sklearn_estimators import differences

import joblib_backends
from joblib_backends.data import shelf
from joblib_backends.data.content import content_of
from joblib_backends.sharing import sklearn_inside
from joblib_backends.sharing.task import _Method

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

X, y = make_classification(60, 6, n_informative=4, n_redundant=0, flip_y=0.1, random_state=0)
TREE = DecisionTreeClassifier(max_depth=3, random_state=0)

#: Seconds that a counted step takes: far more than it costs to share it.
WORTH_S = 0.005


@pytest.fixture(params=REAL_TIERS)
def tier(request):
    return request.param


# ---- counting, in whichever process


class Counting(TransformerMixin, BaseEstimator):
    """Adds ``shift`` times the mean that it learned, and writes a line for each fit and transform."""

    def __init__(self, log, shift=1, random_state=0):
        self.log = log
        self.shift = shift
        self.random_state = random_state

    def _note(self, method, *data):
        line = json.dumps([method, repr(self.shift), content_of(data).hex()])
        with open(self.log, "a") as file:
            file.write(f"{line}\n")
        time.sleep(WORTH_S)

    def fit(self, X, y=None):
        self.mean_ = np.asarray(X).mean(axis=0)
        return self

    def fit_transform(self, X, y=None):
        self._note("fit", np.asarray(X), np.asarray(y))
        return self.fit(X)._moved(X)

    def transform(self, X):
        self._note("transform", np.asarray(X), self.mean_)
        return self._moved(X)

    def _moved(self, X):
        # Another result for another type, though the values are equal.
        of_type = {int: 0.0, float: 0.25, bool: 0.5}[type(self.shift)]
        return np.asarray(X) + self.mean_ * (self.shift + of_type)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log"
    path.touch()
    return str(path)


def counts(log):
    """Return how often each fit and transform ran; the log is empty afterwards."""
    with open(log, "r+") as file:
        lines = Counter(file.read().splitlines())
        file.truncate(0)
    return lines


def fits(lines):
    return sum(number for line, number in lines.items() if '"fit"' in line)


def search(estimator, grid, **options):
    options = {"cv": 3, "refit": False, **options}
    return GridSearchCV(estimator, grid, **options)


def shelves():
    """Return the folders of shelves that are still there."""
    return [path for path in resident_files() if os.path.isdir(path)]


def same_results(one, other):
    """Say where two searches differ, the times apart."""
    plain, shared = ({k: v for k, v in s.cv_results_.items() if "_time" not in k} for s in (one, other))
    return differences(plain, shared)


def check_search(open_backend, estimator, grid, X=X, y=y, fit_params=None, **options):
    """Run a search alone and on a backend, compare, and return the report of the latter."""
    alone = search(clone(estimator), grid, n_jobs=1, **options).fit(X, y, **(fit_params or {}))
    with open_backend():
        shared = search(clone(estimator), grid, n_jobs=2, **options).fit(X, y, **(fit_params or {}))
    assert not same_results(alone, shared)
    assert not shelves()
    return joblib_backends.last_report()


def counting_pipeline(log):
    return Pipeline([("first", Counting(log)), ("second", Counting(log)), ("tree", TREE)])


DEPTHS = {"tree__max_depth": [1, 2, 3]}


def test_a_common_prefix_is_fitted_once_and_test_data_transformed_once(hybrid, log):
    check_search(hybrid, counting_pipeline(log), {**DEPTHS, "second__shift": [1, 2]}, return_train_score=True)
    lines = counts(log)
    # Alone first: for each of 6 candidates and 3 folds 2 fits, and 2 transforms each of test and training data.
    alone = 6 * 3 * 2
    distinct = 3 + 2 * 3
    assert fits(lines) == alone + distinct
    assert sum(lines.values()) - fits(lines) == 2 * (alone + distinct)
    report = joblib_backends.last_report()
    assert (report.fits_run, report.fits_shared) == (distinct, alone - distinct)
    assert (report.transforms_run, report.transforms_shared) == (2 * distinct, 2 * (alone - distinct))
    assert report.seconds_saved > (alone - distinct) * WORTH_S / 2
    assert 0 < report.nbytes_shared < 3_000_000
    assert "shared 27 of 36 fits and 54 of 72 transforms" in str(report)


@pytest.mark.parametrize("share", [{"share_fits": False}, "0"])
def test_sharing_can_be_turned_off(share, log, monkeypatch):
    options = share if isinstance(share, dict) else {}
    if not options:
        monkeypatch.setenv("JOBLIB_BACKEND_SHARE_FITS", share)
    with joblib.parallel_backend("hybrid", n_jobs=2, tier="threads", **options):
        search(counting_pipeline(log), DEPTHS).fit(X, y)
    assert fits(counts(log)) == 3 * 3 * 2
    report = joblib_backends.last_report()
    assert report.fits_run == report.fits_shared == report.nbytes_shared == 0
    assert "shared" not in str(report)


# ---- random pipelines


def parts(log):
    """Return a strategy for transformers: counted ones, alone or in containers."""
    counted = st.builds(Counting, st.just(log), st.sampled_from([1, 1.0, True, 2]))
    return st.one_of(
        counted,
        st.builds(lambda a, b: FeatureUnion([("a", a), ("b", b)]), counted, counted),
        st.builds(lambda a, b: Pipeline([("a", a), ("b", b)]), counted, counted),
        st.builds(
            lambda a, b, n: ColumnTransformer([("a", a, list(range(n))), ("b", b, slice(n, 6))], remainder="drop"),
            counted,
            counted,
            st.integers(1, 5),
        ),
    )


@st.composite
def searches(draw, log):
    options = st.lists(st.one_of(parts(log), st.just("passthrough")), min_size=1, max_size=2)
    grid = {name: draw(options) for name in ("first", "second")}
    # Once more what is there already, as an object of its own.
    grid["first"] = [Counting(log), *grid["first"]]
    grid["tree__max_depth"] = [1, 2]
    folds = draw(st.sampled_from([KFold(2), StratifiedKFold(2), KFold(2, shuffle=True, random_state=0)]))
    return grid, {"cv": folds, "return_train_score": draw(st.booleans())}


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_random_searches_answer_as_alone_and_run_nothing_twice(data, tier, log, request):
    counts(log)
    grid, options = data.draw(searches(log))
    estimator = Pipeline([("first", Counting(log)), ("second", Counting(log)), ("tree", TREE)])
    alone = search(clone(estimator), grid, n_jobs=1, **options).fit(X, y)
    plain = counts(log)
    with make_hybrid(tier, request)():
        shared = search(clone(estimator), grid, **options).fit(X, y)
    lines = counts(log)
    assert not same_results(alone, shared)
    assert set(lines) == set(plain)
    assert set(lines.values()) == {1}
    assert min(plain.values()) > 1
