"""Faults of a Dask cluster whose scheduler and workers are real processes: nothing but time is lost.

Every blow falls when files of the tasks say that it is time. Tests that draw moments always draw the same ones.
"""

import contextlib
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import psutil
import pytest
from clusters import (
    HERE,
    LONG,
    ROOT,
    Cluster,
    Step,
    endless_at,
    endless_before,
    eventually,
    free_port,
    hold,
    is_alive,
    kill,
    moments,
    poison,
    square,
    squares,
    started,
    striking,
    tasks_known_to,
    total,
    wait_until,
)
from crashing import CRASHES, delayed_at, takes
from hosts import Hosts, HostsUnavailableError
from joblib import Parallel, delayed, parallel_backend
from sklearn.model_selection import GridSearchCV

from joblib_backends import last_report
from joblib_backends.config import Config
from joblib_backends.errors import (
    ClusterLostError,
    ClusterUnavailableError,
    RecoveryWarning,
    TaskTimeoutError,
    WorkerLostError,
)

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

#: Every test here takes seconds.
pytestmark = pytest.mark.timeout(180)

KINDS = ["list", "generator", "unordered", "nested", "search"]
RETURN_AS = {"list": "list", "generator": "generator", "unordered": "generator_unordered"}

#: Tasks of a call, and candidates of a search of three folds: enough to be struck in their midst.
N_TASKS = 60
CANDIDATES = list(range(20))

#: Seconds within which what is called prompt must happen; mostly it takes a tenth of that, on a busy machine more.
PROMPT = 45.0

#: What the warning and the error say when the connection is gone.
WITHOUT_CLUSTER = "The call goes on with 2 jobs on this machine, without its Dask cluster"
CUT_OFF = "Batches could not be sent to .*, or fetched from it"

RNG = np.random.default_rng(0)
X = RNG.random((60, 3))
Y = np.arange(60) % 2


@pytest.fixture(scope="module")
def nanny_cluster(nursery, tmp_path_factory):
    """Return a cluster of two workers with nannies, which start a worker anew."""
    cluster = Cluster(nursery, tmp_path_factory.mktemp("nannies"), 2, nanny=True)
    try:
        yield cluster.ready()
    finally:
        cluster.close()


@pytest.fixture(autouse=True)
def _no_thread_of_a_connection_is_left():
    """No sender or collector outlives the ``with`` block of its call."""
    before = dask_threads()
    yield
    assert eventually(lambda: dask_threads() <= before), dask_threads() - before


def dask_threads():
    # A thread that was on its way out may have closed a cycle that holds a connection.
    gc.collect()
    return {thread for thread in threading.enumerate() if thread.name.startswith("joblib_backends-dask")}


@contextlib.contextmanager
def recoveries():
    """Return a list that has the texts of the RecoveryWarnings of the block at its end."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(warning.message) for warning in caught if issubclass(warning.category, RecoveryWarning)]


@contextlib.contextmanager
def hybrid(cluster, **options):
    """Return the backend for two jobs on a cluster without which it waits for two seconds."""
    options = {"n_jobs": 2, "wait_for_workers": 2.0, "scheduler": cluster.address, **options}
    with parallel_backend("hybrid", **options) as backend:
        yield backend


def results_of(kind, folder=None):
    """Return what a call of a kind gives, whose tasks leave files in the folder; without one, what is right."""
    if folder is None:
        return scores(Step(), n_jobs=1) if kind == "search" else [i * i for i in range(N_TASKS)]
    if kind == "search":
        return scores(Step(folder=str(folder)))
    if kind == "nested":
        parts = Parallel(batch_size=1)(delayed(squares)(range(i, i + 4), str(folder)) for i in range(0, N_TASKS, 4))
        return list(itertools.chain.from_iterable(parts))
    call = Parallel(return_as=RETURN_AS[kind], batch_size=1)
    results = list(call(delayed(square)(i, str(folder)) for i in range(N_TASKS)))
    return sorted(results) if kind == "unordered" else results


def scores(step, n_jobs=None, candidates=CANDIDATES, **options):
    search = GridSearchCV(step, {"c": candidates}, cv=3, n_jobs=n_jobs, refit=False, **options).fit(X, Y)
    return [search.cv_results_[f"split{fold}_test_score"].tolist() for fold in range(3)]


def has_started(folder, n):
    return lambda: len(started(folder)) >= n


def go(folder):
    (folder / "go").touch()


# ---- workers


@pytest.mark.parametrize("kind", KINDS)
def test_workers_killed_at_random_moments_change_no_result(make_cluster, tmp_path, kind):
    cluster = make_cluster(4)
    with hybrid(cluster, n_jobs=4, fallback=False), contextlib.ExitStack() as blows:
        for victim, (n, delay_s) in zip(
            cluster.workers, moments(2, N_TASKS - 15, seed=KINDS.index(kind)), strict=False
        ):
            blows.enter_context(striking(has_started(tmp_path, n), lambda victim=victim: kill(victim), delay_s))
        assert results_of(kind, tmp_path) == results_of(kind)
        assert last_report().tier == "dask"
    # The tasks that ran there, and those whose results had not been fetched yet.
    assert len(started(tmp_path)) <= N_TASKS + 2 * 30


class Killer(threading.Thread):
    """Kills random workers of a cluster that always has some, each time another one comes in its place; seeded."""

    def __init__(self, cluster, n_kills, seed):
        super().__init__(name="killer")
        self._cluster, self._n_kills, self._random = cluster, n_kills, random.Random(seed)
        self._over = threading.Event()
        self.n_killed = 0
        self.problem = None

    def run(self):
        alive = list(self._cluster.workers)
        try:
            while self.n_killed < self._n_kills and not self._over.wait(self._random.uniform(0.0, 0.1)):
                kill(alive.pop(self._random.randrange(len(alive))))
                self.n_killed += 1
                alive.append(self._cluster.add_worker())
        except BaseException as problem:
            self.problem = problem

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join(LONG)
        if self.problem is not None:
            raise self.problem


def test_two_hundred_kills_change_nothing_but_the_time(make_cluster, tmp_path):
    cluster, n_searches = make_cluster(6), 0
    expected = scores(Step(), n_jobs=1, candidates=list(range(100)))
    with hybrid(cluster, n_jobs=4, fallback=False, wait_for_workers=LONG), Killer(cluster, 200, seed=0) as killer:
        while killer.is_alive():
            step = Step(folder=str(tmp_path), seconds=0.05)
            assert scores(step, candidates=list(range(100)), error_score="raise") == expected
            n_searches += 1
            assert last_report().tier == "dask"
    assert killer.n_killed == 200
    # What ran on a worker is lost with it, and what had ended there and was not fetched yet (6 of 206 here).
    assert n_searches * 300 + 20 < len(started(tmp_path)) <= n_searches * 300 + 2 * killer.n_killed


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_worker_with_a_nanny_changes_no_result(nanny_cluster, tmp_path, kind):
    wait_until(lambda: len(nanny_cluster.worker_pids()) == 2)
    victim = psutil.Process(random.Random(kind).choice(nanny_cluster.worker_pids()))
    [(n, delay_s)] = moments(1, N_TASKS - 15, seed=KINDS.index(kind))
    with hybrid(nanny_cluster, fallback=False), striking(has_started(tmp_path, n), lambda: kill(victim), delay_s):
        assert results_of(kind, tmp_path) == results_of(kind)
    assert len(started(tmp_path)) <= N_TASKS + 20


@pytest.mark.parametrize("return_as", RETURN_AS.values())
def test_a_task_that_kills_its_workers_is_named_when_all_others_are_done(make_cluster, tmp_path, return_as):
    cluster = make_cluster(10)  # Dask itself lets four die over it, twice
    tasks = [delayed(poison)(i, 7, str(tmp_path), os.getpid()) for i in range(20)]
    begun = time.monotonic()
    with (
        hybrid(cluster, n_jobs=10, fallback=False),
        pytest.raises(
            WorkerLostError, match=r"poison, task 7 \(7, 7, .*Dask lost 4 workers over it.*tried \d times \(retries=2\)"
        ) as caught,
    ):
        list(Parallel(return_as=return_as, batch_size=1)(tasks))
    assert set(started(tmp_path)) == {str(i) for i in range(20)}
    assert time.monotonic() - begun < PROMPT, "no result of a dead worker holds up the others"
    assert caught.value.n_deaths >= 2
    assert len(cluster.worker_pids()) == 2, "it took eight workers with it, and no more"


def test_a_search_scores_the_candidate_that_kills_its_workers(make_cluster, tmp_path):
    environment = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    cluster = make_cluster(12, environment=environment)
    step = Step(folder=str(tmp_path), kills=3, driver=os.getpid())
    with hybrid(cluster, n_jobs=12, fallback=False), recoveries() as found:
        got = scores(step, candidates=[0, 1, 2, 3, 4, 5], error_score=np.nan)
    expected = scores(Step(), candidates=[0, 1, 2, 3, 4, 5], n_jobs=1)
    for fold in range(3):
        assert np.isnan(got[fold][3])
        assert got[fold][:3] + got[fold][4:] == expected[fold][:3] + expected[fold][4:]
    assert len(found) == 3
    assert all("gets its error_score" in text and "(candidate c=3, fold" in text for text in found), found


@pytest.fixture(scope="module")
def fragile_cluster(nursery, tmp_path_factory):
    """Return a cluster that lets one worker die over a task, not four; of two workers with nannies."""
    environment = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    cluster = Cluster(nursery, tmp_path_factory.mktemp("fragile"), 2, nanny=True, environment=environment)
    try:
        yield cluster.ready()
    finally:
        cluster.close()


@pytest.mark.parametrize("return_as", RETURN_AS.values())
@pytest.mark.parametrize(("where", "how", "error"), CRASHES)
def test_a_crash_anywhere_is_the_error_of_its_place(fragile_cluster, where, how, error, return_as):
    tasks = [delayed(takes)(i) for i in range(3)] + [delayed_at(where, how)]
    with hybrid(fragile_cluster, fallback=False, retries=1, wait_for_workers=LONG):
        with pytest.raises(error) as caught:
            list(Parallel(return_as=return_as, batch_size=1)(tasks))
        assert caught.type is error
        assert Parallel()(delayed(takes)(i) for i in range(4)) == [1] * 4


def test_all_workers_killed_the_call_goes_on_here_after_the_wait(make_cluster, tmp_path):
    cluster = make_cluster(2)
    with hybrid(cluster), recoveries() as found, striking(has_started(tmp_path, 20), cluster.kill_workers):
        begun = time.monotonic()
        assert results_of("list", tmp_path) == results_of("list")
        assert time.monotonic() - begun < 2.0 + PROMPT
    assert len(found) == 1
    assert "has had no worker for wait_for_workers=2 seconds" in found[0]


@pytest.mark.parametrize("return_as", RETURN_AS.values())
def test_all_workers_killed_is_an_error_without_fallback(make_cluster, tmp_path, return_as):
    cluster = make_cluster(2)
    begun = time.monotonic()
    with (
        hybrid(cluster, fallback=False, wait_for_workers=1.0),
        striking(has_started(tmp_path, 2), cluster.kill_workers),
        pytest.raises(ClusterLostError, match="has had no worker for wait_for_workers=1 seconds"),
    ):
        list(Parallel(return_as=return_as)(delayed(hold)(i, str(tmp_path)) for i in range(4)))
    assert time.monotonic() - begun < 1.0 + PROMPT


def test_a_cluster_that_never_gets_a_worker_is_left_after_the_wait(make_cluster, tmp_path):
    cluster = make_cluster(0)
    begun = time.monotonic()
    with hybrid(cluster), pytest.warns(RecoveryWarning, match="on this machine .* no worker for 2 seconds"):
        assert results_of("list", tmp_path) == results_of("list")
    with (
        hybrid(cluster, fallback=False, wait_for_workers=0.5),
        pytest.raises(ClusterUnavailableError, match=r"no worker for 0.5 seconds"),
    ):
        results_of("list", tmp_path)
    assert time.monotonic() - begun < 2.5 + PROMPT


def test_a_worker_that_joins_within_the_wait_is_used(make_cluster, tmp_path):
    cluster = make_cluster(0)
    with cluster.client(n_workers=0) as inspector:

        def is_waited_for():
            return bool(inspector.run_on_scheduler(tasks_known_to))

        with hybrid(cluster, wait_for_workers=LONG), striking(is_waited_for, cluster.add_worker):
            assert results_of("list", tmp_path) == results_of("list")
            assert last_report().tier == "dask"


def test_workers_that_replace_all_that_died_are_used_within_the_wait(make_cluster, tmp_path):
    cluster = make_cluster(2)

    def replace():
        cluster.kill_workers()
        cluster.add_worker()

    with hybrid(cluster, wait_for_workers=LONG), striking(has_started(tmp_path, 20), replace):
        assert results_of("list", tmp_path) == results_of("list")
        assert last_report().tier == "dask"


# ---- the scheduler


@pytest.mark.parametrize(("turn", "moment"), list(enumerate(moments(10, N_TASKS - 15, seed=5))))
def test_a_scheduler_killed_at_a_random_moment_the_call_and_the_next_go_on_here(make_cluster, tmp_path, turn, moment):
    cluster, kind = make_cluster(2), KINDS[turn % len(KINDS)]
    n, delay_s = moment
    with hybrid(cluster, wait_for_workers=1.0):
        with recoveries() as found, striking(has_started(tmp_path, n), cluster.kill_scheduler, delay_s):
            begun = time.monotonic()
            assert results_of(kind, tmp_path) == results_of(kind)
            assert time.monotonic() - begun < PROMPT
        assert len(found) == 1, found
        assert WITHOUT_CLUSTER in found[0]
        with recoveries() as found:
            begun = time.monotonic()
            assert results_of(kind, tmp_path) == results_of(kind)
            assert time.monotonic() - begun < PROMPT
        assert len(found) == 1, found
        assert "The call runs on this machine" in found[0]
        assert "dask" not in last_report().tier


@pytest.mark.parametrize("return_as", RETURN_AS.values())
def test_a_killed_scheduler_is_an_error_at_once_without_fallback(make_cluster, tmp_path, return_as):
    cluster = make_cluster(2)
    struck = []

    def blow():
        cluster.kill_scheduler()
        struck.append(time.monotonic())

    with (
        hybrid(cluster, fallback=False, wait_for_workers=LONG),
        striking(has_started(tmp_path, 2), blow),
        pytest.raises(ClusterLostError, match=CUT_OFF),
    ):
        list(Parallel(return_as=return_as)(delayed(hold)(i, str(tmp_path)) for i in range(4)))
    assert time.monotonic() - struck[0] < PROMPT


@pytest.mark.parametrize("block", ["same block", "next block"])
def test_a_cluster_that_comes_back_is_used_by_the_next_call(make_cluster, tmp_path, block):
    first = make_cluster(2, port=free_port())
    with contextlib.ExitStack() as blocks:
        blocks.enter_context(hybrid(first, wait_for_workers=5.0))
        with recoveries() as found, striking(has_started(tmp_path, 20), first.kill_scheduler):
            assert results_of("list", tmp_path) == results_of("list")
        assert len(found) == 1
        first.close()
        second = make_cluster(2, port=int(first.address.rpartition(":")[2]))
        assert second.address == first.address
        if block == "next block":
            blocks.close()
            blocks.enter_context(hybrid(second, wait_for_workers=5.0))
        assert results_of("list", tmp_path) == results_of("list")
        assert last_report().tier == "dask"


def lose_one(make_cluster, folder):
    """Lose a cluster in the midst of a call."""
    cluster = make_cluster(1)
    folder.mkdir()
    tasks = [delayed(square)(i, str(folder)) for i in range(8)]
    with hybrid(cluster), recoveries() as found, striking(has_started(folder, 2), cluster.kill_scheduler):
        assert Parallel(batch_size=1)(tasks) == [i * i for i in range(8)]
    assert len(found) <= 1
    cluster.close()


def test_a_lost_cluster_is_let_go_of_without_the_garbage_collector(make_cluster, tmp_path):
    def threads():
        return {
            thread for thread in threading.enumerate() if thread.name.startswith(("joblib_backends-dask", "IO loop"))
        }

    before = threads()
    gc.collect()
    gc.disable()
    try:
        lose_one(make_cluster, tmp_path / "lost")
        assert eventually(lambda: threads() <= before, PROMPT), threads() - before
    finally:
        gc.enable()


def test_the_end_of_a_client_that_has_closed_itself_ends_its_thread(make_cluster):
    """As one does whose scheduler does not come back."""
    from joblib_backends.cluster.client import close, connect

    client = connect(Config(), make_cluster(0).address, 10.0)
    [thread] = [one for one in threading.enumerate() if one.ident == client.sync(ident_of_this_thread)]
    client.sync(client._close)
    assert client.status == "closed"
    assert thread.is_alive()
    close(client)
    thread.join(PROMPT)
    assert not thread.is_alive()


async def ident_of_this_thread():
    return threading.get_ident()


def test_twenty_lost_clusters_leave_no_descriptor(make_cluster, tmp_path):
    def descriptors():
        return psutil.Process().num_fds()

    for turn in range(3):  # what is opened once for the process
        lose_one(make_cluster, tmp_path / str(turn))
    before = descriptors()
    for turn in range(3, 23):
        lose_one(make_cluster, tmp_path / str(turn))
    # Sockets of Dask's that are on their way out, and never one for each cluster.
    assert eventually(lambda: descriptors() <= before + 8, PROMPT), (before, descriptors())


# ---- data


def test_a_worker_dies_that_keeps_a_copy_of_the_data_on_its_host(make_cluster, tmp_path):
    cluster = make_cluster(3, private_shm=True)
    data = np.arange(400_000, dtype=float)

    def blow():
        kill(cluster.workers[0])
        cluster.add_worker(private_shm=True)
        go(tmp_path)

    tasks = [delayed(total)(data, i, str(tmp_path)) for i in range(12)]
    # Nobody ends before the blow: all three have the data then, and what comes in the place of one has it not.
    with hybrid(cluster, n_jobs=3, fallback=False), striking(has_started(tmp_path, 3), blow):
        assert Parallel(batch_size=1)(tasks) == [data.sum() + i for i in range(12)]
        assert last_report().tier == "dask"


def test_workers_that_cannot_map_the_files_get_the_data(make_cluster, tmp_path):
    cluster = make_cluster(2, private_shm=True)
    data = np.arange(400_000, dtype=float)
    go(tmp_path)
    with hybrid(cluster, fallback=False):
        assert Parallel()(delayed(total)(data, i, str(tmp_path)) for i in range(8)) == [
            data.sum() + i for i in range(8)
        ]


@pytest.mark.parametrize("private_shm", [False, True], ids=["mapped", "scattered"])
def test_residents_deleted_on_the_client_under_way_are_placed_again(make_cluster, tmp_path, private_shm):
    from joblib_backends.data.store import default_store

    cluster = make_cluster(2, private_shm=private_shm)
    data = np.arange(400_000, dtype=float)

    def blow():
        placed = [resident.path for resident in default_store().residents]
        assert placed
        for path in placed:
            os.unlink(path)
        go(tmp_path)

    tasks = [delayed(total)(data, i, str(tmp_path)) for i in range(40)]
    with hybrid(cluster, fallback=False), striking(has_started(tmp_path, 2), blow):
        assert Parallel(batch_size=1)(tasks) == [data.sum() + i for i in range(40)]
        assert last_report().tier == "dask"


@pytest.mark.parametrize("what", ["future", "collection"])
def test_data_that_only_the_cluster_had_is_a_clear_error_when_it_is_lost(make_cluster, tmp_path, what):
    cluster = make_cluster(2)
    with cluster.client() as client:
        if what == "future":
            data = client.scatter(np.arange(10.0))
        else:
            data = pytest.importorskip("dask.bag", reason="no dask.bag").from_sequence(range(10))
        with (
            hybrid(cluster, scheduler=None, client=client, scatter=[data]),
            striking(has_started(tmp_path, 2), cluster.kill_scheduler),
            pytest.raises(ClusterLostError, match=CUT_OFF),
        ):
            Parallel()(delayed(hold_with)(data, i, str(tmp_path)) for i in range(4))


def hold_with(data, i, folder):
    return len(data) + hold(i, folder)


# ---- time


def test_a_task_over_its_time_is_named_and_its_worker_is_replaced(nanny_cluster, tmp_path):
    wait_until(lambda: len(nanny_cluster.worker_pids()) == 2)
    before = nanny_cluster.worker_pids()
    begun = time.monotonic()
    with (
        hybrid(nanny_cluster, fallback=False, task_timeout=1.0),
        pytest.raises(TaskTimeoutError, match=r"endless_at, task 3 \(3, 3, .*longer than task_timeout=1 seconds"),
    ):
        Parallel()(delayed(endless_at)(i, 3, str(tmp_path)) for i in range(12))
    assert time.monotonic() - begun < 1.0 + PROMPT
    assert set(started(tmp_path)) == {str(i) for i in range(12)}, "all others are done"
    wait_until(lambda: len(nanny_cluster.worker_pids()) == 2 and nanny_cluster.worker_pids() != before)
    assert len({*before} & {*nanny_cluster.worker_pids()}) == 1, "the other worker stays"


@pytest.mark.parametrize(("n_workers", "n_endless"), [(2, 1), (8, 7)])
def test_tasks_over_their_time_hold_nothing_up_where_no_nanny_replaces_their_workers(
    make_cluster, tmp_path, n_workers, n_endless
):
    cluster = make_cluster(n_workers)
    begun = time.monotonic()
    with (
        hybrid(cluster, n_jobs=n_workers, fallback=False, task_timeout=2),
        pytest.raises(TaskTimeoutError, match=r"endless_before, task \d \(\d, .*longer than task_timeout=2 seconds"),
    ):
        Parallel()(delayed(endless_before)(i, n_endless, str(tmp_path)) for i in range(40))
    assert time.monotonic() - begun < PROMPT
    assert set(started(tmp_path)) == {str(i) for i in range(40)}, "all others are done"


def test_a_search_scores_a_candidate_over_its_time(make_cluster):
    cluster = make_cluster(5)
    with hybrid(cluster, n_jobs=5, fallback=False, task_timeout=2), recoveries() as found:
        got = scores(Step(stays=3), candidates=[0, 1, 2, 3, 4], error_score=-1.0)
    expected = scores(Step(), candidates=[0, 1, 2, 3, 4], n_jobs=1)
    for fold in range(3):
        assert got[fold] == [*expected[fold][:3], -1.0, expected[fold][4]]
    assert len(found) == 3
    assert all("gets its error_score" in text and "(candidate c=3, fold" in text for text in found), found


# ---- the network


@pytest.fixture
def far_away(nursery, tmp_path):
    """Return a host that one link connects with this one."""
    try:
        hosts = Hosts(nursery, tmp_path, n_far=1)
    except HostsUnavailableError as error:
        pytest.skip(str(error))
    try:
        yield hosts.far[0]
    finally:
        hosts.close()


@pytest.mark.parametrize("kind", ["list", "unordered"])
def test_a_cut_network_the_call_goes_on_here(make_cluster, tmp_path, far_away, kind):
    dask_config = pytest.importorskip("dask.config", reason="the extra 'dask' is not installed")
    with dask_config.set({"distributed.comm.timeouts.tcp": "12s", "distributed.comm.timeouts.connect": "3s"}):
        cluster = make_cluster(2, place=far_away.place)
        with hybrid(cluster), recoveries() as found, striking(has_started(tmp_path, 20), far_away.link.cut):
            begun = time.monotonic()
            assert results_of(kind, tmp_path) == results_of(kind)
            assert time.monotonic() - begun < 2.0 + PROMPT
    assert len(found) == 1
    assert WITHOUT_CLUSTER in found[0]


# ---- stopping


def test_ctrl_c_cancels_what_is_on_the_cluster_and_the_next_call_works(make_cluster, tmp_path):
    cluster = make_cluster(2)
    struck = []

    def blow():
        struck.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with cluster.client() as inspector, hybrid(cluster, fallback=False):
        with striking(has_started(tmp_path, 2), blow), pytest.raises(KeyboardInterrupt):
            Parallel(batch_size=1)(delayed(hold)(i, str(tmp_path)) for i in range(30))
        assert time.monotonic() - struck[0] < PROMPT
        wait_until(lambda: inspector.run_on_scheduler(tasks_known_to) == [], PROMPT)
        assert len(started(tmp_path)) == 2, "none of those that waited has run"
        go(tmp_path)
        assert results_of("list", tmp_path) == results_of("list")
        assert last_report().tier == "dask"


DRIVER = """
import sys
import joblib_backends
from clusters import hold
from joblib import Parallel, delayed, parallel_backend
with parallel_backend("hybrid", scheduler=sys.argv[1], n_jobs=2, fallback=False):
    Parallel(batch_size=1)(delayed(hold)(i, sys.argv[2]) for i in range(30))
"""


def test_the_cluster_forgets_the_tasks_of_a_killed_driver_and_serves_the_next(make_cluster, tmp_path):
    cluster = make_cluster(2)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT)))}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address, str(tmp_path)], env=environment)
    try:
        wait_until(has_started(tmp_path, 2))
    finally:
        driver.kill()
        driver.wait(LONG)
    with cluster.client() as inspector:
        wait_until(lambda: inspector.run_on_scheduler(tasks_known_to) == [], PROMPT)
    assert len(started(tmp_path)) == 2, "none of those that waited has run"
    assert all(map(is_alive, cluster.workers))
    go(tmp_path)
    with hybrid(cluster, fallback=False):
        assert results_of("list", tmp_path) == results_of("list")
