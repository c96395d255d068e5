"""A task has the same identity in every process, and another one as soon as its result could be another."""

import copy
import functools
import gc
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn
from samples import memmap
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer

from joblib_backends.checkpoint.identity import TaskIdentities

#: Two sources that define ``f``, of which each computes something else.
CHANGES = {
    "constant": ("def f(): return 1", "def f(): return 2"),
    "type of a constant": ("def f(): return 1", "def f(): return 1.0"),
    "operator": ("def f(a): return a + 1", "def f(a): return a - 1"),
    "attribute": ("def f(a): return a.real", "def f(a): return a.imag"),
    "default": ("def f(a=1): return a", "def f(a=2): return a"),
    "keyword default": ("def f(*, a=1): return a", "def f(*, a=2): return a"),
    "nested function": ("def f(): return lambda: 1", "def f(): return lambda: 2"),
    "nested in a constant set": ("def f(a): return a in {'x', 'y', 'z'}", "def f(a): return a in {'x', 'y', 'w'}"),
    "handled exception": ("def f():\n try: g()\n except OSError: pass", "def f():\n try: g()\n except KeyError: pass"),
    "closure": ("def g(a):\n return lambda: a\nf = g(1)", "def g(a):\n return lambda: a\nf = g(2)"),
    "function in a closure": (
        "def g(a):\n return lambda: a\nf = g(lambda: 1)",
        "def g(a):\n return lambda: a\nf = g(lambda: 2)",
    ),
    "global": ("A = 1\ndef f(): return A", "A = 2\ndef f(): return A"),
    "global array": (
        "import numpy\nA = numpy.arange(9)\ndef f(): return A",
        "import numpy\nA = numpy.arange(9)\nA[4] = 7\ndef f(): return A",
    ),
    "global of a nested function": ("A = 1\ndef f(): return lambda: A", "A = 2\ndef f(): return lambda: A"),
    "global that a nested class names": (
        "A = 1\ndef f():\n class C: a = A\n return C.a",
        "A = 2\ndef f():\n class C: a = A\n return C.a",
    ),
    "beside a lock": (
        "import threading\nA = {'lock': threading.Lock(), 'a': 1}\ndef f(): return A",
        "import threading\nA = {'lock': threading.Lock(), 'a': 2}\ndef f(): return A",
    ),
    "in a cycle": ("A = [1]\nA.append(A)\ndef f(): return A", "A = [2]\nA.append(A)\ndef f(): return A"),
    "called function": ("def g(): return 1\ndef f(): return g()", "def g(): return 2\ndef f(): return g()"),
    "called twice removed": (
        "def h(): return 1\ndef g(): return h()\ndef f(): return g()",
        "def h(): return 2\ndef g(): return h()\ndef f(): return g()",
    ),
    "mutual recursion": (
        "def g(n): return f(n - 1)\ndef f(n): return n and g(n)",
        "def g(n): return f(n - 2)\ndef f(n): return n and g(n)",
    ),
    "two functions change places": (
        "def g(): return 1\ndef h(): return 2\nA = [g, h]\ndef f(): return A[0]()",
        "def g(): return 1\ndef h(): return 2\nA = [h, g]\ndef f(): return A[0]()",
    ),
    "partial": (
        "import functools\nf = functools.partial(lambda a: a, 1)",
        "import functools\nf = functools.partial(lambda a: a, 2)",
    ),
    "function of a partial": (
        "import functools\nf = functools.partial(lambda a: a, 1)",
        "import functools\nf = functools.partial(lambda a: -a, 1)",
    ),
    "decorated": (
        "import functools\ndef d(g): return functools.wraps(g)(lambda: g())\n@d\ndef f(): return 1",
        "import functools\ndef d(g): return functools.wraps(g)(lambda: g())\n@d\ndef f(): return 2",
    ),
    "decorator": (
        "import functools\ndef d(g): return functools.wraps(g)(lambda: g())\n@d\ndef f(): return 1",
        "import functools\ndef d(g): return functools.wraps(g)(lambda: -g())\n@d\ndef f(): return 1",
    ),
    "cached function": (
        "import functools\n@functools.cache\ndef f(): return 1",
        "import functools\n@functools.cache\ndef f(): return 2",
    ),
    "decorator of a library": (
        "import contextlib\n@contextlib.contextmanager\ndef f(): yield 1",
        "import contextlib\n@contextlib.contextmanager\ndef f(): yield 2",
    ),
    "attribute of a function": ("def f(): return f.a\nf.a = 1", "def f(): return f.a\nf.a = 2"),
    "method": (
        "class C:\n def m(self): return 1\nf = C().m",
        "class C:\n def m(self): return 2\nf = C().m",
    ),
    "other method": (
        "class C:\n def m(self): return self.n()\n def n(self): return 1\nf = C().m",
        "class C:\n def m(self): return self.n()\n def n(self): return 2\nf = C().m",
    ),
    "method of a base": (
        "class B:\n def n(self): return 1\nclass C(B): pass\nf = C().n",
        "class B:\n def n(self): return 2\nclass C(B): pass\nf = C().n",
    ),
    "object of a method": (
        "class C:\n def __init__(self, a): self.a = a\n def m(self): return self.a\nf = C(1).m",
        "class C:\n def __init__(self, a): self.a = a\n def m(self): return self.a\nf = C(2).m",
    ),
    "callable object": (
        "class C:\n def __call__(self): return 1\nf = C()",
        "class C:\n def __call__(self): return 2\nf = C()",
    ),
    "class attribute": ("class f:\n a = 1", "class f:\n a = 2"),
    "property": ("class f:\n @property\n def a(self): return 1", "class f:\n @property\n def a(self): return 2"),
    "static method": ("class f:\n @staticmethod\n def a(): return 1", "class f:\n @staticmethod\n def a(): return 2"),
    "class method": ("class f:\n @classmethod\n def a(c): return 1", "class f:\n @classmethod\n def a(c): return 2"),
    "cached property": (
        "import functools\nclass f:\n @functools.cached_property\n def a(self): return 1",
        "import functools\nclass f:\n @functools.cached_property\n def a(self): return 2",
    ),
    "abstract class": (
        "import abc\nclass B(abc.ABC):\n @abc.abstractmethod\n def a(self): return 1\ndef f(): return B",
        "import abc\nclass B(abc.ABC):\n @abc.abstractmethod\n def a(self): return 2\ndef f(): return B",
    ),
    "dataclass": (
        "import dataclasses\n@dataclasses.dataclass\nclass f:\n a: int = 1",
        "import dataclasses\n@dataclasses.dataclass\nclass f:\n a: int = 2",
    ),
    "enumeration": ("import enum\nclass f(enum.Enum):\n a = 1", "import enum\nclass f(enum.Enum):\n a = 2"),
    "named tuple": (
        "import typing\nclass f(typing.NamedTuple):\n a: int = 1",
        "import typing\nclass f(typing.NamedTuple):\n a: int = 2",
    ),
    "method of an object with a lock": (
        "import threading\nclass C:\n def __init__(self): self.lock = threading.Lock()\n def m(self): return 1\n"
        "A = C().m\ndef f(): return A()",
        "import threading\nclass C:\n def __init__(self): self.lock = threading.Lock()\n def m(self): return 2\n"
        "A = C().m\ndef f(): return A()",
    ),
    "set of functions": (
        "def g(): return 1\ndef h(): return 2\nA = {g, h, int}\ndef f(): return A",
        "def g(): return 1\ndef h(): return 3\nA = {g, h, int}\ndef f(): return A",
    ),
    "registry of functions": (
        "A = set()\ndef g(): return 1\ndef f(): return A\nA |= {f, g}",
        "A = set()\ndef g(): return 2\ndef f(): return A\nA |= {f, g}",
    ),
    "module": ("import math as m\ndef f(): return m.nan", "import cmath as m\ndef f(): return m.nan"),
    "compiled function": ("import numpy\nf = numpy.exp", "import numpy\nf = numpy.exp2"),
}

#: Two sources of ``f`` that compute the same.
SAME = {
    "place in the file": ("def f(a): return a", "\n\n# a comment\n\ndef f(a):\n\n    # another\n    return a"),
    "class further down": ("class f:\n def m(self): return 1", "\n\nclass f:\n\n def m(self): return 1"),
    "other function": ("def f(): return 1", "def g(): return 2\ndef f(): return 1"),
    "global that is not named": ("def f(a): return a.score", "score = 1\ndef f(a): return a.score"),
    "method of that name": ("def f(a): return a.score(1)", "score = 1\ndef f(a): return a.score(1)"),
    "two locks": tuple(["import threading\nA = threading.Lock()\ndef f(): return A"] * 2),
    "used generator": (
        "import numpy\nA = numpy.random.default_rng(0)\ndef f(): return A",
        "import numpy\nA = numpy.random.default_rng(0)\nA.random()\ndef f(): return A",
    ),
    "pool": (
        "from concurrent.futures import ThreadPoolExecutor\nA = ThreadPoolExecutor()\ndef f(): return A",
        "from concurrent.futures import ThreadPoolExecutor\nA = ThreadPoolExecutor()\nA.map(abs, [1])\n"
        "def f(): return A",
    ),
    "documentation of a class": ("class f:\n a = 1", "class f:\n 'Has an a.'\n a = 1"),
}


def defined_by(source):
    namespace = {"__name__": "a_script"}
    exec(compile(source, "a_script.py", "exec", dont_inherit=True), namespace)
    return namespace["f"]


def key(function=len, *args, **kwargs):
    return TaskIdentities().of(function, args, kwargs)


def all_keys():
    """Return the identities of everything in this file, to be compared across processes."""
    sources = [source for pair in [*CHANGES.values(), *SAME.values()] for source in pair]
    functions = [key(defined_by(source)) for source in sources]
    return [one.hex() for one in (*functions, *(key(len, value) for value in VALUES.values()))]


def requesting_scorer():
    with sklearn.config_context(enable_metadata_routing=True):
        return make_scorer(max).set_score_request(sample_weight=True)


VALUES = {
    "set": {f"word {i}" for i in range(50)},
    "set of tuples": {(f"word {i}", i) for i in range(50)},
    "counted set": type("Words", (set,), {})(f"word {i}" for i in range(50)),
    "classes": [int, type(None), type(...), type(len), np.ndarray, LogisticRegression],
    "functions": [len, np.exp, np.array, "".join, [].append, functools.partial(max, 1), json.dumps],
    "frame": pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": pd.Categorical(["u", "v"])}),
    "sparse": scipy.sparse.csr_array(np.eye(3)),
    "estimator": LogisticRegression(C=2).fit([[1.0], [2.0]], [0, 1]),
    "scorer": make_scorer(max, needs_b=1),
    "scorer with requests": requesting_scorer(),
    "objects": np.array([1, "a", None], dtype=object),
    "nested": {"a": [1, (2.0, {"b": np.arange(3)})]},
}


# ---- functions, classes, modules


@pytest.mark.parametrize("name", CHANGES)
def test_another_computation_is_another_task(name):
    before, after = CHANGES[name]
    assert key(defined_by(before)) == key(defined_by(before))
    assert key(defined_by(before)) != key(defined_by(after))


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_change_the_computation_does_not_count(name):
    before, after = SAME[name]
    assert key(defined_by(before)) == key(defined_by(after)) is not None


def test_identities_do_not_depend_on_what_was_asked_for_before():
    f = defined_by("def g(n): return f(n)\ndef f(n): return g(n)")
    g = f.__globals__["g"]
    identities = TaskIdentities()
    assert [identities.of(one, (), {}) for one in (g, f)] == [key(g), key(f)]
    assert key(f) != key(g)


def test_every_process_finds_the_same_identities():
    command = "import json, test_identity; print(json.dumps(test_identity.all_keys()))"
    folder = os.path.dirname(__file__)
    first, second = (json.loads(output_of(["-c", command], seed, folder)) for seed in (1, 2))
    assert first == second
    assert len(first) == 2 * (len(CHANGES) + len(SAME)) + len(VALUES)


def output_of(arguments, seed, folder, **variables):
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), **variables}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


#: Prints the identity of ``f``, or of each of ``functions``.
PRINTS_KEY = """
from joblib_backends.checkpoint.identity import TaskIdentities
for one in globals().get("functions") or [f]:
    print(TaskIdentities().of(one, (), {}).hex())
"""


class Project:
    """A script of a user, with modules beside it and libraries that are installed."""

    def __init__(self, folder):
        self.folder = folder
        self.seed = 0

    def key(self, script, prints=PRINTS_KEY, **files):
        self.seed += 1
        for name, text in {"script": script + prints, **files}.items():
            path = self.folder / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        libraries = str(self.folder / "site-packages")
        path = os.pathsep.join(filter(None, [libraries, os.environ.get("PYTHONPATH")]))
        return output_of(["script.py"], self.seed, self.folder, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def all_differ(first, second):
    pairs = list(zip(first.split(), second.split(), strict=True))
    return bool(pairs) and all(a != b for a, b in pairs)


@pytest.mark.parametrize(
    "script",
    [
        "import helper\nfrom helper import h\ndef f(): return helper.h()\ndef g(): return h()\nfunctions = [f, g, h]",
        "def f():\n import helper\n return helper\ndef g():\n from helper import h\n return h\nfunctions = [f, g]",
    ],
    ids=["loaded", "not loaded"],
)
def test_modules_of_the_user_count_by_what_they_say(project, script):
    before = project.key(script, helper="def h(): return 1")
    assert project.key(script, helper="def h(): return 1") == before
    assert all_differ(project.key(script, helper="def h(): return 2"), before)


@pytest.mark.parametrize("script", ["import helper\ndef f(): return helper", "def f():\n import helper"])
def test_so_do_the_modules_that_they_import(project, script):
    helper = "import lower\ndef h(): return lower.a"
    before = project.key(script, helper=helper, lower="a = 1\nimport helper")
    assert project.key(script, helper=helper, lower="a = 2\nimport helper") != before


def test_so_do_the_parts_of_packages(project):
    script = "import package.part\ndef f(): return package.part.a"
    files = {"package__in____init__": "", "package__in__other": "b = 1"}
    before = project.key(script, **files, package__in__part="a = 1\nfrom .other import b")
    assert project.key(script, **files, package__in__part="a = 2\nfrom .other import b") != before
    files["package__in__other"] = "b = 2"
    assert project.key(script, **files, package__in__part="a = 1\nfrom .other import b") != before


def test_installed_code_counts_by_its_version(project):
    script = (
        "import library\nfrom library import f\ndef g(): return library\n"
        "functions = [f, g, library.K, library.K().m, library.made()]"
    )
    source = "__version__ = '{}'\ndef f(): return {}\nclass K:\n def m(self): pass\ndef made(): return lambda: 1"
    before = project.key(script, **{"site-packages__in__library": source.format(1, 1)})
    assert project.key(script, **{"site-packages__in__library": source.format(1, 2)}) == before
    assert all_differ(project.key(script, **{"site-packages__in__library": source.format(2, 1)}), before)


def test_so_does_installed_code_that_is_not_loaded(project):
    def of(version):
        metadata = project.folder / "site-packages" / "library-1.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True, exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: library\nVersion: {version}\n")
        return project.key("def f():\n import library", **{"site-packages__in__library": f"a = '{time.time()}'"})

    assert of(1) == of(1) != of(2)


def test_installed_code_without_a_version_counts_by_its_source(project):
    before = project.key("from library import f", **{"site-packages__in__library": "def f(): return 1"})
    assert project.key("from library import f", **{"site-packages__in__library": "def f(): return 2"}) != before


# ---- arguments


@pytest.mark.parametrize("name", VALUES)
def test_an_equal_argument_is_the_same_task(name):
    assert key(len, VALUES[name]) == key(len, copy.deepcopy(VALUES[name])) is not None


def test_arguments_by_name_have_no_order():
    assert key(max, a=1, b=2) == key(max, b=2, a=1) != key(max, a=2, b=1)
    assert key(max, {"a": 1, "b": 2}) != key(max, {"b": 2, "a": 1})


def test_what_is_ignored_does_not_count():
    identities = TaskIdentities()
    ignored = frozenset({"b"})
    of = functools.partial(identities.of, len, (), ignored=ignored)
    assert of({"a": 1, "b": 2}) == of({"a": 1, "b": threading.Lock()}) != of({"a": 2, "b": 2})
    assert of({}, arguments={"a": 1, "b": 2}) == of({}, arguments={"b": 3, "a": 1}) == of({"a": 1})


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), np.random.RandomState(0), np.random.default_rng(0), random.Random(0), (i for i in "ab")],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_content_has_no_identity(value):
    assert key(len, [value]) is None
    assert key(functools.partial(len, value)) is None
    assert TaskIdentities().of(len, (), {}, arguments={"a": [value]}) is None


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng, random.Random])
def test_generators_may_count_by_their_state(make):
    def of(generator):
        task = ([generator, LogisticRegression(random_state=generator)],)
        return TaskIdentities().of(len, task, {}, generators_have_content=True)

    used = make(0)
    used.random()
    assert of(make(0)) == of(make(0)) != of(make(1))
    assert of(used) != of(make(0))


def test_a_memmap_counts_by_its_file(tmp_path):
    mapped = memmap(tmp_path, "r")
    before = key(len, mapped)
    assert key(len, np.memmap(tmp_path / "r.bin", float, "r", shape=mapped.shape)) == before
    assert key(len, mapped[1:]) != before
    os.utime(tmp_path / "r.bin", (1, 1))
    assert key(len, mapped) != before


@pytest.mark.parametrize("n", [1_000, 2_000_000])
def test_an_array_that_is_filled_anew_is_another_argument(n):
    identities, array = TaskIdentities(), np.zeros(n)
    seen = []
    for i in range(3):
        array[:] = i
        seen.append(identities.of(len, (array,), {}))
    assert len(set(seen)) == 3
    assert seen == [key(len, np.full(n, float(i))) for i in range(3)]


def test_one_element_of_a_large_array_counts():
    array = np.zeros((2, 1_000_000))
    changed = array.copy()
    changed[1, 777] = 1
    assert key(len, array) == key(len, array.copy()) != key(len, changed)
    assert key(len, array) != key(len, np.asfortranarray(array))


def test_data_of_known_functions_is_looked_at_once(monkeypatch):
    identities, frame = TaskIdentities(), VALUES["frame"].copy()
    first = identities.of(len, (), {}, arguments={"X": frame, "i": 1})
    looks = []
    monkeypatch.setattr(pd.DataFrame, "__getstate__", lambda self: looks.append(1), raising=False)
    assert identities.of(len, (), {}, arguments={"X": frame, "i": 1}) == first
    assert identities.of(len, (), {}, arguments={"X": frame, "i": 2}) != first
    assert looks == []


def test_what_was_seen_is_not_kept_alive():
    identities = TaskIdentities()
    array, f = np.zeros(2_000_000), defined_by("def f(): return 1")
    identities.of(f, (array,), {})
    watched = weakref.ref(array), weakref.ref(f)
    del array, f
    gc.collect()
    assert [one() for one in watched] == [None, None]


def test_versions_are_named():
    identities = TaskIdentities()
    identities.of(len, (LogisticRegression(), VALUES["frame"]), {})
    text = identities.versions()
    assert text.startswith(f"python {sys.version_info.major}.{sys.version_info.minor}, numpy {np.__version__}, scipy ")
    assert f"pandas {pd.__version__}" in text
    assert "scikit-learn 1." in text
    assert repr(identities) == f"<TaskIdentities {text}>"


# ---- scikit-learn's searches

SEARCH = textwrap.dedent(
    """
    import joblib, sklearn
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, make_scorer
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline

    class Scale(TransformerMixin, BaseEstimator):
        def __init__(self, words=frozenset("abc")):
            self.words = words
        def fit(self, X, y=None):
            return self
        def transform(self, X):
            return X * 2

    def score(y, z):
        return accuracy_score(y, z)

    X, y = load_iris(return_X_y=True)
    search = GridSearchCV(
        Pipeline([("scale", Scale()), ("model", LogisticRegression())]), {"model__C": [1, 2]}, cv=2,
        scoring=make_scorer(score),
    )
    """
)

#: Prints the identities of the tasks of a search, which is not run.
PRINTS_KEYS = textwrap.dedent(
    """
    from joblib_backends.checkpoint.identity import TaskIdentities
    from joblib_backends.sharing.sklearn_inside import arguments_of

    IGNORED = frozenset({"caller", "callback_ctx", "verbose", "split_progress", "candidate_progress"})
    def keys(self, tasks):
        identities = TaskIdentities()
        for task in tasks:
            print("key", identities.of(*task, ignored=IGNORED, arguments=arguments_of(*task)).hex())
        raise SystemExit
    joblib.Parallel.__call__ = keys
    search.fit(X, y)
    """
)


def keys_of_search(project, *change):
    assert not change or change[0] in SEARCH
    printed = project.key(SEARCH.replace(*change) if change else SEARCH, PRINTS_KEYS)
    return [line.removeprefix("key ") for line in printed.splitlines() if line.startswith("key ")]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return keys_of_search(Project(tmp_path_factory.mktemp("search")))


def test_tasks_of_a_search_are_known_again(project, keys):
    assert len(set(keys)) == 4
    assert keys_of_search(project) == keys
    # Only what the changed candidate does is new: C=1 is found again.
    assert set(keys_of_search(project, "[1, 2]", "[1, 3]")) & set(keys) == set(keys[:2])
    assert keys_of_search(project, "cv=2", "cv=2, verbose=1") == keys


@pytest.mark.parametrize(
    "change",
    [
        ("X * 2", "X * 3"),
        ("accuracy_score(y, z)", "-accuracy_score(y, z)"),
        ("\nsearch =", "\nX[7, 1] += 1e-9\nsearch ="),
        ("\nsearch =", "\ny[7] = 1\nsearch ="),
        ('"abc"', '"abd"'),
        ("\nsearch =", "\nsklearn.set_config(assume_finite=True)\nsearch ="),
        ("LogisticRegression())", "LogisticRegression(tol=1e-3))"),
        ("make_scorer(score)", "make_scorer(score, greater_is_better=False)"),
    ],
    ids=["transformer", "scorer", "X", "y", "parameter", "configuration", "model", "sign"],
)
def test_tasks_of_a_changed_search_are_others(project, keys, change):
    others = keys_of_search(project, *change)
    assert len(others) == 4
    assert not set(others) & set(keys)


def test_scorers_of_the_estimator_have_an_identity(project):
    change = ("scoring=make_scorer(score)", "scoring=None")
    found = keys_of_search(project, *change)
    assert len(set(found)) == 4
    assert keys_of_search(project, *change) == found
