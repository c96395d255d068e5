"""Which tasks may run beside others in one process."""

import functools
import inspect
import math
import threading

import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier, StackingClassifier
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import get_scorer, make_scorer
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.model_selection._validation import _fit_and_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC, LinearSVR
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.parallel import _FuncWrapper

import joblib_backends
from joblib_backends.thread_safety import may_run_on_threads

X = np.ones((4, 2))


def users_function(*args):
    return args


class UsersEstimator(BaseEstimator):
    pass


class UsersRidge(Ridge):
    """Inherits from scikit-learn, and may override anything."""


class Users:
    def method(self):
        return self


def trusts(estimator, function=clone, **kwargs):
    return may_run_on_threads([(function, (estimator, X), kwargs)])


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(C=2.0),
        DecisionTreeClassifier(random_state=0),
        RandomForestClassifier(n_jobs=2),
        make_pipeline(StandardScaler(), PCA(2), SVC()),
        make_pipeline(SelectKBest(f_classif), Ridge()),
        make_pipeline(FunctionTransformer(np.log1p), Ridge()),
        make_pipeline(FunctionTransformer(), Ridge()),
        ColumnTransformer([("scale", StandardScaler(), [0])], remainder="passthrough"),
        GridSearchCV(Ridge(), {"alpha": [1, 2]}, cv=StratifiedKFold(3), scoring="r2"),
        KNeighborsClassifier(metric="euclidean"),
        CalibratedClassifierCV(SVC()),
        SVC(probability=False),
    ],
    ids=repr,
)
def test_estimators_of_scikit_learn_may(estimator):
    assert trusts(estimator)


@pytest.mark.parametrize(
    "estimator",
    [
        UsersEstimator(),
        UsersRidge(),
        make_pipeline(StandardScaler(), FunctionTransformer(users_function), Ridge()),
        make_pipeline(StandardScaler(), UsersEstimator()),
        ColumnTransformer([("own", FunctionTransformer(users_function), [0])]),
        StackingClassifier([("own", UsersEstimator())]),
        SelectKBest(users_function),
        SelectKBest(functools.partial(f_classif, users_function)),
        SVC(kernel=users_function),
        KNeighborsClassifier(metric=users_function),
        KNeighborsClassifier(metric=Users().method),
        KNeighborsClassifier(metric_params={"func": lambda a, b: 0.0}),
        GridSearchCV(Ridge(), {"alpha": [1]}, scoring=users_function),
        GridSearchCV(Ridge(), {"alpha": [1]}, scoring=make_scorer(users_function)),
        GridSearchCV(SVC(), {"kernel": ["rbf", users_function]}),
        GridSearchCV(Ridge(), {"alpha": [1]}, refit=users_function),
    ],
    ids=repr,
)
def test_code_of_the_user_anywhere_inside_may_not(estimator):
    assert not trusts(estimator)


@pytest.mark.parametrize(
    "estimator",
    [
        DecisionTreeClassifier(random_state=np.random.RandomState(0)),
        make_pipeline(PCA(random_state=np.random.RandomState(0))),
        GridSearchCV(Ridge(), {}, cv=StratifiedKFold(shuffle=True, random_state=np.random.RandomState(0))),
    ],
    ids=["tree", "pipeline", "splitter"],
)
def test_a_live_random_generator_may_not(estimator):
    assert not trusts(estimator)


@pytest.mark.parametrize("generator", [np.random.default_rng(0), np.random.PCG64(0), np.random.RandomState(0)])
def test_a_live_random_generator_among_the_arguments_may_not(generator):
    assert not trusts(Ridge(), rng=[{"deep": generator}])


@pytest.mark.parametrize(
    "estimator",
    [
        LinearSVC(),
        LinearSVR(),
        LogisticRegression(solver="liblinear"),
        make_pipeline(StandardScaler(), LinearSVC()),
        BaggingClassifier(LinearSVC()),
        GridSearchCV(LogisticRegression(), {"solver": ["lbfgs", "liblinear"]}),
        GridSearchCV(make_pipeline(LogisticRegression()), [{"logisticregression__solver": ["liblinear"]}]),
        GridSearchCV(make_pipeline(SVC()), {"svc": [SVC(), LinearSVC()]}),
        SVC(probability=True),
        make_pipeline(SVC(probability=True)),
        GridSearchCV(SVC(), {"probability": [True, False]}),
        GridSearchCV(make_pipeline(SVC()), {"svc__probability": [True]}),
        CalibratedClassifierCV(),
        GridSearchCV(CalibratedClassifierCV(), {"method": ["sigmoid"]}),
    ],
    ids=repr,
)
def test_what_draws_from_the_random_generator_of_the_process_may_not(estimator):
    assert not trusts(estimator)


@pytest.mark.parametrize("parameters", [{"solver": "liblinear"}, {"probability": True}, {"kernel": users_function}])
def test_parameters_that_a_search_is_about_to_set_count(parameters):
    task = (_fit_and_score, (SVC(), X, None), {"parameters": parameters, "scorer": get_scorer("accuracy")})
    assert not may_run_on_threads([task])
    assert may_run_on_threads([(*task[:2], {**task[2], "parameters": {"C": 2}})])


def test_the_function_must_be_scikit_learns_too():
    assert trusts(Ridge(), function=_FuncWrapper(_fit_and_score))
    assert not trusts(Ridge(), function=users_function)
    assert not trusts(Ridge(), function=_FuncWrapper(users_function))
    assert not trusts(Ridge(), function=math.sqrt)
    assert not trusts(Ridge(), function=lambda *_: None)
    assert not trusts(Ridge(), function=UsersRidge().fit)


def test_methods_of_scikit_learns_estimators_may():
    assert trusts(None, function=Ridge().fit)
    assert not trusts(None, function=LinearSVC().fit)


def test_one_untrusted_task_keeps_its_batch_off_threads():
    good, bad = (clone, (Ridge(),), {}), (clone, (UsersEstimator(),), {})
    assert may_run_on_threads([good, good])
    assert not may_run_on_threads([good, bad])


@joblib_backends.thread_safe
def marked(*args):
    return args


class Marked:
    @joblib_backends.thread_safe
    def method(self):
        return self


@pytest.mark.parametrize(
    "function",
    [marked, functools.partial(marked, 1), functools.partial(functools.partial(marked), 2), Marked().method,
     functools.partial(Marked().method), _FuncWrapper(marked)],
)  # fmt: skip
def test_what_the_user_marked_may(function):
    assert trusts(UsersEstimator(), function=function)


def test_the_mark_changes_nothing_else():
    assert marked(1, 2) == (1, 2)
    assert inspect.signature(marked) == inspect.signature(users_function)


def test_cycles_and_deep_structures_end_the_walk():
    cycle = []
    cycle.append(cycle)
    assert trusts(Ridge(), deep=cycle)
    deep = [Ridge()]
    for _ in range(5000):
        deep = [deep]
    assert trusts(Ridge(), deep=deep)


def test_a_structure_too_large_to_read_may_not():
    assert not trusts(Ridge(), many=[object() for _ in range(30_000)])


def test_long_plain_data_is_not_read():
    assert trusts(Ridge(), names=["a", "b"] * 100_000)


@pytest.mark.parametrize("words", [["liblinear"], ["a"] * 100 + ["liblinear"]], ids=["short", "long"])
def test_a_word_in_the_data_sends_a_task_to_processes_at_most(words):
    """A false alarm costs time; a long list of words is data and is not read."""
    assert trusts(Ridge(), y=words) is (len(words) > 64)


def test_reading_a_task_runs_nothing_of_it():
    class Trap:
        def __getattribute__(self, name):
            if name in ("__class__", "__module__", "__dict__"):
                return object.__getattribute__(self, name)
            raise AssertionError(f"{name} was read")

    assert not trusts(Trap())


def test_locks_and_events_are_data():
    assert trusts(Ridge(), lock=threading.Lock(), event=threading.Event())


def test_objects_of_classes_that_cannot_be_hashed_are_looked_at_like_others():
    class Odd(type):
        def __eq__(cls, other):
            return True

    value = Odd("Value", (), {})()
    assert not may_run_on_threads([(clone, (value,), {})])
