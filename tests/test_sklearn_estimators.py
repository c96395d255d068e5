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
from conftest import REAL_TIERS
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


@pytest.fixture(params=REAL_TIERS)
def tier(request):
    """Return each tier that users have: the fake one's thread would race with the caller for the warnings filters."""
    return request.param


#: Seconds differ from run to run, n_jobs is what we vary, and the generator that LatentDirichletAllocation
#: keeps after the fit (random_state_) tells whether its jobs drew from it or from copies.
NOT_COMPARED = re.compile(r"(^|_)time(_|$)|^n_jobs$|^random_state_$")

#: Compared with joblib's threading at the same number of jobs: one job computes another thing.
DEPENDS_ON_N_JOBS = {
    "BaggingRegressor": "predict sums the trees of each job, then the sums",
    "KernelPCA": "pairwise_kernels multiplies one slice of X per job, and BLAS rounds by shape",
    "MDS": "with several jobs each start has a seed, with one job all starts draw from one generator",
    "Nystroem": "pairwise_kernels, as KernelPCA",
    "SpectralClustering": "pairwise_kernels, as KernelPCA",
}

#: Compared to a relative 1e-12: which job starts or ends first decides the rounding, with or without us.
DEPENDS_ON_ORDER = {
    "ExtraTreesClassifier": "ForestClassifier.predict_proba adds under a lock",
    "ExtraTreesRegressor": "ForestRegressor.predict adds under a lock",
    "IsolationForest": "score_samples adds the depths under a lock",
    "LatentDirichletAllocation": "jobs draw from one RandomState in turn, or in processes from copies",
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
    assert differences(expected, actual, same) == []


def test_every_named_estimator_still_exists():
    named = {*DEPENDS_ON_N_JOBS, *DEPENDS_ON_ORDER, *SPECIAL}
    assert named <= set(estimators_with_n_jobs())


def test_a_difference_in_any_place_is_found():
    def value(last=np.nan, dtype=float):
        return {"list": [(sparse.eye(2), KDTree(X)), Ridge().fit(X, LABELS), np.array([0.0, last], dtype)]}

    assert differences(value(), value()) == []
    assert len(differences(value(), value(last=1.0))) == 1
    assert len(differences(value(), value(dtype=np.float32))) == 1
    assert differences(value(), {**value(), "more": 1}) == ["result.keys(): 1 items became 2"]


@functools.cache
def reference(name, backend=None):
    """Return what an estimator answers alone, or with two jobs of joblib's own ``backend``."""
    with joblib.parallel_backend(backend, n_jobs=2) if backend else contextlib.nullcontext():
        return observe(name, n_jobs=2 if backend else 1)


def observe(name, n_jobs):
    """Return the fitted attributes of an estimator and the answers of its methods."""
    cls = estimators_with_n_jobs()[name]
    estimator = build(cls, n_jobs).fit(X, target(cls))
    fitted = [attribute for attribute in dir(estimator) if re.match(r"[a-zA-Z]\w*_$", attribute)]
    attributes = {name: getattr(estimator, name) for name in fitted if hasattr(estimator, name)}
    return attributes | {name: getattr(estimator, name)(X) for name in METHODS if hasattr(estimator, name)}


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


def differences(expected, actual, same=equal_bytes):
    """Return one line for each place where two results are not the very same."""
    return list(Comparison(same).compare(expected, actual, "result"))


class Comparison:
    """A walk through two results at once; arrays of one kind and shape are the ``same`` or not."""

    def __init__(self, same):
        self.same = same
        self.seen = {}  # holds what it names: the id of a collected object goes to another

    def compare(self, expected, actual, where):
        if type(expected) is not type(actual):
            yield f"{where}: {type(expected).__name__} became {type(actual).__name__}"
        elif isinstance(expected, dict):
            yield from self.items(list(expected), list(actual), f"{where}.keys()")
            for key in expected.keys() & actual.keys():
                if not NOT_COMPARED.search(str(key)):
                    yield from self.compare(expected[key], actual[key], f"{where}[{key!r}]")
        elif isinstance(expected, list | tuple):
            yield from self.items(expected, actual, where)
        elif isinstance(expected, np.ndarray | np.generic | float):
            yield from self.arrays(np.asanyarray(expected), np.asanyarray(actual), where)
        elif isinstance(expected, int | str | bytes | type | None) or inspect.isroutine(expected):
            if expected != actual:
                yield f"{where}: {expected!r} became {actual!r}"
        elif (id(expected), id(actual)) not in self.seen:
            self.seen[id(expected), id(actual)] = expected, actual
            yield from self.compare(parts(expected), parts(actual), where)

    def items(self, expected, actual, where):
        if len(expected) != len(actual):
            yield f"{where}: {len(expected)} items became {len(actual)}"
        for i, pair in enumerate(zip(expected, actual, strict=False)):
            yield from self.compare(*pair, f"{where}[{i}]")

    def arrays(self, expected, actual, where):
        if (expected.dtype, expected.shape) != (actual.dtype, actual.shape):
            yield f"{where}: {expected.dtype}{expected.shape} became {actual.dtype}{actual.shape}"
        elif isinstance(expected, np.ma.MaskedArray):
            hidden = np.ma.getmaskarray(expected)  # what lies under it was never written
            yield from self.arrays(hidden, np.ma.getmaskarray(actual), f"{where}.mask")
            yield from self.arrays(expected.compressed(), actual.compressed(), where)
        elif expected.dtype.names:
            for field in expected.dtype.names:  # the padding between fields was never written
                yield from self.arrays(expected[field], actual[field], f"{where}.{field}")
        elif expected.dtype.hasobject:
            yield from self.compare(expected.tolist(), actual.tolist(), where)
        elif not self.same(expected, actual):
            yield f"{where}: {expected} became {actual}"


def parts(value):
    """Return what makes an object: of estimators, trees and losses, what pickle would keep."""
    if sparse.issparse(value):
        entries = value.tocoo()
        return value.shape, entries.row, entries.col, entries.data
    if isinstance(value, KDTree | BallTree):
        return value.get_arrays()  # the rest counts the queries so far
    if hasattr(value, "iloc"):
        return value.dtypes.to_dict(), value.index.to_numpy(), value.to_numpy()
    return value.__reduce_ex__(4)
