"""Every way to name a cluster, and clusters of every kind: real schedulers and workers, ended after each test."""

import gc
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import psutil
import pytest
from clusters import (
    HERE,
    LONG,
    ROOT,
    Cluster,
    KeyKeeper,
    eventually,
    hold,
    hold_first,
    is_alive,
    key_of_this_task,
    kill,
    pids,
    square,
    started,
    tasks_known_to,
    wait_until,
)
from joblib import Parallel, cpu_count, delayed, parallel_backend
from sklearn.model_selection import GridSearchCV, cross_validate

from joblib_backends import HybridBackend, last_report
from joblib_backends.config import Config
from joblib_backends.errors import ClusterUnavailableError, ConfigurationError, RecoveryWarning

distributed = pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
key_split = pytest.importorskip("dask.utils", reason="the extra 'dask' is not installed").key_split
dask_config = pytest.importorskip("dask.config", reason="the extra 'dask' is not installed")
address = pytest.importorskip("joblib_backends.cluster.address", reason="the extra 'dask' is not installed")
Placement = pytest.importorskip(
    "joblib_backends.cluster.placement", reason="the extra 'dask' is not installed"
).Placement
client_module = pytest.importorskip("joblib_backends.cluster.client", reason="the extra 'dask' is not installed")
LocalCluster = pytest.importorskip("joblib_backends.cluster.local").LocalCluster

#: Every test here takes seconds.
pytestmark = pytest.mark.timeout(180)

SQUARES = [i * i for i in range(12)]


@pytest.fixture(scope="module")
def pair(nursery, tmp_path_factory):
    """Return a cluster of two workers that no test changes."""
    cluster = Cluster(nursery, tmp_path_factory.mktemp("pair"), 2)
    try:
        yield cluster.ready()
    finally:
        cluster.close()


@pytest.fixture
def folder(tmp_path):
    """Return the folder in which tasks leave files."""
    (tmp_path / "tasks").mkdir()
    return tmp_path / "tasks"


@pytest.fixture
def no_local_cluster():
    """Have no local cluster before and after the test."""
    LocalCluster.close_current()
    yield
    gc.collect()
    LocalCluster.close_current()
    assert eventually(lambda: not [t for t in threading.enumerate() if t.name == "joblib_backends-dask-local"])


def squares(folder, n_jobs=None, seconds=0.0):
    return Parallel(n_jobs=n_jobs, batch_size=1)(delayed(square)(i, str(folder), seconds) for i in range(12))


def runs_on(cluster, folder, **options):
    """Return whether a call gives what it should, and ran on the workers of a cluster."""
    with parallel_backend("hybrid", fallback=False, **options):
        assert squares(folder) == SQUARES
        assert last_report().tier == "dask"
    return pids(folder) <= set(cluster.worker_pids())


def go(folder):
    (folder / "go").touch()


# ---- naming a cluster


def test_a_scheduler_file_names_a_cluster(pair, folder):
    assert runs_on(pair, folder, scheduler=str(pair.scheduler_file))
    assert runs_on(pair, folder, scheduler=pair.scheduler_file)


def test_a_scheduler_file_may_have_any_name(pair, folder):
    named = shutil.copy(pair.scheduler_file, folder.parent / "where-it-is")
    assert runs_on(pair, folder, scheduler=named)


@pytest.mark.parametrize("what", ["address", "scheduler_file"])
def test_the_environment_names_a_cluster(pair, folder, what, monkeypatch):
    monkeypatch.setenv("JOBLIB_BACKEND_SCHEDULER", str(getattr(pair, what)))
    assert runs_on(pair, folder)


def test_a_scheduler_file_is_waited_for(pair, folder, monkeypatch):
    late = folder.parent / "late.json"
    looks = []

    def look_again(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            late.write_text('{"address": ')  # it is being written
        if len(looks) == 4:
            shutil.copy(pair.scheduler_file, late)

    monkeypatch.setattr(address.time, "sleep", look_again)
    assert address.address_of(Config(scheduler=str(late)), LONG) == pair.address
    assert len(looks) == 4


def test_a_missing_scheduler_file_is_named_with_the_wait(folder):
    missing = folder / "none.json"
    with (
        pytest.raises(ClusterUnavailableError, match=rf"no scheduler file '{missing}' within wait_for_workers=0.2 s"),
        parallel_backend("hybrid", scheduler=str(missing), wait_for_workers=0.2, fallback=False),
    ):
        squares(folder, n_jobs=2)
    with (
        pytest.warns(RecoveryWarning, match=rf"on this machine .*no scheduler file '{missing}'"),
        parallel_backend("hybrid", scheduler=str(missing), wait_for_workers=0.2),
    ):
        assert squares(folder, n_jobs=2) == SQUARES


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"type": "Scheduler"}'])
def test_a_file_that_no_scheduler_has_written_is_refused(folder, content):
    wrong = folder / "wrong.json"
    wrong.write_text(content)
    with (
        pytest.raises(ConfigurationError, match=rf"scheduler is '{wrong}', but must be a file that dask scheduler"),
        parallel_backend("hybrid", scheduler=str(wrong), wait_for_workers=0.2),
    ):
        squares(folder, n_jobs=2)


def test_an_old_scheduler_file_is_named_where_nobody_answers(folder):
    old = folder / "old.json"
    old.write_text(json.dumps({"address": "tcp://127.0.0.1:9"}))
    with (
        pytest.raises(ClusterUnavailableError, match=rf"at 'tcp://127.0.0.1:9', which scheduler='{old}' stands for"),
        parallel_backend("hybrid", scheduler=str(old), wait_for_workers=0.5, fallback=False),
    ):
        squares(folder, n_jobs=2)


def test_a_scheduler_that_was_started_again_is_found_by_its_file(make_cluster, folder):
    first, second = make_cluster(), make_cluster()
    file = folder.parent / "current.json"
    with parallel_backend("hybrid", scheduler=file, fallback=False):
        shutil.copy(first.scheduler_file, file)
        assert squares(folder) == SQUARES
        assert pids(folder) <= set(first.worker_pids())
        kill(first.scheduler)
        shutil.copy(second.scheduler_file, file)
        (folder / "again").mkdir()
        assert squares(folder / "again") == SQUARES
        assert pids(folder / "again") <= set(second.worker_pids())


def test_dasks_own_configuration_names_the_cluster_of_the_dask_tier(pair, folder):
    with dask_config.set({"scheduler-address": pair.address}):
        assert runs_on(pair, folder, tier="dask")
        with parallel_backend("hybrid"):
            assert squares(folder, n_jobs=2) == SQUARES
            assert last_report().tier != "dask", "nobody asked for Dask"


def test_dasks_own_variable_names_the_cluster_of_the_dask_tier(pair, folder):
    script = """
        import sys
        import joblib_backends
        from clusters import square
        from joblib import Parallel, delayed
        print(Parallel(n_jobs=2)(delayed(square)(i, sys.argv[1], 0.0) for i in range(12)))
        print(joblib_backends.last_report().tier)
    """
    variables = {"JOBLIB_BACKEND": "hybrid", "JOBLIB_BACKEND_TIER": "dask", "JOBLIB_BACKEND_QUIET": "1"}
    variables |= {"DASK_SCHEDULER_ADDRESS": pair.address}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import joblib_backends.activation as a; a.activate()\n" + textwrap.dedent(script),
            folder,
        ],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.stdout.splitlines() == [str(SQUARES), "dask"], done.stderr
    assert pids(folder) <= set(pair.worker_pids())


def test_an_active_client_comes_before_dasks_configuration(pair, folder):
    with (
        dask_config.set({"scheduler-address": "tcp://127.0.0.1:9"}),
        distributed.Client(pair.address, set_as_default=True),
    ):
        assert runs_on(pair, folder, tier="dask")


def environment(**variables):
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("JOBLIB", "DASK"))}
    paths = os.pathsep.join(map(str, (HERE, ROOT)))
    return inherited | {"PYTHONPATH": paths, "JOBLIB_BACKEND_PROFILE": "off"} | variables


# ---- several connections of a process, and of its forks


def in_fork(work):
    """Return what ``work`` returns in a forked child, or the sentence that it raises."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(int(LONG))
        try:
            answer = str(work())
        except BaseException as problem:
            answer = f"{type(problem).__name__}: {problem}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    return answer


def lengths(data):
    results = Parallel(n_jobs=2, batch_size=1)(delayed(len)(data) for _ in range(4))
    return results, last_report().tier


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Sending large graph")
def test_a_forked_child_connects_anew_to_the_cluster_that_is_named(pair):
    # So long that Dask has a thread of its own to send it.
    data = bytes(11_000_000)
    with parallel_backend("hybrid", scheduler=pair.address, max_nbytes=None, fallback=False):
        expected = lengths(data)
        assert expected == ([len(data)] * 4, "dask")
        assert in_fork(lambda: lengths(data)) == str(expected)
        assert lengths(data) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fallback", [False, True])
def test_a_forked_child_is_told_that_the_client_is_its_parents(pair, fallback):
    with pair.client() as client, parallel_backend("hybrid", client=client, fallback=fallback):
        assert lengths(b"1") == ([1] * 4, "dask")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = in_fork(lambda: lengths(b"1"))
        if fallback:
            assert answer.startswith("([1, 1, 1, 1], ")
            assert "dask" not in answer
        else:
            assert re.match(r"ClusterUnavailableError: client is <Client: .*> of the parent process", answer)
        assert lengths(b"1") == ([1] * 4, "dask")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_no_active_client(pair):
    with distributed.Client(pair.address, set_as_default=True):
        assert client_module.active_client() is not None
        assert in_fork(client_module.active_client) == "None"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_locks_that_threads_of_the_parent_hold_hang_no_forked_child(pair):
    from joblib_backends.cluster import outlet
    from joblib_backends.cluster.connection import Connection
    from joblib_backends.cluster.outfit import Outfit

    with outlet._changed, Connection._lock, Outfit._lock:
        held = [outlet._changed, Connection._lock, Outfit._lock]
        config = Config(scheduler=pair.address, fallback=False)
        assert in_fork(lambda: Connection.get(config).n_slots()) == "2"
        assert in_fork(lambda: outlet._changed.acquire(timeout=LONG)) == "True"
        assert held == [outlet._changed, Connection._lock, Outfit._lock]


def test_a_call_waits_for_no_other_clusters_connection(pair):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address_of_mute = "tcp://{}:{}".format(*mute.getsockname())

        def wait_for_the_mute():
            backend = HybridBackend(scheduler=address_of_mute, wait_for_workers=LONG, fallback=False)
            with pytest.raises(ClusterUnavailableError):
                backend.effective_n_jobs(-1)

        waiting = threading.Thread(target=wait_for_the_mute)
        waiting.start()
        connected, _ = mute.accept()
        answers = queue.SimpleQueue()
        asking = threading.Thread(
            target=lambda: answers.put(HybridBackend(scheduler=pair.address).effective_n_jobs(-1)), daemon=True
        )
        asking.start()
        try:
            assert answers.get(timeout=LONG / 4) == 2
            assert waiting.is_alive()
        finally:
            connected.close()
            mute.close()
            waiting.join(2 * LONG)


def test_a_scheduler_that_has_the_package_is_not_sent_it_again(pair, folder, monkeypatch):
    from joblib_backends.cluster import outfit

    backend = HybridBackend(scheduler=pair.address)
    assert backend.effective_n_jobs(-1) == 2
    del backend
    monkeypatch.setattr(outfit, "register_plugin", lambda *_, **__: pytest.fail("it was sent"))
    assert runs_on(pair, folder, scheduler=pair.address, n_jobs=2)


# ---- a local cluster on request


@pytest.fixture
def local(no_local_cluster, folder):
    """Return the folder of tasks, and the process of a local cluster that has run some of them."""
    with parallel_backend("hybrid", scheduler="local", fallback=False):
        assert squares(folder, n_jobs=2) == SQUARES
        assert last_report().tier == "dask"
        yield folder, psutil.Process(LocalCluster._current._process.pid)


def test_a_local_cluster_has_a_process_of_one_thread_for_each_core(local):
    backend = HybridBackend(scheduler="local")
    assert backend.effective_n_jobs(-1) == cpu_count()
    with distributed.Client(LocalCluster._current.address, set_as_default=False) as client:
        assert sorted(client.nthreads().values()) == [1] * cpu_count()
        assert len(set(client.run(os.getpid).values())) == cpu_count()


def test_all_calls_of_a_process_share_one_local_cluster(local):
    folder, host = local
    pool = [threading.Thread(target=call_on_local, args=(folder,)) for _ in range(2)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join(LONG)
    assert LocalCluster._current._process.pid == host.pid
    assert len(started(folder)) == 3 * 12
    assert pids(folder) <= {child.pid for child in host.children(recursive=True)}


def call_on_local(folder):
    with parallel_backend("hybrid", scheduler="local", fallback=False):
        assert squares(folder, n_jobs=2) == SQUARES


def test_a_local_cluster_listens_to_this_machine_only(local):
    _, host = local
    listening = [
        connection.laddr.ip
        for process in [host, *host.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_an_idle_local_cluster_is_closed_and_the_next_call_has_another(no_local_cluster, folder):
    with parallel_backend("hybrid", scheduler="local", idle_worker_timeout=0.5, fallback=False):
        assert squares(folder, n_jobs=2) == SQUARES
        first = psutil.Process(LocalCluster._current._process.pid)
        family = [first, *first.children(recursive=True)]
        wait_until(lambda: not any(map(is_alive, family)))
        assert LocalCluster._current is None
        assert squares(folder, n_jobs=2) == SQUARES
        assert last_report().tier == "dask"


def test_a_local_cluster_is_not_idle_while_a_task_runs(no_local_cluster, folder):
    outcomes = []
    caller = threading.Thread(target=lambda: outcomes.append(hold_two(folder)))
    caller.start()
    wait_until(lambda: len(started(folder)) == 2)
    cluster = LocalCluster._current
    begun = cluster._used
    wait_until(lambda: cluster._used > begun + 0.6)  # it was looked at, and found in use, for long
    assert cluster._is_alive()
    go(folder)
    caller.join(LONG)
    assert outcomes == [[0, 1]]


def test_a_local_cluster_is_not_idle_while_a_call_connects_to_it(no_local_cluster, folder, monkeypatch):
    from joblib_backends.cluster import connection

    connect, closed = connection.connect, []

    def connect_late(*args):
        closed.append(LocalCluster._current._over.wait(0.5))
        return connect(*args)

    monkeypatch.setattr(connection, "connect", connect_late)
    with parallel_backend("hybrid", scheduler="local", idle_worker_timeout=0.1, fallback=False):
        assert squares(folder, n_jobs=2) == SQUARES
    assert closed
    assert not any(closed)


def hold_two(folder):
    with parallel_backend("hybrid", scheduler="local", idle_worker_timeout=0.2, fallback=False, n_jobs=2):
        return Parallel()(delayed(hold)(i, str(folder)) for i in range(2))


def test_a_call_goes_on_when_its_local_cluster_is_killed(no_local_cluster, folder):
    with parallel_backend("hybrid", scheduler="local", wait_for_workers=1.0, n_jobs=2):
        assert squares(folder) == SQUARES
        killed = LocalCluster._current._process.pid
        family = psutil.Process(killed).children(recursive=True)
        os.kill(killed, signal.SIGKILL)
        assert eventually(lambda: not any(map(is_alive, family))), "its workers end with it"
        assert squares(folder) == SQUARES
        assert last_report().tier == "dask", "another one was started"


UNGUARDED = """
    import os, signal, sys, psutil
    from clusters import square, hold
    from joblib import Parallel, delayed, parallel_backend
    import joblib_backends

    def cube(i):
        return i ** 3

    with parallel_backend("hybrid", scheduler="local", n_jobs=2, fallback=False):
        assert Parallel()(delayed(cube)(i) for i in range(4)) == [0, 1, 8, 27]
        assert joblib_backends.last_report().tier == "dask"
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        if sys.argv[2:]:
            Parallel()(delayed(hold)(i, sys.argv[1]) for i in range(2))
"""


@pytest.mark.parametrize("end", ["exit", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_of_a_local_cluster_however_its_script_ends(folder, end):
    places = folder.parent / "places"
    places.mkdir()
    script = folder.parent / "script.py"
    script.write_text(textwrap.dedent(UNGUARDED))
    process = subprocess.Popen(
        [sys.executable, script, folder, *(["hold"] if end != "exit" else [])],
        env=environment(TMPDIR=str(places), JOBLIB_TEMP_FOLDER=str(places)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    family = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    if end != "exit":
        assert len(family) > cpu_count()
        wait_until(lambda: len(started(folder)) == 2)
        process.send_signal(getattr(signal, end))
    _, complaints = process.communicate(timeout=LONG)
    assert eventually(lambda: not any(map(is_alive, family))), [process.cmdline() for process in family]
    # What a resource tracker or a server of ours is still about to delete goes with its last process.
    assert eventually(lambda: not left_in(places)), left_in(places)
    if end == "exit":
        assert process.returncode == 0, complaints
        assert complaints == ""


def left_in(places):
    return [str(path) for path in Path(places).rglob("*") if path.is_file() or "joblib_backends" in path.name]


def test_the_end_of_a_forked_child_leaves_the_local_cluster(local):
    folder, host = local
    child = os.fork()
    if child == 0:
        LocalCluster.close_current()
        os._exit(0 if LocalCluster._current is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert is_alive(host)
    assert squares(folder, n_jobs=2) == SQUARES


def test_a_local_cluster_that_does_not_start_says_why(no_local_cluster, folder, monkeypatch):
    monkeypatch.setattr("joblib_backends.cluster.local._PROGRAM", "raise SystemExit(3)")
    monkeypatch.setattr(LocalCluster, "_failed", None)
    with (
        pytest.raises(
            ClusterUnavailableError, match=r"local Dask cluster of .* workers did not start: its process ended"
        ),
        parallel_backend("hybrid", scheduler="local", fallback=False),
    ):
        squares(folder, n_jobs=2)
    with (
        pytest.warns(RecoveryWarning, match="on this machine .*A local Dask cluster"),
        parallel_backend("hybrid", scheduler="local"),
    ):
        assert squares(folder, n_jobs=2) == SQUARES


def test_where_no_local_cluster_can_be_started_it_is_said_before_anything_is(no_local_cluster, folder, monkeypatch):
    monkeypatch.setattr("joblib_backends.cluster.local._CAN_PASS_PIPES", False)
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises(ConfigurationError, match=r"scheduler is 'local', .*give client=client"),
        parallel_backend("hybrid", scheduler="local"),
    ):
        squares(folder, n_jobs=2)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not started(folder)


def test_certificates_are_not_for_a_local_cluster():
    with pytest.raises(ConfigurationError, match=r"security is .*, but must be left out with scheduler='local'"):
        HybridBackend(scheduler="local", security=distributed.Security())


# ---- clusters that grow and shrink


@pytest.fixture
def adaptive():
    """Return a client of a cluster that starts without a worker and grows to four."""
    with (
        # Workers are there within a second, and not after each has imported all that it needs.
        dask_config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0", memory_limit=0) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        cluster.adapt(minimum=0, maximum=4, interval="20ms", wait_count=2, target_duration="10ms")
        yield client


def n_workers(client):
    return len(client.nthreads())


def test_all_jobs_of_an_adaptive_cluster_are_those_of_its_maximum(adaptive):
    assert n_workers(adaptive) == 0
    assert HybridBackend(client=adaptive, wait_for_workers=LONG).effective_n_jobs(-1) == 4


def test_a_call_starts_the_workers_of_an_adaptive_cluster_and_the_next_one_starts_them_again(adaptive, folder):
    with parallel_backend("hybrid", client=adaptive, wait_for_workers=LONG, fallback=False):
        for name in ("first", "second"):
            (folder / name).mkdir()
            assert squares(folder / name, seconds=0.3) == SQUARES
            assert last_report().tier == "dask"
            assert len(pids(folder / name)) > 1, "it grew"
            assert eventually(lambda: n_workers(adaptive) == 0), "it shrinks when nothing runs"


def test_a_call_survives_that_its_cluster_shrinks(adaptive, folder):
    tasks = [delayed(hold)(0, str(folder)), *(delayed(square)(i, str(folder), 0.2) for i in range(1, 12))]
    with parallel_backend("hybrid", client=adaptive, wait_for_workers=LONG, fallback=False):
        results = Parallel(return_as="generator_unordered", batch_size=1)(tasks)
        most = 0
        for _ in range(11):  # all but the one that waits
            next(results)
            most = max(most, n_workers(adaptive))
        assert most > 1
        assert eventually(lambda: n_workers(adaptive) == 1), "the worker of a running task stays"
        go(folder)
        assert list(results) == [0]


def test_jobs_of_a_cluster_that_only_its_address_stands_for_are_those_that_are_there(adaptive):
    backend = HybridBackend(scheduler=adaptive.scheduler.address, wait_for_workers=LONG)
    assert backend.effective_n_jobs(-1) in range(1, 5)


def test_workers_that_a_cluster_was_asked_for_count_before_they_are_there():
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        there, cluster.worker_spec["slow"] = HybridBackend(client=client).effective_n_jobs(-1), cluster.new_spec
        assert (there, HybridBackend(client=client).effective_n_jobs(-1)) == (2, 4)


def test_a_worker_that_joins_gets_work_and_data_of_the_call(make_cluster, folder):
    import numpy as np

    cluster = make_cluster(1)
    data = np.ones(500_000)
    results = []

    def call():
        with parallel_backend("hybrid", scheduler=cluster.address, n_jobs=4, fallback=False, scatter=[data]):
            results.extend(Parallel(batch_size=1)(delayed(total_when_two)(data, i, str(folder)) for i in range(20)))

    caller = threading.Thread(target=call)
    caller.start()
    wait_until(lambda: started(folder))
    cluster.add_worker(private_shm=os.geteuid() == 0)
    caller.join(LONG)
    assert results == [500_000.0 + i for i in range(20)]
    assert len(pids(folder)) == 2


def total_when_two(data, i, folder):
    """Use the data, once two processes have tasks."""
    (Path(folder) / f"{i}@{os.getpid()}-{i}").touch()
    wait_until(lambda: len(pids(folder)) == 2)
    return float(data.sum()) + i


# ---- workers that differ


@pytest.fixture(scope="module")
def mixed(nursery, tmp_path_factory):
    """Return a cluster of three workers: one thread, three threads, three threads with two GPUs."""
    cluster = Cluster(nursery, tmp_path_factory.mktemp("mixed"), 0)
    try:
        cluster.add_worker(name="small")
        cluster.add_worker(name="large", nthreads=3)
        cluster.add_worker(name="gpu", nthreads=3, resources="GPU=2")
        yield cluster.ready()
    finally:
        cluster.close()


def pids_by_name(cluster):
    with cluster.client() as client:
        names = {worker: about["name"] for worker, about in client.sync(client.scheduler.identity)["workers"].items()}
        return {names[worker]: pid for worker, pid in client.run(os.getpid).items()}


SLOTS = {
    "all": ({}, 7),
    "by name": ({"workers": ["small", "large"]}, 4),
    "by host": ({"workers": ["127.0.0.1"]}, 7),
    "resource": ({"resources": {"GPU": 1}}, 2),
    "part of a resource": ({"resources": {"GPU": 0.5}}, 3),
    "all of a resource": ({"resources": {"GPU": 2}}, 1),
    "both": ({"resources": {"GPU": 1}, "workers": ["gpu", "small"]}, 2),
}


@pytest.mark.parametrize("case", SLOTS)
def test_all_jobs_are_those_of_the_workers_that_match(mixed, case):
    options, n_jobs = SLOTS[case]
    assert HybridBackend(scheduler=mixed.address, **options).effective_n_jobs(-1) == n_jobs


@pytest.mark.parametrize("n_threads", [1, 3])
def test_tasks_run_on_the_named_workers_only(mixed, folder, n_threads):
    name = {1: "small", 3: "large"}[n_threads]
    assert runs_on(mixed, folder, scheduler=mixed.address, workers=[name])
    assert pids(folder) == {pids_by_name(mixed)[name]}


def test_a_worker_may_be_named_by_its_address(mixed, folder):
    with mixed.client() as client:
        [worker] = [
            w for w, about in client.sync(client.scheduler.identity)["workers"].items() if about["name"] == "large"
        ]
    assert runs_on(mixed, folder, scheduler=mixed.address, workers=[worker])
    assert pids(folder) == {pids_by_name(mixed)["large"]}


def test_tasks_take_their_resource_and_no_more_run_than_there_is(mixed, folder):
    with parallel_backend("hybrid", scheduler=mixed.address, resources={"GPU": 2}, fallback=False):
        results = Parallel(batch_size=1)(delayed(alone)(i, str(folder)) for i in range(6))
        assert last_report().tier == "dask", "one slot of a cluster is not this process"
    assert results == list(range(6))
    assert pids(folder) == {pids_by_name(mixed)["gpu"]}


def alone(i, folder):
    """Fail if another task runs."""
    (Path(folder) / f"{i}@{os.getpid()}-{i}").touch()
    descriptor = os.open(Path(folder) / "running", os.O_CREAT | os.O_EXCL)
    os.close(descriptor)
    (Path(folder) / "running").unlink()
    return i


def test_the_environment_says_where_tasks_run(mixed, folder, monkeypatch):
    monkeypatch.setenv("JOBLIB_BACKEND_WORKERS", "small, gpu")
    monkeypatch.setenv("JOBLIB_BACKEND_RESOURCES", "GPU=1")
    assert runs_on(mixed, folder, scheduler=mixed.address)
    assert pids(folder) == {pids_by_name(mixed)["gpu"]}


def test_workers_are_asked_for_by_number_in_text_too(pair, folder, monkeypatch):
    monkeypatch.setenv("JOBLIB_BACKEND_WORKERS", "1")
    with pair.client() as client:
        for case, given in enumerate(({}, {"workers": [1]}, {"workers": ["1", 7]})):
            (folder / str(case)).mkdir()
            with parallel_backend("hybrid", client=client, fallback=False, **given) as (backend, _):
                assert backend.effective_n_jobs(-1) == 1
                assert squares(folder / str(case), n_jobs=2) == SQUARES
                assert last_report().tier == "dask"
            assert pids(folder / str(case)) == {pids_by_name(pair)[1]}
        for given in ([7], ["7"]):
            backend = HybridBackend(client=client, workers=given, wait_for_workers=0.2, fallback=False)
            with pytest.raises(ClusterUnavailableError, match=r"no worker with workers=\['7'\]"):
                backend.effective_n_jobs(-1)
        assert client.submit(int).result(LONG) == 0, "it has not lost its scheduler"


def test_numbers_become_what_the_cluster_has_and_names_stay():
    asked = Placement(workers=(0, "1", "2", "node3"))
    assert asked.numbered_as(["0", 1]).workers == ("0", 1, "2", "node3")
    assert asked.numbered_as([0, "0", "1", 1]).workers == (0, "1", "2", "node3")
    assert not Placement(workers=("node3",)).has_numbers


def test_a_worker_is_found_by_its_number_that_joins_after_it_was_asked_for():
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        backend = HybridBackend(client=client, workers=["1"], wait_for_workers=0.2, fallback=False)
        with pytest.raises(ClusterUnavailableError):
            backend.effective_n_jobs(-1)
        cluster.scale(2)
        client.wait_for_workers(2, timeout=LONG)
        assert backend.effective_n_jobs(-1) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": ["nobody"]}, r"no worker with workers=\['nobody'\] for 0.5 seconds"),
        ({"resources": {"TPU": 1}}, r"no worker with resources=\{'TPU': 1\} for 0.5 seconds"),
        (
            {"workers": ["small"], "resources": {"GPU": 1}},
            r"no worker with workers=\['small'\] and resources=\{'GPU': 1\}",
        ),
    ],
)
def test_what_no_worker_has_is_named_after_the_wait(mixed, folder, options, says):
    with (
        pytest.raises(ClusterUnavailableError, match=says),
        parallel_backend("hybrid", scheduler=mixed.address, wait_for_workers=0.5, fallback=False, **options),
    ):
        squares(folder, n_jobs=2)


def test_a_call_whose_only_matching_worker_dies_goes_on_here(make_cluster, folder):
    cluster = make_cluster(1)
    wanted = cluster.add_worker(name="wanted", nthreads=2)
    cluster.ready()
    caught = []

    def strike():
        wait_until(lambda: started(folder))
        kill(wanted)
        go(folder)

    striker = threading.Thread(target=strike)
    striker.start()
    with (
        pytest.warns(RecoveryWarning, match="no worker for wait_for_workers=1 seconds"),
        parallel_backend("hybrid", scheduler=cluster.address, workers=["wanted"], wait_for_workers=1.0, n_jobs=2),
    ):
        caught += Parallel(batch_size=1)(delayed(hold)(i, str(folder)) for i in range(4))
    striker.join(LONG)
    assert caught == [0, 1, 4, 9]


def test_tasks_have_the_priority_that_was_given(pair, folder):
    with pair.client() as client:
        for priority in (10, -2.5):
            (folder / str(priority)).mkdir()
            seen = []
            watcher = threading.Thread(target=lambda at=folder / str(priority), seen=seen: look_at(client, at, seen))
            watcher.start()
            with parallel_backend("hybrid", scheduler=pair.address, priority=priority, n_jobs=2, fallback=False):
                Parallel()(delayed(hold)(i, str(folder / str(priority))) for i in range(2))
            watcher.join(LONG)
            assert set(seen) == {-priority}, "Dask's scheduler takes the lowest first"


def look_at(client, folder, seen):
    wait_until(lambda: len(started(folder)) == 2)
    seen += client.run_on_scheduler(priorities_of)
    go(folder)


def priorities_of(dask_scheduler):
    return [task.priority[0] for task in dask_scheduler.tasks.values() if "hold" in str(task.key)]


# ---- what is left on the cluster


def test_outcomes_that_are_here_are_released_while_other_batches_run(make_cluster, tmp_path):
    """They would take their workers' memory, and be computed again when one of those died."""
    cluster = make_cluster()
    with (
        parallel_backend("hybrid", scheduler=cluster.address, n_jobs=2, fallback=False),
        cluster.client() as client,
    ):
        call = Parallel(batch_size=1, return_as="generator_unordered")
        results = call(delayed(hold_first)(i, 1, str(tmp_path)) for i in range(12))
        assert sorted(next(results) for _ in range(11)) == SQUARES[1:]
        assert eventually(lambda: len(client.run_on_scheduler(tasks_known_to)) == 1)
        (tmp_path / "go").touch()
        assert list(results) == [0]


# ---- what people see on the dashboard


def test_keys_name_the_function_the_estimator_and_the_tasks(make_cluster, tmp_path):
    X, y = [[0.0], [1.0]] * 6, [0, 1] * 6  # noqa: N806
    with parallel_backend("hybrid", scheduler=make_cluster().address, n_jobs=2, fallback=False):
        keys = Parallel(batch_size=3)(delayed(key_of_this_task)(i) for i in range(6))
        cross_validate(KeyKeeper(folder=tmp_path), X, y, cv=2)
        validated = keys_in(tmp_path)
        GridSearchCV(KeyKeeper(folder=tmp_path), {"c": [1, "\udc80\n"]}, cv=2, refit=False).fit(X, y)
        searched = keys_in(tmp_path)
    assert [key.rpartition("-")[0] for key in keys] == [
        *["key_of_this_task-tasks 0 to 2"] * 3,
        *["key_of_this_task-tasks 3 to 5"] * 3,
    ]
    assert validated == [f"_fit_and_score-KeyKeeper-task {i}" for i in range(2)]
    assert searched == [
        f"_fit_and_score-KeyKeeper-task {2 * i + k}, candidate c={c}, fold {k + 1} of 2"
        for i, c in enumerate(["1", r"'\udc80\n'"])
        for k in range(2)
    ]
    assert {key_split(key) for key in [*keys, *searched]} == {"key_of_this_task", "fit_and_score-KeyKeeper"}


def keys_in(folder):
    """Return the keys that were written into a folder, without what makes each another; and remove them."""
    files = list(folder.glob("*.key"))
    keys = sorted(file.read_text().rpartition("-")[0] for file in files)
    for file in files:
        file.unlink()
    return keys
