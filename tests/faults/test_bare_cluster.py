"""Dask clusters on which nothing of ours is installed: not the package, not what only the client needs.

Schedulers and workers are fresh interpreters from which what is installed here is hidden (``bare/sitecustomize.py``).
"""

import contextlib
import os
import re
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
from clusters import HERE, LONG, Cluster, Step, eventually, free_port, wait_until
from errands import endless_at, noted, square, square_with_company, squares, total, where_from
from joblib import Parallel, delayed, parallel_backend
from sklearn.model_selection import GridSearchCV

import joblib_backends
from joblib_backends import last_report
from joblib_backends.errors import EnvironmentWarning, MissingDependencyError, TaskTimeoutError

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

#: Every test here takes seconds.
pytestmark = pytest.mark.timeout(180)

#: What is installed for the client only. scikit-learn cannot do without threadpoolctl.
OURS = ("joblib_backends", "xxhash", "loky")
OURS_AND_SKLEARN = (*OURS, "threadpoolctl", "sklearn")

RETURN_AS = ["list", "generator", "generator_unordered"]


#: They end by themselves when the tests do not see to that.
ENDS = {"scheduler": ("--idle-timeout", "300s"), "worker": ("--death-timeout", "60s")}


class Interpreters:
    """Starts schedulers and workers as fresh interpreters; takes the place of a nursery."""

    def __init__(self):
        self._processes = []

    def fork(self, command, *arguments, log, environment=None, private_shm=False, hidden=(), holder=None):
        assert (private_shm, tuple(hidden), holder) == (False, (), None), "these live on this host"
        inherited = {name: text for name, text in os.environ.items() if not name.startswith(("JOBLIB", "DASK"))}
        path = [str(HERE / "bare"), str(HERE)]
        inherited |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **(environment or {})}
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{command}", *map(str, arguments), *ENDS[command]],
                env=inherited,
                cwd=Path(log).parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._processes.append(process)
        return psutil.Process(process.pid)

    def close(self):
        for process in self._processes:
            process.wait(LONG)


@pytest.fixture(scope="module")
def interpreters():
    interpreters = Interpreters()
    yield interpreters
    interpreters.close()


@contextlib.contextmanager
def running(interpreters, folder, n_workers=2, *, hidden=OURS_AND_SKLEARN, path=(), **options):
    """Return a cluster whose processes cannot import what is ``hidden``, and find modules in ``path`` first."""
    environment = {"HIDDEN_MODULES": ",".join(hidden)}
    if path:
        first = [str(HERE / "bare"), *map(str, path), str(HERE)]
        environment["PYTHONPATH"] = os.pathsep.join(first)
    cluster = Cluster(interpreters, folder, n_workers, environment=environment, **options)
    try:
        yield cluster.ready() if n_workers else cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def bare(interpreters, tmp_path_factory):
    """Return a cluster of two workers with Dask, joblib and numpy."""
    with running(interpreters, tmp_path_factory.mktemp("bare")) as cluster:
        yield cluster


@contextlib.contextmanager
def hybrid(cluster, **options):
    options = {"n_jobs": 2, "wait_for_workers": LONG, "scheduler": cluster.address, "fallback": False, **options}
    with parallel_backend("hybrid", **options) as backend:
        yield backend


@contextlib.contextmanager
def said():
    """Return a list that has the texts of the EnvironmentWarnings of the block at its end."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(warning.message) for warning in caught if issubclass(warning.category, EnvironmentWarning)]


# ---- the package travels


@pytest.mark.parametrize("return_as", RETURN_AS)
def test_calls_run_where_nothing_of_ours_is_installed(bare, tmp_path, return_as):
    with hybrid(bare), said() as found:
        results = list(Parallel(return_as=return_as, batch_size=1)(delayed(square)(i, tmp_path) for i in range(20)))
    assert sorted(results) == [i * i for i in range(20)]
    assert last_report().tier == "dask"
    assert {process for _, process in noted(tmp_path)} <= set(bare.worker_pids())
    assert found == []


def test_what_runs_there_has_come_in_a_zip_that_only_its_owner_can_read(bare):
    with hybrid(bare):
        [(file, others)] = Parallel()(delayed(where_from)(i) for i in range(1))
    zipped = Path(file).parents[1]
    assert zipped.suffix == ".zip"
    assert zipped.is_file()
    assert others == []
    assert stat.S_IMODE(zipped.parent.stat().st_mode) == 0o700


def test_nested_calls_run_there(bare, tmp_path):
    with hybrid(bare):
        found = Parallel()(delayed(squares)(range(i, i + 3), tmp_path) for i in range(0, 6, 3))
    assert found == [[0, 1, 4], [9, 16, 25]]


def test_scattered_data_is_read_there(bare):
    data = np.arange(500_000.0)
    with hybrid(bare, scatter=[data]):
        assert Parallel()(delayed(total)(data, i) for i in range(4)) == [data.sum() + i for i in range(4)]


def test_an_error_of_a_task_comes_back(bare, tmp_path):
    with hybrid(bare), pytest.raises(TypeError, match="can't multiply sequence"):
        Parallel()(delayed(square)(name, tmp_path) for name in "ab")


def test_a_search_runs_on_workers_that_have_scikit_learn(interpreters, tmp_path):
    data, target = np.random.default_rng(0).random((60, 3)), np.arange(60) % 2

    def scores(n_jobs):
        search = GridSearchCV(Step(), {"c": [0, 1, 2]}, cv=3, n_jobs=n_jobs, error_score="raise")
        return search.fit(data, target).cv_results_["mean_test_score"].tolist()

    with running(interpreters, tmp_path, hidden=OURS) as cluster, hybrid(cluster):
        assert scores(2) == scores(1)
        assert last_report().tier == "dask"


def test_task_timeout_needs_nothing_on_the_scheduler(interpreters, tmp_path):
    with (
        running(interpreters, tmp_path, nanny=True) as cluster,
        hybrid(cluster, task_timeout=1.0),
        pytest.raises(TaskTimeoutError, match="endless_at, task 3"),
    ):
        Parallel(batch_size=1)(delayed(endless_at)(i, 3) for i in range(6))
    assert "Traceback" not in cluster.log()


def test_workers_that_join_during_a_call_are_given_the_package(interpreters, tmp_path):
    with running(interpreters, tmp_path, n_workers=1) as cluster:

        def join_when_it_has_begun():
            wait_until(lambda: noted(tmp_path))
            cluster.add_worker()

        joining = threading.Thread(target=join_when_it_has_begun)
        joining.start()
        with hybrid(cluster):
            tasks = (delayed(square_with_company)(i, tmp_path, 2) for i in range(40))
            assert Parallel(batch_size=1)(tasks) == [i * i for i in range(40)]
        joining.join(LONG)


def test_a_cluster_that_starts_without_workers_gives_them_the_package(interpreters, tmp_path):
    with running(interpreters, tmp_path, n_workers=0) as cluster:
        cluster.add_worker()
        with hybrid(cluster):
            assert Parallel()(delayed(square)(i, tmp_path) for i in range(4)) == [0, 1, 4, 9]


def test_a_scheduler_that_comes_in_the_place_of_another_hands_it_out_too(interpreters, tmp_path):
    port = free_port()
    with running(interpreters, tmp_path, port=port) as first, hybrid(first):
        assert Parallel()(delayed(square)(i, tmp_path) for i in range(4)) == [0, 1, 4, 9]
        first.close()
        with running(interpreters, tmp_path, port=port):
            assert Parallel()(delayed(square)(i, tmp_path) for i in range(4)) == [0, 1, 4, 9]


def test_the_copy_goes_with_its_worker(interpreters, tmp_path):
    with running(interpreters, tmp_path, n_workers=1) as cluster:
        with hybrid(cluster):
            [(file, _)] = Parallel()(delayed(where_from)(i) for i in range(1))
        assert Path(file).parents[1].is_file()
        with cluster.client() as client:
            client.retire_workers(close_workers=True)
        assert eventually(lambda: not Path(file).parents[2].exists())


# ---- who has it already


def write_package(folder, version):
    """Write a package by our name that can do nothing."""
    package = folder / "joblib_backends"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return folder


def test_workers_that_have_the_same_source_get_no_copy(interpreters, tmp_path):
    ours = Path(joblib_backends.__file__).parents[1]
    hidden = ("loky",)
    with running(interpreters, tmp_path, hidden=hidden, path=[ours]) as cluster, hybrid(cluster), said() as found:
        [(file, _)] = Parallel()(delayed(where_from)(i) for i in range(1))
    assert file == joblib_backends.__file__
    assert not list(tmp_path.rglob("*.zip"))
    assert found == []


def test_the_clients_version_goes_before_another_that_is_installed(interpreters, tmp_path):
    older = write_package(tmp_path / "installed", "0.0.1")
    with running(interpreters, tmp_path, hidden=("xxhash",), path=[older]) as cluster, hybrid(cluster), said() as found:
        assert Parallel()(delayed(square)(i, tmp_path) for i in range(4)) == [0, 1, 4, 9]
        [(file, _)] = Parallel()(delayed(where_from)(i) for i in range(1))
    assert Path(file).parents[1].suffix == ".zip"
    assert found == []


def test_another_version_that_is_in_use_is_reported_before_work_starts(interpreters, tmp_path):
    older = write_package(tmp_path / "installed", "0.0.1")
    with running(interpreters, tmp_path, hidden=("xxhash",), path=[older]) as cluster:
        with cluster.client() as client:
            client.run(__import__, "joblib_backends", workers=[min(client.scheduler_info()["workers"])])
        with said() as found, hybrid(cluster):
            pass
        assert found == []
        with said() as found, hybrid(cluster):
            joblib_backends.tiers.load_tier("dask").capacity(joblib_backends.config.Config(scheduler=cluster.address))
    (sentence,) = found
    here = re.escape(joblib_backends.__version__)
    assert re.search(rf"joblib_backends 0\.0\.1 on 1 of 2 workers \(tcp://.*\) and {here} here; restart", sentence)


# ---- versions


def pretend(folder, distribution, version):
    """Have ``importlib.metadata`` find another version first, in an interpreter that has the folder on its path."""
    described = folder / f"{distribution}-{version}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return folder


def test_a_differing_version_is_said_once_and_in_one_sentence(interpreters, tmp_path):
    path = [pretend(tmp_path / "versions", "numpy", "1.2.3")]
    with running(interpreters, tmp_path, path=path) as cluster, said() as found, hybrid(cluster):
        assert Parallel()(delayed(square)(i, tmp_path) for i in range(4)) == [0, 1, 4, 9]
        cluster.add_worker()
        cluster.ready()
        assert Parallel()(delayed(square)(i, tmp_path) for i in range(4)) == [0, 1, 4, 9]
    (sentence,) = found
    assert re.search(r"numpy 1\.2\.3 on 2 of 2 workers \(.*\) and 2\.[\d.]+ here; install the same", sentence)
    assert ". " not in sentence


def test_a_differing_version_of_a_worker_that_joins_is_said_too(interpreters, tmp_path):
    path = [pretend(tmp_path / "versions", "numpy", "1.2.3")]
    with running(interpreters, tmp_path, n_workers=0, path=path) as cluster, said() as found, hybrid(cluster):
        cluster.add_worker()
        assert Parallel()(delayed(square)(i, tmp_path) for i in range(4)) == [0, 1, 4, 9]
        assert Parallel()(delayed(square)(i, tmp_path) for i in range(4)) == [0, 1, 4, 9]
    (sentence,) = found
    assert "numpy 1.2.3 on 1 of 1 workers" in sentence


def test_workers_without_joblib_are_an_error_before_work_starts(interpreters, tmp_path):
    with (
        running(interpreters, tmp_path, hidden=(*OURS_AND_SKLEARN, "joblib")) as cluster,
        hybrid(cluster),
        pytest.raises(MissingDependencyError, match=r"joblib on 2 of 2 workers \(.*\); install joblib=="),
    ):
        Parallel()(delayed(square)(i, tmp_path) for i in range(4))
    assert noted(tmp_path) == []
