"""Calls in tasks on a Dask cluster: they use what is left of it, and never wait for each other for ever."""

import functools
import gc
import threading

import numpy as np
import psutil
import pytest
from calls_in_tasks import (
    Caller,
    call_of_own_task,
    crowd,
    fail_inside,
    has_slot_after_a_call_that_failed,
    held_inside,
    hold_or_fail,
    meeting,
    meeting_at,
    own_pids,
    pids_in_tasks,
    streamed,
    tree,
)
from clusters import Step, eventually, kill, started, striking, tasks_known_to, wait_until
from joblib import Parallel, delayed, parallel_backend
from sklearn.model_selection import GridSearchCV, cross_validate

import joblib_backends  # noqa: F401  registers the backend

distributed = pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

#: Every test here takes seconds.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def client(nursery, tmp_path_factory):
    """Return a client of four workers of one thread."""
    from clusters import Cluster

    cluster = Cluster(nursery, tmp_path_factory.mktemp("four"), 4)
    try:
        cluster.ready()
        with distributed.Client(cluster.address, set_as_default=False) as client:
            yield client
    finally:
        cluster.close()


@pytest.fixture
def hybrid(client):
    """Have calls use all of the four workers."""
    with parallel_backend("hybrid", client=client, n_jobs=-1, fallback=False) as backend:
        yield backend
    assert_idle(client)


def assert_idle(client):
    """Check that nothing of the calls is left on a cluster, and that its workers run what they get."""
    gc.collect()
    assert eventually(lambda: not client.run_on_scheduler(tasks_known_to))
    n_workers = len(client.nthreads())
    assert client.gather(client.map(abs, range(-3 * n_workers, 0), pure=False)) == list(range(3 * n_workers, 0, -1))


# ---- what calls may use


@pytest.mark.usefixtures("hybrid")
def test_a_call_in_the_only_task_uses_the_whole_cluster(tmp_path):
    [pids] = Parallel()([delayed(meeting)("task", 4, 4, str(tmp_path))])
    assert len(set(pids)) == 4


@pytest.mark.usefixtures("hybrid")
def test_calls_in_two_tasks_use_half_of_the_cluster_each(tmp_path):
    parts = Parallel()(delayed(meeting)(k, 2, 4, str(tmp_path)) for k in range(2))
    assert len({pid for part in parts for pid in part}) == 4


@pytest.mark.usefixtures("hybrid")
def test_calls_in_calls_use_the_whole_cluster_at_every_depth(tmp_path):
    [pids] = Parallel()([delayed(meeting_at)(2, "task", 4, str(tmp_path))])
    assert len(set(pids)) == 4


@pytest.mark.usefixtures("hybrid")
@pytest.mark.parametrize(("n_jobs", "most"), [(2, 2), (-1, 4), (20, 4)])
def test_no_more_run_at_once_than_were_asked_for_nor_than_there_is_room(tmp_path, n_jobs, most):
    [together] = Parallel()([delayed(crowd)(30, str(tmp_path), n_jobs)])
    assert 1 < together <= most


@pytest.mark.usefixtures("hybrid")
def test_calls_of_several_tasks_never_run_more_than_there_are_slots(tmp_path):
    assert max(Parallel()(delayed(crowd)(20, str(tmp_path), -1) for _ in range(3))) <= 4


@pytest.mark.usefixtures("hybrid")
def test_calls_in_as_many_tasks_as_slots_stay_in_their_workers():
    for pid, pids in Parallel(batch_size=1)(delayed(own_pids)(4) for _ in range(8)):
        assert pids == {pid}


def test_calls_in_tasks_that_take_resources_stay_in_their_workers(make_cluster):
    cluster = make_cluster(2, resources="GPU=1")
    with parallel_backend("hybrid", scheduler=cluster.address, resources={"GPU": 1}, n_jobs=-1, fallback=False):
        [(pid, pids)] = Parallel()([delayed(own_pids)(4)])
    assert pids == {pid}


def test_threads_of_this_process_as_workers(tmp_path):
    with (
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tcp"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        parallel_backend("hybrid", client=client, n_jobs=-1, fallback=False),
    ):
        [pids] = Parallel()([delayed(meeting)("task", 3, 3, str(tmp_path))])
        assert len(pids) == 3
        assert_idle(client)
        # A client that is the default would be found by calls which have nothing to do with this.
        with pytest.raises(ValueError, match="No client"):
            distributed.default_client()


# ---- no call waits for ever


@pytest.mark.usefixtures("hybrid")
def test_calls_with_more_tasks_than_slots_at_every_depth_end():
    assert Parallel(batch_size=1)(delayed(tree)(2, 5) for _ in range(2)) == [25, 25]


def test_calls_in_tasks_of_the_users_own_end_even_if_those_have_all_slots(make_cluster, tmp_path):
    cluster = make_cluster(2)
    with distributed.Client(cluster.address, set_as_default=False) as client:
        own = [client.submit(call_of_own_task, 5, str(tmp_path), pure=False) for _ in range(2)]
        assert client.gather(own) == [list(range(5))] * 2


def test_calls_in_actors(make_cluster):
    cluster = make_cluster(2)
    with distributed.Client(cluster.address, set_as_default=False) as client, client.as_current():
        actor = client.submit(Caller, actor=True).result()
        assert actor.call(cluster.address).result() == list(range(5))


@pytest.mark.usefixtures("hybrid")
@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_generators_in_tasks(return_as):
    for results in Parallel()(delayed(streamed)(12, return_as) for _ in range(2)):
        assert sorted(results) == list(range(12))


# ---- what goes wrong


@pytest.mark.usefixtures("hybrid")
def test_an_error_in_a_call_is_that_of_its_task(tmp_path):
    with pytest.raises(LookupError, match="task 1"):
        Parallel()([delayed(fail_inside)(str(tmp_path))])


@pytest.mark.usefixtures("hybrid")
def test_a_task_whose_call_has_failed_has_its_slot_again_after_the_next(tmp_path):
    assert Parallel()([delayed(has_slot_after_a_call_that_failed)(str(tmp_path))]) == [[False, True]]


def test_what_a_cancelled_task_has_sent_is_cancelled(client, tmp_path):
    with (
        parallel_backend("hybrid", client=client, n_jobs=-1, fallback=False),
        pytest.raises(LookupError, match="the other task"),
    ):
        Parallel(batch_size=1)(delayed(hold_or_fail)(k, 40, str(tmp_path)) for k in range(2))
    # What runs is let run to its end; nothing else of the call is left.
    wait_until(lambda: len(client.run_on_scheduler(tasks_known_to)) == 0)
    (tmp_path / "go").touch()
    assert_idle(client)
    assert len(started(tmp_path)) < 10


@pytest.mark.parametrize("whose", ["outer", "inner"])
def test_a_worker_that_dies_while_a_task_waits_changes_no_result(make_cluster, tmp_path, whose):
    cluster = make_cluster(3)
    pids = functools.partial(pids_in_tasks, tmp_path)

    def strike():
        outer = pids("outer")
        victims = outer if whose == "outer" else pids("inner") - outer
        kill(psutil.Process(min(victims)))
        (tmp_path / "go").touch()

    with (
        parallel_backend("hybrid", scheduler=cluster.address, n_jobs=-1, fallback=False),
        striking(lambda: len(pids("inner")) == 3, strike),
    ):
        assert Parallel()([delayed(held_inside)(6, str(tmp_path))]) == [list(range(6))]


# ---- scikit-learn


@pytest.mark.usefixtures("hybrid")
def test_a_search_in_a_cross_validation_scores_as_with_one_job():
    rng = np.random.default_rng(0)
    X, y = rng.random((60, 3)), np.arange(60) % 2  # noqa: N806

    def scores(n_jobs, inner):
        search = GridSearchCV(Step(), {"c": [0, 1, 2, 3]}, cv=3, n_jobs=inner)
        return cross_validate(search, X, y, cv=2, n_jobs=n_jobs, return_estimator=True)

    with parallel_backend("threading"):
        expected = scores(1, 1)
    found = scores(-1, -1)
    assert found["test_score"].tolist() == expected["test_score"].tolist()
    for one, other in zip(found["estimator"], expected["estimator"], strict=True):
        assert one.best_params_ == other.best_params_
        assert one.cv_results_["mean_test_score"].tolist() == other.cv_results_["mean_test_score"].tolist()


def test_no_thread_of_a_connection_outlives_the_cluster():
    gc.collect()
    assert eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("joblib_backends-dask")])
