"""Bad input gets one sentence: the value, what is allowed, what to change; a user's own errors pass untouched."""

import concurrent.futures
import functools
import multiprocessing
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings

import numpy as np
import pytest
from conftest import COPYING_TIERS, make_hybrid
from joblib import Parallel, delayed, parallel_backend, parallel_config

import joblib_backends
from joblib_backends import HybridBackend, errors
from joblib_backends.errors import (
    ClusterUnavailableError,
    ConfigurationError,
    HybridError,
    MissingDependencyError,
    RecoveryWarning,
    RemoteTraceback,
    ResultPicklingError,
    TaskLoadError,
    TaskPicklingError,
)


@pytest.fixture(scope="module", autouse=True)
def _warm_workers():
    """Hold the pool of process workers for all tests of this file; each context finds it."""
    backend = HybridBackend(tier="processes")
    with parallel_config(backend, n_jobs=2):
        Parallel()(delayed(abs)(-i) for i in range(4))
    yield
    backend.close()


@pytest.fixture(params=COPYING_TIERS)
def copying(request):
    """A context on each tier whose workers have memory of their own."""
    return make_hybrid(request.param, request)


@pytest.fixture(params=["processes", "dask"])
def distant(request):
    """A context on each tier with workers in other processes; tblib, if loaded, teaches this one to load any error."""
    return make_hybrid(request.param, request)


def run(code):
    """Run ``code`` in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the tree

TREE = dict(re.findall(r"[├└]── (\w+)\s+\((\w+)\)", errors.__doc__))
FIELD = {
    "ValueError": ValueError,
    "ImportError": ImportError,
    "TimeoutError": TimeoutError,
    "OSError": OSError,
    "ConnectionError": ConnectionError,
    "RuntimeError": RuntimeError,
    "PicklingError": pickle.PicklingError,
    "BrokenExecutor": concurrent.futures.BrokenExecutor,
}


def test_the_docstring_draws_every_error():
    warned = {"RecoveryWarning", "CheckpointWarning", "EnvironmentWarning"}
    assert {"HybridError", "RemoteTraceback", *warned, *TREE} == set(errors.__all__)
    assert all(re.search(rf" {name} ", errors.__doc__) for name in warned)


@pytest.mark.parametrize("name", TREE)
def test_every_error_is_also_the_one_of_the_field(name):
    assert issubclass(getattr(errors, name), HybridError)
    assert issubclass(getattr(errors, name), FIELD[TREE[name]])


@pytest.mark.parametrize("name", TREE)
def test_every_error_survives_a_pickle(name):
    error = pickle.loads(pickle.dumps(getattr(errors, name)("what failed")))
    assert (type(error), str(error)) == (getattr(errors, name), "what failed")


def test_a_timeout_is_joblibs_and_the_builtin_one():
    assert issubclass(errors.BatchTimeoutError, multiprocessing.TimeoutError)


def test_the_tracebacks_of_workers_are_no_errors_of_ours():
    assert not issubclass(RemoteTraceback, HybridError)


# ---- parameters

WRONG = {
    "tier": ["gpu", 3, ""],
    "scatter": [np.ones(3), "X", {"X": 1}],
    "client": ["tcp://127.0.0.1:8786", 3],
    "scheduler": [8786, object(), ""],
    "workers": ["node1", 3, [], [None], [""], [True]],
    "resources": ["GPU=1", {}, {"GPU": 0}, {"GPU": "1"}, {"": 1}, {1: 1}, {"GPU": float("inf")}, {"GPU": True}],
    "priority": ["high", True, float("nan"), [1]],
    "inner_max_num_threads": [0, -1, "2", 1.5, True],
    "initializer": ["setup", 3],
    "initargs": [3, "ab"],
    "wait_for_workers": [0, -1, "10", float("nan"), True],
    "idle_worker_timeout": [0, -1, "10", float("nan")],
    "retries": [-1, 1.5, "2", True],
    "task_timeout": [0, -1, "10", float("nan"), True],
    "fallback": ["yes", 1, 0],
    "security": ["certificate.pem", 3],
    "checkpoint": [3, b"/tmp/a"],
    "progress": ["yes", 1, 0, "Always"],
    "record": ["yes", 1, 0],
    "trace": [True, 7, b"run.json"],
    "share_fits": ["yes", 1, 0],
    "share_fits_nbytes": [-1, "ten", 1.5, True],
    "max_nbytes": [-1, "ten", "10X", "", True],
    "temp_folder": [3, b"/tmp"],
    "mmap_mode": ["rw", 3, ""],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=rf"^{name} is .*, but must be ") as caught:
        HybridBackend(**{name: value})
    if not isinstance(value, np.ndarray | dict | str) or name != "scatter":
        assert repr(value) in str(caught.value)


def test_every_parameter_has_a_row_above():
    import dataclasses

    # Those two are set for calls in tasks, and no parameters.
    of_calls = {"cores", "outer_task"}
    assert {field.name for field in dataclasses.fields(joblib_backends.config.Config)} - of_calls == set(WRONG)


def test_an_unknown_tier_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'gpu', but must be one of 'auto', .*'processes', .*'threads'"):
        parallel_backend("hybrid", tier="gpu")


def test_an_unknown_tier_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("JOBLIB_BACKEND_TIER", "gpu")
    with pytest.raises(ConfigurationError, match=r"JOBLIB_BACKEND_TIER.*'gpu'.*'processes'"):
        HybridBackend()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("JOBLIB_BACKEND_WAIT_FOR_WORKERS", "soon", "a number of seconds"),
        ("JOBLIB_BACKEND_WAIT_FOR_WORKERS", "-1", "greater than 0"),
        ("JOBLIB_BACKEND_INNER_MAX_NUM_THREADS", "two", "a whole number of at least 1"),
        ("JOBLIB_BACKEND_SHARE_FITS", "perhaps", "1 or 0"),
        ("JOBLIB_BACKEND_SHARE_FITS_NBYTES", "many", "a number of bytes"),
        ("JOBLIB_BACKEND_WORKERS", ",", "names, addresses or hosts of Dask workers"),
        ("JOBLIB_BACKEND_RESOURCES", "GPU", "amounts of resources, such as GPU=1"),
        ("JOBLIB_BACKEND_RESOURCES", "GPU=-1", "resources={'GPU': 1}"),
        ("JOBLIB_BACKEND_PRIORITY", "high", "a number"),
        ("JOBLIB_BACKEND_TEIR", "dask", "JOBLIB_BACKEND_TIER"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(variable, value, says, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=rf"{variable}.*{says}"):
        HybridBackend()


def test_an_unknown_parameter_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'teir', but must be one of .*'tier'"):
        parallel_backend("hybrid", teir="threads")


def test_scatter_of_one_object_says_how_to_write_it():
    with pytest.raises(ConfigurationError, match=r"scatter is a ndarray.*write scatter=\[X\] for one object"):
        parallel_backend("hybrid", scatter=np.ones(3))


def test_scatter_of_what_cannot_be_pickled_names_it(copying):
    with copying(scatter=[np.ones(3), threading.Lock()]), pytest.raises(TaskPicklingError) as caught:
        Parallel()(delayed(abs)(i) for i in range(4))
    assert re.match(r"scatter\[1\] is a lock that cannot be pickled: .*Leave it out of scatter", str(caught.value))


@pytest.mark.parametrize("n_jobs", [0, "two", (2,)])
def test_a_wrong_number_of_jobs_is_refused(n_jobs, hybrid):
    with pytest.raises((ValueError, TypeError), match=r"n_jobs|int"), hybrid(n_jobs=n_jobs):
        Parallel()(delayed(abs)(i) for i in range(4))


def test_no_jobs_at_all_says_what_to_use_instead(hybrid):
    with hybrid(n_jobs=0), pytest.raises(ConfigurationError, match=r"n_jobs == 0 .*use n_jobs=-1 for all cores"):
        Parallel()(delayed(abs)(i) for i in range(4))


@pytest.mark.parametrize("place", ["context", "call"])
def test_shared_memory_on_processes_is_a_contradiction_if_the_user_wrote_both(place):
    in_context, in_call = ({"require": "sharedmem"} if place == p else {} for p in ("context", "call"))
    with (
        pytest.raises(ConfigurationError, match=r"require='sharedmem' cannot be met with tier='processes'.*'threads'"),
        parallel_config("hybrid", tier="processes", n_jobs=2, **in_context),
    ):
        Parallel(**({"tier": "processes", **in_call} if in_call else {}))(delayed(abs)(i) for i in range(4))


def test_a_librarys_own_need_for_shared_memory_is_met_on_processes():
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier

    x, y = make_classification(100, random_state=0)
    forest = RandomForestClassifier(10, random_state=0).fit(x, y)
    expected = forest.predict(x)
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        np.testing.assert_array_equal(forest.set_params(n_jobs=2).predict(x), expected)
    assert "sharedmem" in joblib_backends.last_report().reason


# ---- clusters


def test_dask_without_distributed_names_the_extra():
    code = """
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("distributed", "dask"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Blocker())
        from joblib import Parallel, delayed, parallel_backend
        import joblib_backends
        try:
            with parallel_backend("hybrid", tier="dask", n_jobs=2):
                Parallel()(delayed(abs)(i) for i in range(4))
        except joblib_backends.errors.MissingDependencyError as error:
            print(error, "|", type(error.__cause__).__name__)
    """
    assert run(code) == (
        "tier='dask' needs the package 'distributed': No module named 'distributed'. "
        "pip install 'joblib-backends[dask]'. | ModuleNotFoundError\n"
    )


def test_a_tier_whose_package_is_missing_says_which():
    joblib_backends.register_tier("absent", "no_such_package.tier:Tier")
    with (
        pytest.raises(MissingDependencyError, match=r"tier='absent' needs the package 'no_such_package'.*Install"),
        parallel_backend("hybrid", tier="absent", n_jobs=2),
    ):
        Parallel()(delayed(abs)(i) for i in range(4))


def test_dask_without_a_cluster_says_what_to_give():
    pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    with (
        pytest.raises(ConfigurationError, match=r"has no cluster: give scheduler=.* or client="),
        parallel_backend("hybrid", tier="dask", n_jobs=2),
    ):
        Parallel()(delayed(abs)(i) for i in range(4))


def test_a_scheduler_that_does_not_answer_is_named_with_the_wait():
    pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    address = "tcp://127.0.0.1:9"
    with (
        pytest.raises(ClusterUnavailableError, match=rf"{address}.* within wait_for_workers=0.5 seconds"),
        parallel_backend("hybrid", scheduler=address, wait_for_workers=0.5, n_jobs=2, fallback=False),
    ):
        Parallel()(delayed(abs)(i) for i in range(4))
    with (
        pytest.warns(RecoveryWarning, match=rf"on this machine \(fallback=False .*{address}"),
        parallel_backend("hybrid", scheduler=address, wait_for_workers=0.5, n_jobs=2),
    ):
        assert Parallel()(delayed(abs)(i) for i in range(4)) == [0, 1, 2, 3]


def test_an_address_that_is_none_is_refused():
    pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    with (
        pytest.raises(ConfigurationError, match=r"scheduler is 'nonsense://x', but must be an address such as 'tcp:"),
        parallel_backend("hybrid", scheduler="nonsense://x", wait_for_workers=0.5, n_jobs=2),
    ):
        Parallel()(delayed(abs)(i) for i in range(4))


def test_a_cluster_without_workers_is_named_with_the_wait():
    distributed = pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        pytest.raises(
            ClusterUnavailableError, match=r"has had no worker for 0.5 seconds.*wait_for_workers=1"
        ) as caught,
        parallel_backend("hybrid", client=client, wait_for_workers=0.5, n_jobs=2, fallback=False),
    ):
        Parallel()(delayed(abs)(i) for i in range(4))
    assert cluster.scheduler_address in str(caught.value)


# ---- what cannot travel


class Odd(Exception):
    """Its pickle cannot be loaded: __init__ needs two arguments and hands on one."""

    def __init__(self, code, where):
        super().__init__(f"{code} in {where}")


class Shy(Exception):
    """It cannot even be printed."""

    def __init__(self, a, b):
        super().__init__(a)

    def __str__(self):
        raise RuntimeError("no text")


class LoadsHereOnly:
    """Loads in the process that made it and fails in every other, as code of a missing module does."""

    def __init__(self, name="no_such_module_anywhere"):
        self.name = name

    def __reduce__(self):
        return __import__, (self.name,)


class FailsToLoad:
    def __reduce__(self):
        return functools.partial(int), ("not a number",)


def take(*args, **kwargs):
    return len(args)


def make_lock(_):
    return threading.Lock()


def make_unloadable(_):
    return FailsToLoad()


def raise_odd(i):
    raise Odd(i, "here")


def raise_shy(i):
    raise Shy(i, "here")


def raise_with_lock(i):
    raise ValueError(i, threading.Lock())


def fail_with(copying, error, match, task):
    """Assert that four tasks fail with a message, and that the next call works."""
    with copying():
        with pytest.raises(error, match=match) as caught:
            Parallel(batch_size=1)(task(i) for i in range(4))
        assert Parallel()(delayed(abs)(-i) for i in range(4)) == [0, 1, 2, 3]
    return caught.value


def test_an_argument_that_cannot_be_pickled_is_named(copying):
    match = r"argument 1 of take, a lock, cannot be pickled: .*prefer='threads'"
    fail_with(copying, TaskPicklingError, match, lambda i: delayed(take)(i, threading.Lock()))


def test_a_keyword_argument_that_cannot_be_pickled_is_named(copying):
    match = r"argument 'lock' of take, a dict, cannot be pickled"
    fail_with(copying, TaskPicklingError, match, lambda i: delayed(take)(i, lock={"a": threading.Lock()}))


def test_a_function_that_cannot_be_pickled_is_named(copying):
    lock = threading.Lock()

    def locked(i):
        with lock:
            return i

    fail_with(copying, TaskPicklingError, "the function of .*locked, a function, cannot be", delayed(locked))


def test_a_result_that_cannot_be_pickled_is_named(copying):
    match = r"result of the task 0 .*a lock, cannot be pickled: .*Return what it is made from"
    fail_with(copying, ResultPicklingError, match, delayed(make_lock))


def test_a_result_that_cannot_be_loaded_is_an_error(copying):
    match = r"cannot be loaded here: ValueError: invalid literal"
    fail_with(copying, ResultPicklingError, match, delayed(make_unloadable))


@pytest.mark.parametrize(("function", "name"), [(raise_odd, "Odd: . in here"), (raise_with_lock, "ValueError: ")])
def test_an_exception_that_cannot_travel_is_named_with_its_text(function, name, distant):
    error = fail_with(distant, ResultPicklingError, f"A task raised .*{name}", delayed(function))
    assert f"in {function.__name__}" in str(error.__cause__)


def test_an_exception_that_cannot_even_be_printed_is_named(distant):
    fail_with(distant, ResultPicklingError, "A task raised .*Shy", delayed(raise_shy))


def test_a_module_that_a_worker_lacks_is_named(copying):
    match = r"ModuleNotFoundError: .*cannot import no_such_module_anywhere: install it there"
    fail_with(copying, TaskLoadError, match, lambda i: delayed(take)(LoadsHereOnly()))


def test_an_argument_that_a_worker_cannot_load_is_named(copying):
    match = r"A worker could not load the task 0 of a batch: ValueError: invalid literal"
    fail_with(copying, TaskLoadError, match, lambda i: delayed(take)(FailsToLoad()))


@pytest.mark.parametrize("tier", ["processes", "dask"])
def test_a_filter_of_warnings_that_a_worker_cannot_import_is_named(tier, request, monkeypatch):
    """scikit-learn sends the filters along, and their categories may be of a module that only the parent has."""
    from sklearn.utils.parallel import Parallel as SklearnParallel
    from sklearn.utils.parallel import delayed as sklearn_delayed

    module = type(sys)("only_in_the_parent")
    module.Category = type("Category", (UserWarning,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with warnings.catch_warnings(), make_hybrid(tier, request)():
        warnings.simplefilter("ignore", module.Category)
        with pytest.raises(TaskLoadError, match=r"cannot import only_in_the_parent: .*warnings.filters"):
            SklearnParallel()(sklearn_delayed(take)(i) for i in range(4))


# ---- the user's own exceptions


class Own(Exception):
    """An exception with arguments and attributes."""


def boom(i):
    error = Own("what", i)
    error.detail = {"i": i}
    error.add_note(f"while doing {i}")
    raise error


def test_a_users_exception_passes_untouched(hybrid):
    with hybrid(), pytest.raises(Own, match=r"what") as caught:
        Parallel(batch_size=1)(delayed(boom)(3) for _ in range(4))
    error = caught.value
    assert (type(error), error.args, error.detail) == (Own, ("what", 3), {"i": 3})
    assert error.__notes__ == ["while doing 3"]
    assert "in boom" in "".join(traceback.format_exception(error))


def test_the_traceback_of_the_worker_is_the_cause(copying):
    with copying(), pytest.raises(Own) as caught:
        Parallel()(delayed(boom)(i) for i in range(4))
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert re.search(r'test_errors.py", line \d+, in boom\n', caught.value.__cause__.text)


@pytest.mark.parametrize(
    ("kind", "args"),
    [(KeyError, ("k",)), (OSError, (2, "No such file", "name")), (LookupError, ()), (SystemExit, (4,))],
)
def test_builtin_exceptions_keep_type_and_arguments(kind, args, hybrid):
    error = kind(*args)  # made here: one that lived on would hold, by its traceback, the call that raised it
    with hybrid(), pytest.raises(kind) as caught:
        Parallel()(delayed(throw)(error) for _ in range(4))
    assert (type(caught.value), caught.value.args) == (type(error), error.args)


def throw(error):
    raise error


def test_the_first_failure_is_reported_and_the_report_says_so(hybrid):
    with hybrid(), pytest.raises(Own):
        Parallel()(delayed(boom)(i) for i in range(4))
    assert joblib_backends.last_report().failed
