"""Every scikit-learn estimator with ``n_jobs`` answers on every tier as it does alone.

scikit-learn itself says which estimators those are, so a new one is tested on the day it appears. The
reference is one job outside any backend, computed once; it is compared bit for bit, except for the
estimators named below with their reason: what they compute depends on ``n_jobs`` without any backend of ours.
"""

import contextlib
import functools
import inspect
import re

import joblib
import numpy as np
import pytest
from scipy import sparse
from scipy.stats import uniform
from sklearn.base import RegressorMixin
from sklearn.datasets import make_classification
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  (adds two searches to all_estimators)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import BallTree, KDTree
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import all_estimators

pytestmark = [
    # Few iterations and default arguments on purpose: neither is what these tests are about.
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

#: Seconds differ from run to run, and n_jobs is what we vary.
NOT_COMPARED = re.compile(r"(^|_)time(_|$)|^n_jobs$")

#: Compared with joblib's threading at the same number of jobs: one job computes another thing.
DEPENDS_ON_N_JOBS = {
    "BaggingRegressor": "predict sums the trees of each job, then the sums",
    "KernelPCA": "pairwise_kernels multiplies one slice of X per job, and BLAS rounds by shape",
    "MDS": "with several jobs each start has a seed, with one job all starts draw from one generator",
    "Nystroem": "pairwise_kernels, as KernelPCA",
    "SpectralClustering": "pairwise_kernels, as KernelPCA",
}

#: Compared to a relative 1e-12: which job starts or ends first decides the rounding, under joblib's backends too.
DEPENDS_ON_ORDER = {
    "ExtraTreesClassifier": "ForestClassifier.predict_proba adds under a lock",
    "ExtraTreesRegressor": "ForestRegressor.predict adds under a lock",
    "IsolationForest": "score_samples adds the depths under a lock",
    "LatentDirichletAllocation": "jobs draw from one RandomState in turn on threads, each from a copy in processes",
    "RandomForestClassifier": "ForestClassifier.predict_proba adds under a lock",
    "RandomForestRegressor": "ForestRegressor.predict adds under a lock",
}

#: Small values of the parameters that decide how long a fit takes, for every estimator that has them.
QUICK = {
    "bandwidth": 4.0,
    "bin_seeding": True,
    "cv": 3,
    "max_iter": 5,
    "max_subpopulation": 100,
    "n_components": 3,
    "n_estimators": 5,
    "n_features_to_select": 1,
    "n_init": 2,
    "n_iter": 3,
    "random_state": 0,
    "thresholds": 20,
}

#: Where the values above are not allowed, or would leave ``n_jobs`` without effect.
SPECIAL = {
    "LabelPropagation": {"kernel": "knn"},
    "LabelSpreading": {"kernel": "knn"},
    "LatentDirichletAllocation": {"n_components": 1},  # the random start of one topic only rounds differently
    "LinearRegression": {"positive": True},
    "OrthogonalMatchingPursuitCV": {"max_iter": None},
    "TSNE": {"max_iter": 250},
}

METHODS = ("predict", "predict_proba", "decision_function", "transform", "score_samples", "kneighbors")

# So small that BLAS uses one thread wherever it runs: its rounding depends on how many it uses.
N_FEATURES = 6
X, LABELS = make_classification(60, N_FEATURES, n_informative=4, n_redundant=0, n_classes=3, random_state=0)
X = np.abs(X)


def pytest_generate_tests(metafunc):
    """Look for estimators at collection, not at import: that would cost each importing worker a second."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", sorted(estimators_with_n_jobs()))


@functools.cache
def estimators_with_n_jobs():
    return {name: cls for name, cls in all_estimators() if "n_jobs" in inspect.signature(cls).parameters}


def test_an_estimator_answers_on_every_tier_as_it_does_alone(name, hybrid):
    with hybrid():
        actual = observe(name, n_jobs=2)
        depends = name in DEPENDS_ON_N_JOBS and joblib.effective_n_jobs(2) > 1
    expected = reference(name, "threading" if depends else None)
    same = nearly_equal if name in DEPENDS_ON_ORDER else equal_bytes
    assert list(differences(expected, actual, same=same)) == []


def test_every_named_estimator_still_exists():
    named = {*DEPENDS_ON_N_JOBS, *DEPENDS_ON_ORDER, *SPECIAL}
    assert named <= set(estimators_with_n_jobs())


def test_a_difference_in_any_place_is_found():
    def value(last=np.nan, dtype=float):
        return {"list": [(sparse.eye(2), KDTree(X)), Ridge().fit(X, LABELS), np.array([0.0, last], dtype)]}

    assert list(differences(value(), value())) == []
    assert len(list(differences(value(), value(last=1.0)))) == 1
    assert len(list(differences(value(), value(dtype=np.float32)))) == 1
    assert len(list(differences(value(), {**value(), "more": 1}))) == 1


@functools.cache
def reference(name, backend=None):
    """Return what an estimator answers alone, or with two jobs of joblib's own ``backend``."""
    with joblib.parallel_backend(backend, n_jobs=2) if backend else contextlib.nullcontext():
        return observe(name, n_jobs=2 if backend else 1)


def observe(name, n_jobs):
    """Return the fitted attributes of an estimator and the answers of its methods."""
    cls = estimators_with_n_jobs()[name]
    estimator = build(cls, n_jobs).fit(X, target(cls))
    names = [attribute for attribute in dir(estimator) if re.match(r"[a-zA-Z]\w*_$", attribute)]
    attributes = {attribute: getattr(estimator, attribute) for attribute in names if hasattr(estimator, attribute)}
    return attributes | {method: getattr(estimator, method)(X) for method in METHODS if hasattr(estimator, method)}


def build(cls, n_jobs):
    """Return a small instance; its arguments are chosen by their names."""
    regressor = issubclass(cls, RegressorMixin)
    tree = DecisionTreeRegressor if regressor else DecisionTreeClassifier
    required = {
        "dictionary": np.eye(N_FEATURES),
        "estimator": Ridge() if regressor else LogisticRegression(),
        "estimators": [(str(depth), tree(max_depth=depth, random_state=0)) for depth in (2, 3)],
        "param_distributions": {"C": uniform(0.1, 1.0)},
        "param_grid": {"C": [0.1, 1.0]},
        "transformer_list": [("centred", StandardScaler()), ("scaled", StandardScaler(with_mean=False))],
        "transformers": [("scaled", StandardScaler(), [0, 1]), ("kept", "passthrough", [2])],
    }
    parameters = inspect.signature(cls).parameters
    arguments = {name: value for name, value in QUICK.items() if name in parameters}
    arguments |= {name: required[name] for name, known in parameters.items() if known.default is known.empty}
    return cls(**{**arguments, **SPECIAL.get(cls.__name__, {}), "n_jobs": n_jobs})


def target(cls):
    y = X @ np.arange(N_FEATURES) + LABELS if issubclass(cls, RegressorMixin) else LABELS
    if cls.__name__ == "TunedThresholdClassifierCV":
        return y > 0  # a threshold separates two classes
    several = cls.__name__.startswith(("MultiOutput", "MultiTask")) or cls.__name__ == "LinearRegression"
    return np.column_stack([y, y[::-1]]) if several else y


def equal_bytes(expected, actual):
    return expected.tobytes() == actual.tobytes()


def nearly_equal(expected, actual):
    inexact = expected.dtype.kind in "fc"
    return np.allclose(expected, actual, rtol=1e-12, atol=1e-13) if inexact else equal_bytes(expected, actual)


def differences(expected, actual, where="result", *, same=equal_bytes):
    """Yield one line for each place where two results are not the very same."""
    if type(expected) is not type(actual):
        yield f"{where}: {type(expected).__name__} became {type(actual).__name__}"
    elif isinstance(expected, dict):
        yield from _items_differ(list(expected), list(actual), f"{where}.keys()", same)
        for key in expected.keys() & actual.keys():
            if not NOT_COMPARED.search(str(key)):
                yield from differences(expected[key], actual[key], f"{where}[{key!r}]", same=same)
    elif isinstance(expected, list | tuple):
        yield from _items_differ(expected, actual, where, same)
    elif isinstance(expected, np.ndarray | np.generic | float):
        yield from _arrays_differ(np.asanyarray(expected), np.asanyarray(actual), where, same)
    elif isinstance(expected, int | str | bytes | type(None)) or inspect.isroutine(expected):
        if expected != actual:
            yield f"{where}: {expected!r} became {actual!r}"
    else:
        yield from differences(_parts(expected), _parts(actual), where, same=same)


def _parts(value):
    if sparse.issparse(value):
        entries = value.tocoo()
        return value.shape, entries.row, entries.col, entries.data
    if isinstance(value, KDTree | BallTree):
        return value.get_arrays()  # the rest counts the queries so far
    if hasattr(value, "iloc"):
        return value.dtypes.to_dict(), value.index.to_numpy(), value.to_numpy()
    # Estimators, trees, losses, generators: what pickle would keep of them.
    return value.__name__ if isinstance(value, type) else value.__reduce_ex__(4)


def _items_differ(expected, actual, where, same):
    if len(expected) != len(actual):
        yield f"{where}: {len(expected)} items became {len(actual)}"
    for i, pair in enumerate(zip(expected, actual, strict=False)):
        yield from differences(*pair, f"{where}[{i}]", same=same)


def _arrays_differ(expected, actual, where, same):
    if (expected.dtype, expected.shape) != (actual.dtype, actual.shape):
        yield f"{where}: {expected.dtype}{expected.shape} became {actual.dtype}{actual.shape}"
    elif isinstance(expected, np.ma.MaskedArray):
        # What lies under the mask was never written.
        yield from _arrays_differ(np.ma.getmaskarray(expected), np.ma.getmaskarray(actual), f"{where}.mask", same)
        yield from _arrays_differ(expected.compressed(), actual.compressed(), where, same)
    elif expected.dtype.names:
        for field in expected.dtype.names:  # the padding between fields was never written
            yield from _arrays_differ(expected[field], actual[field], f"{where}.{field}", same)
    elif expected.dtype.hasobject:
        yield from differences(expected.tolist(), actual.tolist(), where, same=same)
    elif not same(expected, actual):
        yield f"{where}: {expected} became {actual}"
