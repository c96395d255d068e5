"""Searches, validations and inspections answer on every tier as they do alone.

Also here: what must reach a task besides its arguments, so that it computes the same: scikit-learn's
configuration, routed metadata, the filters of warnings, and callbacks.
"""

import os
import re
import warnings

import joblib
import numpy as np
import pytest
from conftest import REAL_TIERS
from sklearn import config_context, get_config
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import make_column_transformer
from sklearn.datasets import make_classification
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import FitFailedWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.feature_selection import RFECV
from sklearn.inspection import partial_dependence, permutation_importance
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    ShuffleSplit,
    cross_val_predict,
    cross_validate,
    learning_curve,
    permutation_test_score,
    validation_curve,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from test_sklearn_estimators import differences

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(params=REAL_TIERS)
def tier(request):
    """Return each tier that users have: the fake one's thread would race with the caller for the warnings filters."""
    return request.param


X, y = make_classification(80, 5, n_informative=4, n_redundant=0, flip_y=0.1, random_state=0)
TREE = DecisionTreeClassifier(max_depth=4, random_state=0)
SCALED = make_pipeline(StandardScaler(), LogisticRegression())
VOTERS = [("tree", TREE), ("linear", SCALED)]


def grid_search(n_jobs):
    # The second grid has no "C": cv_results_ then holds masked arrays.
    grid = [{"standardscaler__with_std": [True, False], "logisticregression__C": [0.1, 9]}, {"memory": [None]}]
    scores = {"scoring": ["accuracy", "neg_log_loss"], "refit": "neg_log_loss", "return_train_score": True}
    return GridSearchCV(SCALED, grid, cv=3, n_jobs=n_jobs, **scores).fit(X, y)


def nested_search(n_jobs):
    grid = {"voting": ["hard", "soft"], "tree__max_depth": [1, 2]}
    return GridSearchCV(VotingClassifier(VOTERS, n_jobs=n_jobs), grid, cv=2, n_jobs=n_jobs).fit(X, y)


def randomized_search(n_jobs):
    distributions = {"max_depth": [1, 2, 3, 4], "min_samples_leaf": [1, 2, 5]}
    return RandomizedSearchCV(TREE, distributions, n_iter=4, cv=3, random_state=0, n_jobs=n_jobs).fit(X, y)


def halving_search(n_jobs):
    return HalvingGridSearchCV(TREE, {"max_depth": [1, 2, 3]}, cv=2, random_state=0, n_jobs=n_jobs).fit(X, y)


def validation(n_jobs):
    keep = {"return_estimator": True, "return_indices": True, "return_train_score": True}
    return cross_validate(SCALED, X, y, cv=4, scoring=["roc_auc", "f1"], n_jobs=n_jobs, **keep)


def out_of_fold_probabilities(n_jobs):
    return cross_val_predict(SCALED, X, y, cv=4, method="predict_proba", n_jobs=n_jobs)


def learning(n_jobs):
    shuffled = {"shuffle": True, "random_state": 0}
    return learning_curve(TREE, X, y, train_sizes=[0.4, 0.7, 1.0], cv=3, n_jobs=n_jobs, **shuffled)


def incremental_learning(n_jobs):
    model = SGDClassifier(random_state=0)  # one task per fold carries it from size to size
    return learning_curve(model, X, y, cv=3, exploit_incremental_learning=True, n_jobs=n_jobs)


def validation_over_depths(n_jobs):
    return validation_curve(TREE, X, y, param_name="max_depth", param_range=[1, 2, 3], cv=3, n_jobs=n_jobs)


def permutation_test(n_jobs):
    return permutation_test_score(TREE, X, y, n_permutations=8, cv=2, random_state=0, n_jobs=n_jobs)


def importance(n_jobs):
    return permutation_importance(TREE.fit(X, y), X, y, n_repeats=4, random_state=0, n_jobs=n_jobs)


def feature_elimination(n_jobs):
    return RFECV(TREE, cv=3, scoring="roc_auc", n_jobs=n_jobs).fit(X, y)


def dependence(n_jobs):
    # It has no n_jobs of its own; the estimator that it asks for predictions has.
    neighbors = KNeighborsClassifier(algorithm="kd_tree", n_jobs=n_jobs).fit(X, y)
    return partial_dependence(neighbors, X, features=[0, 1], grid_resolution=4, method="brute", kind="both")


CALLS = [
    grid_search,
    nested_search,
    randomized_search,
    halving_search,
    validation,
    out_of_fold_probabilities,
    learning,
    incremental_learning,
    validation_over_depths,
    permutation_test,
    importance,
    feature_elimination,
    dependence,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_call_answers_on_every_tier_as_it_does_alone(call, hybrid):
    expected = call(n_jobs=1)
    with hybrid():
        actual = call(n_jobs=2)
    assert differences(expected, actual) == []


def test_routed_sample_weights_reach_fit_and_score(hybrid):
    weights = np.where(y == 1, 5.0, 0.1)

    def search(n_jobs, **metadata):
        model = LogisticRegression().set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        return GridSearchCV(model, {"C": [0.1, 10.0]}, cv=3, n_jobs=n_jobs).fit(X, y, **metadata)

    with config_context(enable_metadata_routing=True):
        expected = search(1, sample_weight=weights)
        with hybrid():
            actual = search(2, sample_weight=weights)
        assert differences(expected, actual) == []
        assert differences(search(1), actual), "the weights changed nothing: this test shows nothing"


class Witness(ClassifierMixin, BaseEstimator):
    """Remember where it was fitted, and under which configuration and filters of warnings."""

    def fit(self, X, y):  # noqa: N803
        self.classes_ = np.unique(y)
        self.config_ = get_config()
        self.filters_ = list(warnings.filters)
        self.pid_ = os.getpid()
        return self

    def predict(self, X):  # noqa: N803
        return np.full(len(X), self.classes_[0])


def witnesses(hybrid, n_splits):
    splits = ShuffleSplit(n_splits, random_state=0)
    with hybrid():
        return cross_validate(Witness(), X, y, cv=splits, n_jobs=2, return_estimator=True)["estimator"]


def test_tasks_see_the_configuration_of_the_caller(hybrid):
    with config_context(assume_finite=True, transform_output="pandas", working_memory=7):
        assert [witness.config_ for witness in witnesses(hybrid, 3)] == [get_config()] * 3
    assert [witness.config_["assume_finite"] for witness in witnesses(hybrid, 3)] == [False] * 3


def test_a_task_sees_the_filters_of_warnings_of_the_caller(hybrid, tier):
    # One task: warnings.catch_warnings, which scikit-learn puts around each, mixes up the filters of threads.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="only in this test", category=ResourceWarning)
        (witness,) = witnesses(hybrid, n_splits=1)
    actions = {(action, getattr(message, "pattern", message)) for action, message, *_ in witness.filters_}
    assert ("ignore", "only in this test") in actions
    assert (witness.pid_ == os.getpid()) == (tier in ("inline", "threads"))


def test_frames_come_back_as_frames(hybrid):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X, columns=list("abcde")).assign(a=lambda f: f.a.astype("float32"))

    def transform(n_jobs):
        scaled = (StandardScaler(), ["a", "b"]), (MinMaxScaler(), ["c"])
        columns = make_column_transformer(*scaled, n_jobs=n_jobs)
        union = make_union(columns, MinMaxScaler(), n_jobs=n_jobs).set_output(transform="pandas")
        return union.fit_transform(frame)

    expected = transform(1)
    with hybrid():
        actual = transform(2)
    pd.testing.assert_frame_equal(expected, actual, check_exact=True)


def failing_search(n_jobs, error_score):
    grid = {"C": [-1.0, 1.0]}
    return GridSearchCV(LogisticRegression(), grid, cv=2, error_score=error_score, n_jobs=n_jobs).fit(X, y)


def test_a_failed_fit_scores_nan_and_warns_as_it_does_alone(hybrid):
    with warnings.catch_warnings(record=True) as expected_warnings:
        warnings.simplefilter("always")
        expected = failing_search(1, error_score=np.nan)
    with hybrid(), warnings.catch_warnings(record=True) as actual_warnings:
        warnings.simplefilter("always")
        actual = failing_search(2, error_score=np.nan)

    assert differences(expected, actual) == []
    assert np.isnan(actual.cv_results_["mean_test_score"]).tolist() == [True, False]
    assert FitFailedWarning in {warning.category for warning in actual_warnings}
    assert messages(expected_warnings) == messages(actual_warnings)


def messages(caught):
    return sorted(str(warning.message) for warning in caught)


def test_a_failed_fit_raises_what_it_raises_alone(hybrid):
    with pytest.raises(ValueError, match=r"'C' parameter .* Got -1.0") as alone:
        failing_search(1, error_score="raise")
    with hybrid(), pytest.raises(ValueError, match=r"'C' parameter .* Got -1.0") as here:
        failing_search(2, error_score="raise")
    assert here.type is alone.type


@pytest.fixture
def callback():
    return pytest.importorskip("sklearn.callback", reason="scikit-learn has callbacks from version 1.9")


def test_a_scoring_monitor_logs_what_it_logs_under_loky(callback, hybrid):
    def logged():
        monitor = callback.ScoringMonitor(scoring=["accuracy", "neg_log_loss"])
        model = LogisticRegression(max_iter=8, tol=0.1).set_callbacks(monitor)
        GridSearchCV(model, {"C": [0.1, 1.0]}, cv=2, n_jobs=2).fit(X, y)
        return monitor.get_logs().data

    with joblib.parallel_backend("loky", n_jobs=2):
        expected = logged()
    with hybrid():
        actual = logged()
    assert len({row["task_id_path"] for row in actual}) > 8
    assert differences(expected, actual) == []


def test_progress_bars_end_as_they_end_under_loky(callback, hybrid, capsys, monkeypatch):
    pytest.importorskip("rich", reason="scikit-learn's ProgressBar needs rich")
    monkeypatch.setenv("COLUMNS", "200")

    def bars():
        search = GridSearchCV(LogisticRegression(max_iter=8, tol=0.1), {"C": [0.1, 1.0]}, cv=2, n_jobs=2)
        search.set_callbacks(callback.ProgressBar(max_propagation_depth=1)).fit(X, y)
        # Bars stand in the order in which tasks began, and end with their time.
        return sorted(re.findall(r"^ *(.*?) ━.* (\d+)%", capsys.readouterr().out, flags=re.MULTILINE))

    with joblib.parallel_backend("loky", n_jobs=2):
        expected = bars()
    with hybrid():
        actual = bars()
    assert actual == expected
    assert {percent for _, percent in actual} == {"100"}
