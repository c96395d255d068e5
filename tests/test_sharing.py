"""Searches fit each common prefix of their pipelines once, and answer as plain scikit-learn does.

Steps that are counted take a few milliseconds each: what takes less is not worth sharing, and is not shared.
"""

import copy
import json
import os
import pickle
import threading
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
    assert "shared   27 of 36 fits and 54 of 72 transforms" in str(report)


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


def parts(log, place):
    """Return a strategy for transformers: counted ones, alone or in containers."""
    counted = st.builds(Counting, st.just(log), st.sampled_from([1, 1.0, True, 2]))
    containers = [
        st.builds(lambda a, b: FeatureUnion([("a", a), ("b", b)]), counted, counted),
        st.builds(lambda a, b: Pipeline([("a", a), ("b", b)]), counted, counted),
        # The columns change their places, and the first step alone is of these two kinds: or equal data would come by
        # other ways, and what is fitted on that is fitted twice.
        st.builds(
            lambda a, b, n: ColumnTransformer([("a", a, slice(n, 6)), ("b", b, list(range(n)))]),
            counted,
            counted,
            st.integers(1, 5),
        ),
    ]
    return st.one_of(counted, *(containers if place == "first" else containers[:1]))


@st.composite
def searches(draw, log):
    grid = {
        name: draw(st.lists(st.one_of(parts(log, name), st.just("passthrough")), min_size=1, max_size=2))
        for name in ("first", "second")
    }
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


# ---- identity


def run_shared(estimator, grid, X=X, y=y, tier="threads", **options):
    with joblib.parallel_backend("hybrid", n_jobs=2, tier=tier):
        return search(estimator, grid, **options).fit(X, y)


def one_step(transformer):
    return Pipeline([("step", transformer), ("tree", TREE)])


def test_equal_values_of_other_types_are_fitted_apart(log):
    found = run_shared(one_step(Counting(log)), {"step__shift": [1, 1.0, True], **DEPTHS})
    assert fits(counts(log)) == 3 * 3
    alone = search(one_step(Counting(log)), {"step__shift": [1, 1.0, True], **DEPTHS}).fit(X, y)
    assert not same_results(alone, found)


@pytest.mark.parametrize(
    ("random_state", "n_fits"),
    [(None, 3), (0, 3), (np.random.RandomState(0), 9), (np.random.default_rng(0), 9)],
    ids=["None", "number", "RandomState", "Generator"],
)
def test_a_step_with_a_living_generator_is_not_shared(random_state, n_fits, log):
    run_shared(one_step(Counting(log, random_state=random_state)), DEPTHS)
    assert fits(counts(log)) == n_fits


class Drawing(Counting):
    """Draws from a global generator, which no parameter says."""

    def __init__(self, log, shift=1):
        self.log = log
        self.shift = shift

    def fit(self, X, y=None):
        self.noise_ = np.random.rand()
        return super().fit(X, y)


def test_a_step_that_draws_random_numbers_unseen_is_not_shared(log):
    run_shared(one_step(Drawing(log)), DEPTHS, tier="inline")
    assert fits(counts(log)) == 9


def test_the_second_of_two_equal_pipelines_shares_with_the_first(log):
    """Third-party searches submit scikit-learn's function themselves, with parameters set."""
    train, test = np.arange(40), np.arange(40, 60)
    arguments = {"train": train, "test": test, "scorer": accuracy, "verbose": 0, "error_score": "raise"}
    arguments |= {"parameters": None, "fit_params": None, "score_params": None}
    tasks = [
        joblib.delayed(sklearn_validation._fit_and_score)(
            one_step(Counting(log)).set_params(tree__max_depth=depth), X.copy(), y.copy(), **arguments
        )
        for depth in (1, 2, 3)
    ]
    with joblib.parallel_backend("hybrid", n_jobs=2, tier="processes"):
        results = joblib.Parallel()(tasks)
    assert fits(counts(log)) == 1
    alone = [function(*args, **kwargs) for function, args, kwargs in tasks]
    assert [r["test_scores"] for r in results] == [r["test_scores"] for r in alone]
    assert {type(r) for r in results} == {dict}


def accuracy(estimator, X, y):
    return estimator.score(X, y)


# ---- steps that do more than they should


class InPlace(Counting):
    """Changes what it is given."""

    def _moved(self, X):
        X += self.mean_ * self.shift
        return X


def test_a_step_that_changes_its_input_is_not_shared(hybrid, log):
    check_search(hybrid, one_step(InPlace(log)), DEPTHS, return_train_score=True)
    assert fits(counts(log)) == 2 * 9


def test_a_neighbour_of_a_step_that_changes_its_input_sees_the_changes(hybrid, log):
    union = FeatureUnion([("in_place", InPlace(log)), ("clean", Counting(log))])
    grid = {"step__in_place__shift": [1, 2], **DEPTHS}
    check_search(hybrid, one_step(union), grid, return_train_score=True)


def test_a_view_that_a_column_transformer_hands_out_is_followed(hybrid, log):
    columns = ColumnTransformer([("in_place", InPlace(log), slice(0, 4)), ("clean", Counting(log), slice(2, 6))])
    check_search(hybrid, one_step(columns), {"step__in_place__shift": [1, 2], **DEPTHS})


class Remembering(Counting):
    """Keeps state that no parameter shows, and deletes some of it."""

    def __init__(self, log, shift=1):
        self.log = log
        self.shift = shift
        self.history = []
        self.fresh = True

    def fit(self, X, y=None):
        self.history.append(len(X))
        del self.fresh
        return super().fit(X, y)

    def _moved(self, X):
        return np.c_[super()._moved(X), np.full(len(X), len(self.history) + 10 * hasattr(self, "fresh"))]


def test_state_outside_of_parameters_is_as_alone(hybrid, log):
    check_search(hybrid, one_step(Remembering(log)), DEPTHS)
    assert fits(counts(log)) == 9 + 3


class CountingTransforms(Counting):
    """Answers differently each time it transforms."""

    def transform(self, X):
        self.n_transforms_ = getattr(self, "n_transforms_", 0) + 1
        return super().transform(X) * self.n_transforms_


def test_a_transform_with_a_memory_is_not_shared(hybrid, log):
    check_search(hybrid, one_step(CountingTransforms(log)), DEPTHS, return_train_score=True)
    lines = counts(log)
    assert sum(lines.values()) - fits(lines) == 2 * 18


def spoil(estimator, X, y):
    """Score, then spoil the fitted step and the data."""
    score = estimator.score(X, y)
    estimator.named_steps["step"].mean_ *= 100
    estimator.named_steps["step"].shift = 7
    X *= 0
    y *= 0
    return score


def test_what_a_candidate_does_to_its_step_and_data_reaches_no_other(hybrid, log):
    check_search(hybrid, one_step(Counting(log)), DEPTHS, scoring=spoil)


class Unpicklable(Counting):
    def fit(self, X, y=None):
        self.lock_ = threading.Lock()
        return super().fit(X, y)


def test_a_fitted_step_that_cannot_be_pickled_is_not_shared(log):
    run_shared(one_step(Unpicklable(log)), DEPTHS)
    assert fits(counts(log)) == 9


class Bare(TransformerMixin, BaseEstimator):
    """Has no attributes at all."""

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        time.sleep(WORTH_S)
        return X * 2


def test_a_step_without_parameters_is_shared(hybrid):
    report = check_search(hybrid, one_step(Bare()), DEPTHS)
    assert report.fits_shared == 6


class FitOnly(BaseEstimator):
    """Not a TransformerMixin: the pipeline calls fit and then transform."""

    def __init__(self, log):
        self.log = log

    def fit(self, X, y=None):
        Counting._note(self, "fit", X)
        self.mean_ = X.mean(axis=0)
        return self

    shift = 1

    def transform(self, X):
        Counting._note(self, "transform", X)
        return X - self.mean_


def test_a_step_without_fit_transform_is_shared(hybrid, log):
    report = check_search(hybrid, one_step(FitOnly(log)), DEPTHS)
    lines = counts(log)
    assert fits(lines) == 9 + 3
    assert sum(lines.values()) - fits(lines) == 18 + 6
    assert (report.transforms_run, report.transforms_shared) == (6, 12)


class Forgetful(Counting):
    """Its fit forgets to return the object."""

    fit_transform = None

    def __getattribute__(self, name):
        if name == "fit_transform":
            raise AttributeError(name)
        return super().__getattribute__(name)

    def fit(self, X, y=None):
        time.sleep(WORTH_S)
        super().fit(X, y)


def test_a_fit_that_returns_nothing_fails_as_alone(hybrid, log):
    with hybrid(), pytest.raises(ValueError, match="'NoneType' object has no attribute 'transform'"):
        search(one_step(Forgetful(log)), DEPTHS).fit(X, y)


def first_columns(X):
    time.sleep(WORTH_S)
    return X[:, :4]


def test_a_view_is_followed_and_not_shared(hybrid, log):
    """What changes the view changes the data that it is a part of."""
    pick = FunctionTransformer(first_columns)
    pipeline = Pipeline([("pick", pick), ("move", InPlace(log)), ("step", Counting(log)), ("tree", TREE)])
    check_search(hybrid, pipeline, {"move__shift": [1, 2], **DEPTHS}, return_train_score=True)
    counts(log)
    pipeline = Pipeline([("pick", pick), ("step", Counting(log)), ("tree", TREE)])
    check_search(hybrid, pipeline, DEPTHS, return_train_score=True)
    assert fits(counts(log)) == 9 + 3


def jitter(X):
    time.sleep(WORTH_S)
    return X + np.random.normal(size=X.shape)


@pytest.mark.parametrize("tier", ["inline"])
@pytest.mark.parametrize(
    "step",
    [
        FunctionTransformer(jitter),
        ColumnTransformer([("noise", FunctionTransformer(jitter), [0, 1])]),
        Pipeline([("noise", FunctionTransformer(jitter))]),
    ],
    ids=lambda step: type(step).__name__,
)
def test_random_numbers_that_are_drawn_deep_inside_are_found(hybrid, step):
    with hybrid():
        search(one_step(step), DEPTHS).fit(X, y)
    assert joblib_backends.last_report().fits_shared == 0


class Sampling(Counting):
    """Transforms with a generator that it made when it was fitted."""

    def fit(self, X, y=None):
        self.generator_ = np.random.RandomState(self.random_state)
        return super().fit(X, y)

    def _moved(self, X):
        return super()._moved(X) + self.generator_.normal(size=np.shape(X))


def test_a_transform_that_draws_from_its_own_generator_is_not_shared(hybrid, log):
    options = {"scoring": ["accuracy", "neg_log_loss"], "return_train_score": True}
    check_search(hybrid, one_step(Sampling(log)), DEPTHS, **options)


class Prefitted(Counting):
    """Leaves a part of itself out of its pickle."""

    def __init__(self, log, model=None):
        self.log = log
        self.model = model

    @property
    def shift(self):
        return self.model

    def __getstate__(self):
        return {**super().__getstate__(), "model": 1}


@pytest.mark.parametrize("tier", ["inline", "threads"])
def test_what_a_pickle_leaves_out_is_part_of_the_identity(hybrid, log):
    check_search(hybrid, one_step(Prefitted(log)), {"step": [Prefitted(log, 1), Prefitted(log, 2)], **DEPTHS})


class Slots:
    __slots__ = ("mean_",)


class Slotted(Slots, TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        time.sleep(WORTH_S)
        self.mean_ = X.mean(axis=0)
        return self

    def transform(self, X):
        return X - self.mean_


@pytest.mark.parametrize("tier", ["inline", "threads"])
def test_a_step_with_slots_is_not_shared(hybrid):
    assert check_search(hybrid, one_step(Slotted()), DEPTHS).fits_shared == 0


class SelfReferring(Counting):
    def fit(self, X, y=None):
        super().fit(X, y)
        self.function_ = super()._moved
        return self


def test_a_step_that_refers_to_itself_is_not_shared(hybrid, log):
    check_search(hybrid, one_step(SelfReferring(log)), DEPTHS)
    assert fits(counts(log)) == 18


# ---- what scorers can see


def score_of_pickle(estimator, X, y):
    return pickle.loads(pickle.dumps(estimator)).score(X, y)


def without_a_trace(estimator, X, y):
    step = estimator.named_steps["step"]
    copies = [copy.deepcopy(estimator), clone(estimator), copy.copy(step), pickle.loads(pickle.dumps(step.transform))]
    return -len([method for one in copies for method in find_methods(one, {})])


def stability(estimator, X, y):
    return clone(estimator).set_params(step__shift=2).fit(X, y).score(X, y)


def first_of_two(estimator, X, y):
    score = estimator.score(X, y)
    X[:] = 0
    return score


@pytest.mark.parametrize("scoring", [score_of_pickle, without_a_trace, stability])
def test_a_scorer_may_copy_pickle_and_fit_again(hybrid, log, scoring):
    check_search(hybrid, one_step(Counting(log)), DEPTHS, scoring=scoring, return_train_score=True)


def test_a_scorer_may_change_what_the_next_one_gets(hybrid, log):
    scoring = {"first": first_of_two, "second": accuracy}
    check_search(hybrid, one_step(Counting(log)), DEPTHS, scoring=scoring, return_train_score=True)


# ---- failures and warnings


class Failing(Counting):
    """Fails for a large shift, in a fold or in all."""

    def fit(self, X, y=None):
        if self.shift > 1:
            raise ValueError(f"cannot shift by {self.shift}")
        return super().fit(X, y)


def test_a_prefix_that_fails_fails_each_candidate_with_the_same_message(hybrid, log):
    grid = {"step__shift": [1, 2], **DEPTHS}
    messages = []
    for backend in (lambda: joblib.parallel_backend("sequential"), hybrid):
        with backend(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            search(one_step(Failing(log)), grid).fit(X, y)
        messages += [str(one.message) for one in caught if one.category is FitFailedWarning]
    alone, shared = messages
    assert "9 fits failed" in alone
    assert shared == alone


def test_error_score_may_be_a_number_or_raise(hybrid, log):
    grid = {"step__shift": [1, 2], **DEPTHS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_search(hybrid, one_step(Failing(log)), grid, error_score=-1.0)
    with hybrid(), pytest.raises(ValueError, match="cannot shift by 2"):
        search(one_step(Failing(log)), grid, error_score="raise").fit(X, y)
    assert not shelves()


class Warned(Counting):
    def fit(self, X, y=None):
        warnings.warn("shifts are old", UserWarning, stacklevel=1)
        return super().fit(X, y)


@pytest.mark.parametrize("tier", ["inline"])
def test_a_warning_of_a_shared_step_is_given_to_each_candidate(hybrid, log):
    given = []
    for backend in (lambda: joblib.parallel_backend("sequential"), hybrid):
        with backend(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            search(one_step(Warned(log)), DEPTHS).fit(X, y)
        given.append(Counter((str(one.message), one.category, one.filename, one.lineno) for one in caught))
    assert given[0] == given[1]
    assert fits(counts(log)) == 9 + 3


# ---- scikit-learn's own ways


def test_a_pipeline_that_caches_by_itself_is_left_to_it(hybrid, log, tmp_path):
    for estimator in (
        Pipeline([("step", Counting(log)), ("tree", TREE)], memory=str(tmp_path / "outer")),
        one_step(Pipeline([("inner", Counting(log))], memory=str(tmp_path / "inner"))),
    ):
        with hybrid():
            search(estimator, DEPTHS).fit(X, y)
        assert fits(counts(log)) >= 3
        assert joblib_backends.last_report().fits_shared == 0


class OtherPipeline(Pipeline):
    def fit(self, X, y=None, **params):
        return super().fit(X[::2], y[::2], **params)


def test_a_subclass_of_pipeline_is_used_as_it_is(hybrid, log):
    report = check_search(hybrid, OtherPipeline([("step", Counting(log)), ("tree", TREE)]), DEPTHS)
    assert fits(counts(log)) == 18
    assert report.fits_shared == 0


def test_steps_may_be_searched_and_passed_through(hybrid, log):
    steps = ["passthrough", StandardScaler(), MinMaxScaler(), Counting(log), None]
    pipeline = Pipeline([("scale", StandardScaler()), ("step", Counting(log)), ("tree", TREE)])
    check_search(hybrid, pipeline, {"scale": steps, **DEPTHS})


def double(X):
    time.sleep(WORTH_S)
    return X * 2


@pytest.mark.parametrize("function", [double, lambda X: double(X) + 1], ids=["function", "lambda"])
def test_function_transformers_are_shared(hybrid, function):
    report = check_search(hybrid, one_step(FunctionTransformer(function)), DEPTHS)
    assert report.fits_shared == 6


def frame():
    columns = {f"number {i}": X[:, i] for i in range(6)}
    return pd.DataFrame({**columns, "kind": pd.Categorical(np.where(X[:, 0] > 0, "a", "b")), "text": ["a b", "c"] * 30})


class Slow(FunctionTransformer):
    """A function transformer that is worth sharing, whatever the machine."""

    def fit(self, X, y=None):
        time.sleep(WORTH_S)
        return super().fit(X, y)


def test_frames_with_columns_of_all_kinds_are_shared(hybrid):
    columns = ColumnTransformer(
        [
            ("numbers", Pipeline([("slow", Slow()), ("scale", StandardScaler())]), [f"number {i}" for i in range(6)]),
            ("kinds", OneHotEncoder(), ["kind"]),
            ("text", TfidfVectorizer(token_pattern=r"\w"), "text"),
            ("dropped", "drop", ["number 0"]),
        ],
        remainder="passthrough",
        verbose_feature_names_out=True,
    )
    grid = {"step__numbers__scale__with_std": [True, False], "step__kinds__drop": [None, "first"], **DEPTHS}
    report = check_search(hybrid, one_step(columns), grid, X=frame(), return_train_score=True)
    assert report.fits_shared >= 3 * (2 * 2 * 3 - 1)


def test_output_containers_are_as_they_were_set(hybrid, log):
    pipeline = Pipeline([("slow", Slow()), ("scale", StandardScaler()), ("pick", SelectKBest(k=2)), ("tree", TREE)])
    pipeline.set_output(transform="pandas")
    report = check_search(hybrid, pipeline, DEPTHS, X=frame().iloc[:, :6], scoring=knows_its_columns)
    assert report.fits_shared >= 6


def knows_its_columns(estimator, X, y):
    assert list(estimator[:-1].transform(X).columns) == list(estimator[-1].feature_names_in_)
    return estimator.score(X, y)


def test_the_configuration_is_part_of_the_identity(log):
    with sklearn.config_context(transform_output="pandas"):
        shared = run_shared(one_step(Slow()), DEPTHS, X=frame().iloc[:, :6], scoring=knows_its_columns)
    assert not np.isnan(shared.cv_results_["mean_test_score"]).any()


class Weighted(Counting):
    def fit_transform(self, X, y=None, sample_weight=None):
        self._note("fit", np.asarray(X), np.asarray(sample_weight))
        self.mean_ = np.average(X, axis=0, weights=sample_weight)
        return self._moved(X)

    def fit(self, X, y=None, sample_weight=None):
        self.fit_transform(X, y, sample_weight)
        return self


@pytest.mark.parametrize("routing", [False, True])
def test_weights_that_go_to_a_step_are_part_of_the_identity(hybrid, log, routing):
    weight = np.random.RandomState(0).rand(len(X))
    with sklearn.config_context(enable_metadata_routing=routing):
        step = Weighted(log)
        params = {"step__sample_weight": weight}
        if routing:
            step.set_fit_request(sample_weight=True)
            params = {"sample_weight": weight}
        tree = clone(TREE).set_fit_request(sample_weight=False) if routing else TREE
        pipeline = Pipeline([("step", step), ("tree", tree)])
        check_search(hybrid, pipeline, DEPTHS, fit_params=params, scoring=accuracy)
    assert fits(counts(log)) == 9 + 3


@pytest.mark.parametrize("kind", [RandomizedSearchCV, HalvingGridSearchCV])
def test_other_searches_share(kind, log):
    grid = {"step__shift": [1, 2], "tree__max_depth": [1, 2, 3]}
    options = {"cv": 2, "refit": False, "random_state": 0}
    options |= {"n_iter": 6} if kind is RandomizedSearchCV else {"min_resources": 20}
    alone = kind(one_step(Counting(log)), grid, n_jobs=1, **options).fit(X, y)
    plain = fits(counts(log))
    with joblib.parallel_backend("hybrid", n_jobs=2, tier="threads"):
        shared = kind(one_step(Counting(log)), grid, **options).fit(X, y)
    assert not same_results(alone, shared)
    assert fits(counts(log)) < plain


def test_validation_curves_share(log):
    arguments = {"param_name": "tree__max_depth", "param_range": [1, 2, 3], "cv": 3}
    alone = validation_curve(one_step(Counting(log)), X, y, **arguments)
    with joblib.parallel_backend("hybrid", n_jobs=2, tier="threads"):
        shared = validation_curve(one_step(Counting(log)), X, y, n_jobs=2, **arguments)
    assert not differences(alone, shared)
    assert fits(counts(log)) == 9 + 3


def test_a_precomputed_kernel_is_not_shared(hybrid):
    from sklearn.preprocessing import KernelCenterer
    from sklearn.svm import SVC

    pipeline = Pipeline([("center", KernelCenterer()), ("svc", SVC(kernel="precomputed"))])
    report = check_search(hybrid, pipeline, {"svc__C": [1, 2]}, X=X @ X.T)
    assert report.fits_shared == 0


def find_methods(value, seen):
    """Yield what of ours can be reached from a result."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, _Method):
        yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for child in (*children, *vars(value).values()) if hasattr(value, "__dict__") else children:
        yield from find_methods(child, seen)


@pytest.mark.parametrize("tier", ["inline", "threads", "processes"])
def test_estimators_that_are_given_back_are_scikit_learns_own(hybrid, log):
    columns = ColumnTransformer([("a", Counting(log), [0, 1]), ("b", Pipeline([("c", Counting(log))]), [2])])
    estimator = Pipeline([("step", columns), ("union", FeatureUnion([("d", Counting(log))])), ("tree", TREE)])
    arguments = {"train": np.arange(40), "test": np.arange(40, 60), "scorer": accuracy, "verbose": 0}
    arguments |= {"parameters": None, "fit_params": None, "score_params": None, "return_estimator": True}
    with hybrid():
        results = joblib.Parallel()(
            joblib.delayed(sklearn_validation._fit_and_score)(clone(estimator), X, y, **arguments) for _ in range(4)
        )
    assert joblib_backends.last_report().fits_shared > 0
    for result in results:
        fitted = result["estimator"]
        assert list(find_methods(fitted, {})) == []
        assert (fitted.predict(X) == results[0]["estimator"].predict(X)).all()
        assert (pickle.loads(pickle.dumps(fitted)).predict(X) == fitted.predict(X)).all()
        assert not {id(fitted[0]), id(fitted[0].transformers_[0][1])} & {
            id(other["estimator"][0]) for other in results if other is not result
        }


def test_a_function_that_does_not_look_as_expected_is_run_as_it_is(log, monkeypatch):
    known = sklearn_validation._fit_and_score

    def _fit_and_score(estimator, X, y, **keywords):
        return known(estimator, X, y, **keywords)

    from sklearn.model_selection import _search

    monkeypatch.setattr(sklearn_validation, "_fit_and_score", _fit_and_score)
    monkeypatch.setattr(_search, "_fit_and_score", _fit_and_score)
    with pytest.warns(RuntimeWarning, match="does not look as expected"):
        run_shared(one_step(Counting(log)), DEPTHS)
    # Only once: a second warning would be an error here.
    run_shared(one_step(Counting(log)), DEPTHS)
    assert fits(counts(log)) == 2 * 9
    sklearn_inside._is_known.cache_clear()


# ---- places and limits


def test_without_room_on_the_shelf_the_search_runs_all_the_same(log, monkeypatch):
    def no_room(descriptor, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf, "reserve", no_room)
    alone = search(one_step(Counting(log)), DEPTHS).fit(X, y)
    assert not same_results(alone, run_shared(one_step(Counting(log)), DEPTHS))
    assert fits(counts(log)) == 2 * 9


def test_without_any_place_nothing_is_shared(log, tmp_path):
    nowhere = tmp_path / "file"
    nowhere.touch()
    with joblib.parallel_backend("hybrid", n_jobs=2, tier="threads", temp_folder=str(nowhere)):
        search(one_step(Counting(log)), DEPTHS).fit(X, y)
    assert fits(counts(log)) == 9


def test_a_small_limit_bounds_what_is_held(hybrid, log):
    pipeline = counting_pipeline(log)
    grid = {**DEPTHS, "second__shift": [1, 2]}
    with hybrid(share_fits_nbytes=0):
        shared = search(pipeline, grid).fit(X, y)
    assert joblib_backends.last_report().nbytes_shared == 0
    with hybrid(share_fits_nbytes="5K"):
        search(pipeline, grid).fit(X, y)
    assert 0 < joblib_backends.last_report().nbytes_shared < 15_000
    assert not same_results(search(pipeline, grid).fit(X, y), shared)


@pytest.mark.parametrize("pre_dispatch", [1, "2*n_jobs", "all"])
def test_the_whole_search_is_known_whatever_is_dispatched_ahead(pre_dispatch, log):
    grid = {"tree__max_depth": [1, 2, 3, 4], "step__shift": [1, 2]}
    run_shared(one_step(Counting(log)), grid, pre_dispatch=pre_dispatch)
    assert fits(counts(log)) == 2 * 3


def test_the_tasks_of_a_prefix_run_one_after_the_other(log):
    """So what is kept for them can go: at most what two folds need is held at a time."""
    pipeline = one_step(PCA(random_state=0))
    large = np.random.RandomState(0).rand(2_000, 200)
    labels = (large[:, 0] > 0.5).astype(int)
    grid = {"step__n_components": [10, 20, 30, 40, 50], "tree__max_depth": [1, 2]}
    with joblib.parallel_backend("hybrid", n_jobs=2, tier="threads"):
        search(pipeline, grid, cv=8).fit(large, labels)
    report = joblib_backends.last_report()
    assert report.fits_shared == 5 * 8
    # All 8 folds and 40 results would take some 44 MB.
    assert report.nbytes_shared < 20_000_000


@pytest.mark.parametrize("step", ["without fit_transform", "a view beside others"])
def test_what_follows_a_step_that_is_not_kept_is_shared_still(hybrid, log, step):
    if step == "a view beside others":
        union = FeatureUnion([("same", FunctionTransformer()), ("step", Counting(log))])
        pipeline, grid = one_step(union), {"step__transformer_weights": [None, {"same": 2}], **DEPTHS}
    else:
        pipeline = Pipeline([("cheap", Cheap()), ("step", Counting(log)), ("tree", TREE)])
        grid = DEPTHS
    check_search(hybrid, pipeline, grid, scoring=["accuracy", "neg_log_loss"])
    lines = counts(log)
    n_candidates = 6 if "transformer_weights" in str(grid) else 3
    assert fits(lines) == 3 * n_candidates + 3


class Cheap(BaseEstimator):
    def fit(self, X, y=None):
        self.n_ = len(X)
        return self

    def transform(self, X):
        return X + 1


@pytest.mark.parametrize("tier", ["inline"])
def test_what_a_container_prints_is_printed_for_each_candidate(hybrid, log, capsys):
    columns = ColumnTransformer([("inner", Counting(log), [0, 1])], verbose=True)
    printed = []
    for backend in (lambda: joblib.parallel_backend("sequential"), hybrid):
        with backend():
            search(one_step(columns), DEPTHS).fit(X, y)
        printed.append(capsys.readouterr().out.count("Processing inner"))
    assert printed == [9, 9]
    assert fits(counts(log)) == 9 + 3


@pytest.mark.parametrize("tier", ["inline"])
def test_a_cache_deep_inside_is_left_to_itself(hybrid, log, tmp_path):
    inner = Pipeline([("step", Counting(log))], memory=str(tmp_path / "cache"))
    with hybrid():
        search(one_step(ColumnTransformer([("inner", inner, [0, 1])])), DEPTHS).fit(X, y)
    assert joblib_backends.last_report().fits_shared == 0
