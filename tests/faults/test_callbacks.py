"""scikit-learn's callbacks, told by Dask workers of this host and of another: what they say is what one job says.

A worker of another host has folders of its own in the place of ``/dev/shm`` and of the one where the listeners' sockets
are.
"""

import contextlib
import multiprocessing.util
import re
from pathlib import Path

import numpy as np
import pytest
from clusters import Cluster, Nursery, started, striking
from joblib import Parallel, delayed, parallel_backend
from sklearn.exceptions import FitFailedWarning
from sklearn.model_selection import GridSearchCV, ShuffleSplit, cross_validate

import joblib_backends.data.pickler
from joblib_backends import last_report

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
callback = pytest.importorskip("sklearn.callback", reason="scikit-learn has callbacks from version 1.9")

from sklearn.callback import _transport  # noqa: E402
from watched import Iterating, Minutes, Several, fit_inside, handle_of, say, with_its_handle  # noqa: E402

pytestmark = pytest.mark.timeout(180)

RNG = np.random.default_rng(0)
X = RNG.random((60, 3))
Y = np.arange(60) % 2

#: Two candidates and two folds: more fits than workers.
GRID = {"c": [0, 1]}


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    """Return a cluster on this host and one on another, of two workers each."""
    with contextlib.ExitStack() as stack:
        nursery = Nursery()
        stack.callback(nursery.close)

        def make(**options):
            cluster = Cluster(nursery, tmp_path_factory.mktemp("cluster"), 2, **options)
            stack.callback(cluster.close)
            return cluster.ready()

        yield {"near": make(), "far": make(private_shm=True, hidden=[multiprocessing.util.get_temp_dir()])}


@pytest.fixture(params=["near", "far"])
def cluster(clusters, request):
    return clusters[request.param]


@pytest.fixture
def far(clusters):
    return clusters["far"]


@contextlib.contextmanager
def on(cluster, **options):
    options = {"n_jobs": 2, "scheduler": cluster.address, "fallback": False, **options}
    with parallel_backend("hybrid", **options) as backend:
        yield backend
        assert last_report().tier == "dask"


def search(model, watcher=None, grid=GRID, cv=2, **options):
    """Return a fitted search, with a callback of its own."""
    found = GridSearchCV(model, grid, cv=cv, refit=False, **options)
    if watcher is not None:
        found.set_callbacks(watcher)
    return found.fit(X, Y)


def scores_of(monitor):
    """Return what a monitor has logged: where, and the score."""
    logs = monitor.get_logs(select="all")
    return sorted((row["task_id_path"], row["estimator_name"], row["accuracy"]) for log in logs for row in log.data)


def on_both(cluster, run, **options):
    """Return what ``run()`` gives with one job, and on a cluster."""
    with parallel_backend("sequential"):
        alone = run()
    with on(cluster, **options):
        return alone, run()


def test_far_workers_have_neither_the_socket_nor_its_key(clusters):
    minutes = Minutes()
    handles = {}
    for where in ("near", "far"):
        with on(clusters[where]):
            handles[where] = Parallel()(delayed(handle_of)(minutes) for _ in range(4))
    assert set(handles["near"]) == {tuple(minutes._listener_handle)}
    assert set(handles["far"]) == {(minutes._listener_handle.address, b"")}


def test_a_callback_that_comes_back_from_far_is_heard_here(clusters):
    minutes = Minutes()
    with on(clusters["far"]):
        back = Parallel()(delayed(with_its_handle)(minutes) for _ in range(4))
    assert {tuple(handle) for handle in back} == {tuple(minutes._listener_handle)}


def test_a_search_logs_the_scores_that_one_job_logs(cluster):
    def run():
        monitor = callback.ScoringMonitor(scoring="accuracy")
        search(Iterating().set_callbacks(monitor))
        return scores_of(monitor)

    alone, here = on_both(cluster, run)
    assert len(alone) == 2 * 2 * 5
    assert here == alone


def test_a_cross_validation_logs_the_scores_that_one_job_logs(cluster):
    def run():
        monitor = callback.ScoringMonitor(scoring="accuracy")
        cross_validate(Iterating().set_callbacks(monitor), X, Y, cv=3)
        return scores_of(monitor)

    alone, here = on_both(cluster, run)
    assert len(alone) == 3 * 5
    assert here == alone


def test_progress_bars_end_as_with_one_job(cluster, capsys, monkeypatch):
    pytest.importorskip("rich", reason="scikit-learn's ProgressBar needs rich")
    monkeypatch.setenv("COLUMNS", "200")

    def run():
        search(Several(Iterating()), callback.ProgressBar(max_propagation_depth=None), {"estimator__c": [0, 1]})
        # Bars stand in the order in which tasks began, and end with their time.
        return sorted(re.findall(r"^ *(.*?) ━.* (\d+)%", capsys.readouterr().out, flags=re.MULTILINE))

    alone, here = on_both(cluster, run)
    assert len(alone) > 8
    assert {percent for _, percent in alone} == {"100"}
    assert here == alone


INNER = {
    "threads": ("hybrid", {"tier": "threads"}),
    "processes": ("hybrid", {"tier": "processes"}),
}


@pytest.mark.parametrize("inner", INNER)
def test_inner_calls_are_heard_between_the_begin_and_the_end_of_what_made_them(cluster, inner):
    def run():
        watchers = [Minutes() for _ in range(4)]
        models = [Several(Iterating(), backend=INNER[inner]).set_callbacks(minutes) for minutes in watchers]
        for inner_pids, pid in Parallel()(delayed(fit_inside)(model, X, Y) for model in models):
            assert (pid in inner_pids) == (inner == "threads")
        return [minutes.lines for minutes in watchers]

    alone, here = on_both(cluster, run)
    assert [sorted(lines) for lines in here] == [sorted(lines) for lines in alone]
    for lines in here:
        position = {(what, path): i for i, (what, path, _) in enumerate(lines)}
        for what, path in position:
            if len(path) > 1:
                assert position["begin", path[:-1]] < position[what, path] < position["end", path[:-1]]


def test_a_fit_that_fails_has_said_what_it_says_alone(cluster):
    def run():
        monitor = callback.ScoringMonitor(scoring="accuracy")
        with pytest.warns(FitFailedWarning, match="2 fits failed"):
            search(Iterating(fails=1).set_callbacks(monitor), error_score=-1.0)
        return scores_of(monitor)

    alone, here = on_both(cluster, run)
    assert len(alone) == 2 * 5 + 2
    assert here == alone


def test_messages_come_while_the_task_runs(far, tmp_path):
    minutes = Minutes()
    with on(far), striking(lambda: len(minutes.lines) >= 2, (tmp_path / "go").touch):
        # Each fit waits for the file that is made when the first messages were heard.
        Parallel(batch_size=1)(
            delayed(Iterating(stays=0, folder=str(tmp_path)).set_callbacks(minutes).fit)(X, Y) for _ in range(2)
        )


def test_nothing_is_heard_of_a_call_that_has_ended(far, tmp_path):
    minutes = Minutes()
    model = Iterating(fails=1, stays=0, folder=str(tmp_path))
    one_fold = ShuffleSplit(1, random_state=0)
    with on(far), far.client() as inspector:
        with pytest.raises(ValueError, match="a fit with c=1 fails"):
            search(model, minutes, cv=one_fold, error_score="raise")
        assert started(tmp_path) == ["c=0"]
        heard = list(minutes.lines)
        (tmp_path / "go").touch()
        # A worker has one thread: what runs there next comes after what the call has left.
        for worker in inspector.scheduler_info(n_workers=-1)["workers"]:
            inspector.submit(abs, -1, workers=[worker], pure=False).result()
        assert Parallel()(delayed(abs)(-i) for i in range(8)) == list(range(8))
        assert minutes.lines == heard
        search(Iterating(), minutes)
        assert len(minutes.lines) > len(heard), "the next call is heard"


def test_many_messages_of_several_senders_come_all_and_in_order(far):
    listeners = [Minutes() for _ in range(4)]
    with on(far):
        Parallel(batch_size=1)(delayed(say)(minutes, 3_000, 1_000) for minutes in listeners)
        for minutes in listeners:
            assert [i for i, _ in minutes.lines] == list(range(3_000))


def test_a_scheduler_keeps_events_of_bounded_size(far):
    minutes = Minutes()
    with on(far):
        Parallel(batch_size=1)(delayed(say)(minutes, 20_000) for _ in range(2))
        with far.client() as inspector:
            events = inspector.run_on_scheduler(kept_events)
    assert len(minutes.lines) == 40_000
    assert events
    assert max(events) <= 1_000


def kept_events(dask_scheduler):
    """Return how many events a scheduler has of each topic of ours; runs there."""
    topics = dask_scheduler.get_events()
    return [len(events) for name, events in topics.items() if name.startswith("joblib_backends-callbacks")]


def test_a_transport_of_another_shape_is_left_alone(far, monkeypatch):
    monkeypatch.delitem(joblib_backends.data.pickler._reducers, _transport.ListenerHandle, raising=False)
    monkeypatch.delattr(_transport, "_worker_connections")
    monitor = callback.ScoringMonitor(scoring="accuracy")
    with on(far):
        found = search(Iterating().set_callbacks(monitor))
    assert not np.isnan(found.cv_results_["mean_test_score"]).any()
    with pytest.raises(ValueError, match="No logs to retrieve"):
        monitor.get_logs()


def test_keys_are_gone_with_their_listeners(far):
    def keys():
        return set(map(str, Path(multiprocessing.util.get_temp_dir()).glob("*.key")))

    first, second = Minutes(), Minutes()
    with on(far):
        Parallel()(delayed(handle_of)(first) for _ in range(2))
        assert first._listener_handle.address + ".key" in keys()
        _transport.close_listener(first._listener_handle)
        Parallel()(delayed(handle_of)(second) for _ in range(2))
    assert first._listener_handle.address + ".key" not in keys()
    assert second._listener_handle.address + ".key" in keys()
