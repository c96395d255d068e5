"""A Dask cluster of several hosts: data once per host, counted on the wire and in memory.

Traffic is what the kernel counted on the interfaces of the hosts, memory what it says of their files and processes.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from certificates import make_certificates, needs_openssl, options_of, security_of
from clusters import (
    HERE,
    ROOT,
    Cluster,
    Nursery,
    Step,
    eventually,
    is_alive,
    kill,
    started,
    striking,
    wait_until,
)
from hosts import Census, Hosts, HostsUnavailableError, counting
from joblib import Parallel, delayed, parallel_backend
from sklearn.model_selection import GridSearchCV
from witnesses import (
    accounts,
    boot_id,
    content,
    fingerprint,
    keep_bytes,
    last_heartbeats,
    limit_memory,
    make_file,
    map_file,
    n_looks,
    resident_memory,
    scribble,
)

from joblib_backends import last_report
from joblib_backends.remote import process_identity

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

pytestmark = pytest.mark.timeout(120)

N_FAR = 3
N_TASKS = 24

#: Bytes of the data, and what messages may take beside it: hundreds of heartbeats and batches, never a copy.
NBYTES = 64_000_000
LITTLE = 2_500_000

#: Bytes that a worker's own memory may grow by when it gets the data: parts that passed through, never a copy.
PARTS = 0.75 * NBYTES

#: Seconds for what a worker does by itself now and then.
SOON = 20.0


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


@contextlib.contextmanager
def a_network(nursery, folder):
    try:
        hosts = Hosts(nursery, folder, N_FAR)
    except HostsUnavailableError as error:
        pytest.skip(str(error))
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.fixture(scope="module", autouse=True)
def _links_are_told(nursery, tmp_path_factory, request):
    """Say what the links of this machine are like: no test depends on it."""
    with a_network(nursery, tmp_path_factory.mktemp("links")) as hosts:
        plugin = request.config.pluginmanager.get_plugin
        with plugin("capturemanager").global_and_fixture_disabled():
            plugin("terminalreporter").write_line(f"links between hosts: {hosts.links}")


@pytest.fixture
def hosts(nursery, tmp_path):
    with a_network(nursery, tmp_path) as hosts:
        yield hosts


@contextlib.contextmanager
def a_cluster(nursery, folder, hosts, n_workers, *, settings=None, **options):
    """Return a cluster whose scheduler is on the host "head", with so many workers on each host."""
    cluster = Cluster(nursery, folder, 0, place=hosts.head.place, **options)
    try:
        for host, n in n_workers.items():
            for _ in range(n):
                cluster.add_worker(place=host.place, **(settings or {}))
        yield cluster.ready()
    finally:
        cluster.close()


@pytest.fixture
def make_cluster(nursery, tmp_path, hosts):
    with contextlib.ExitStack() as stack:
        yield lambda n_workers, **options: stack.enter_context(
            a_cluster(nursery, tmp_path, hosts, n_workers, **options)
        )


def on_dask(cluster, n_jobs=-1, **options):
    return parallel_backend("hybrid", n_jobs=n_jobs, scheduler=cluster.address, fallback=False, **options)


def some_data(seed, nbytes=NBYTES):
    return np.random.default_rng(seed).random(nbytes // 8)


def fingerprints(data, folder, **options):
    results = Parallel(batch_size=1)(delayed(fingerprint)(data, i, str(folder), **options) for i in range(N_TASKS))
    assert last_report().tier == "dask"
    return results


def expected(data):
    """Return what ``n_jobs=1`` gives."""
    whole = content(data)
    return [(whole, i) for i in range(N_TASKS)]


def has_started_on(folder, n):
    """Return a function: have tasks started on so many workers?"""
    return lambda: len(set(started(folder))) >= n


def while_held(folder, n, look):
    """Call ``look()`` when tasks on so many workers hold the data, then let them go on."""

    def look_and_go():
        try:
            look()
        finally:
            go(folder)

    return striking(has_started_on(folder, n), look_and_go)


def has_started_at(folder, host):
    return lambda: any(name.startswith(f"{host.name}:") for name in started(folder))


def go(folder):
    (folder / "go").touch()


# ---- the hosts themselves


def test_hosts_are_told_apart_but_for_the_clients_own(make_cluster, hosts):
    cluster = make_cluster({hosts.far[0]: 2, hosts.far[1]: 1, hosts.near: 1})
    here = socket.gethostname()
    with cluster.client() as client:
        names = [identity.rpartition(":")[0] for identity in client.run(process_identity).values()]
        boots = set(client.run(boot_id).values())
    assert sorted(names) == sorted(["far0", "far0", "far1", here])
    assert len(boots) == 3
    assert boot_id() in boots


def test_a_host_has_files_of_its_own_and_sees_the_shared_folder(make_cluster, hosts, tmp_path):
    cluster = make_cluster({hosts.far[0]: 1, hosts.far[1]: 1})
    own, shared = f"/dev/shm/note-{os.getpid()}", str(tmp_path / "note")
    with cluster.client() as client:
        first = worker_at(client, hosts.far[0])
        client.run(make_file, own, workers=[first])
        client.run(make_file, shared, workers=[first])
        assert sorted(client.run(os.path.exists, own).values()) == [False, True]
        assert list(client.run(os.path.exists, shared).values()) == [True, True]
    assert not os.path.exists(own)
    assert [Path(own) in host.files() for host in hosts.far] == [True, False, False]


def test_a_link_counts_its_bytes_and_is_cut_and_mended(make_cluster, hosts):
    cluster = make_cluster({hosts.far[0]: 1, hosts.far[1]: 1})
    data = some_data(0)
    with cluster.client() as client, counting(hosts) as traffic:
        client.scatter(data, workers=[worker_at(client, hosts.far[0])], direct=True)
    assert NBYTES <= traffic["client"].sent < 1.2 * NBYTES
    assert NBYTES <= traffic["far0"].received < 1.2 * NBYTES
    assert traffic["far1"].received < LITTLE
    assert traffic["head"].received < LITTLE
    hosts.head.link.cut()
    assert not can_connect(cluster.address)
    hosts.head.link.mend()
    assert eventually(lambda: can_connect(cluster.address), SOON)


def worker_at(client, host):
    """Return the address of a worker on a host."""
    return next(one for one in client.scheduler_info()["workers"] if f"//{host.place.address}:" in one)


def can_connect(address):
    host, port = address.rpartition("/")[2].split(":")
    try:
        socket.create_connection((host, int(port)), timeout=0.5).close()
    except OSError:
        return False
    return True


def test_a_census_tells_mapped_pages_from_own_ones(make_cluster, hosts):
    host = hosts.far[0]
    cluster = make_cluster({host: 2})
    before = host.census(cluster.workers)
    with cluster.client() as client:
        client.run(map_file, "/dev/shm/mapped", NBYTES)
        one = worker_at(client, host)
        client.run(keep_bytes, NBYTES, workers=[one])
        after = host.census(cluster.workers)
    assert after.files - before.files == NBYTES
    assert [mapped >= NBYTES for mapped in after.mapped] == [True, True]
    assert NBYTES <= after.mapped_once < 1.1 * NBYTES
    assert sorted(own - own_before > NBYTES / 2 for own_before, own in zip(before.own, after.own, strict=True)) == [
        False,
        True,
    ]


SCRIPT = """
import sys, time
from clusters import Cluster, Nursery
from hosts import Hosts
nursery = Nursery()
hosts = Hosts(nursery, sys.argv[1], 1)
cluster = Cluster(nursery, sys.argv[1], 1, place=hosts.far[0].place)
pids = [process.pid for process in (cluster.scheduler, *cluster.workers)]
print(hosts.client_link.interface, hosts.near.place.holder, hosts.far[0].place.holder, *pids, flush=True)
time.sleep(60)
"""


def test_nothing_of_the_hosts_outlives_killed_tests(hosts, tmp_path):
    # With "hosts", or this machine may not be able to make any.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT)))}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as script:
        interface, *pids = script.stdout.readline().split()
        assert interface in os.listdir("/sys/class/net")
        assert all(psutil.pid_exists(int(pid)) for pid in pids)
        script.kill()
    assert eventually(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids), SOON)
    assert eventually(lambda: interface not in os.listdir("/sys/class/net"), SOON)


# ---- data once per host


class Run(NamedTuple):
    """A call of tasks that all work on the same data, held by all workers at once."""

    results: list
    expected: list
    #: By the name of the host, or "client".
    traffic: dict
    #: Before the call, and while all workers held the data.
    before: list[Census]
    during: list[Census]


@pytest.fixture(scope="module", params=["tcp", pytest.param("tls", marks=needs_openssl)])
def run(request, nursery, tmp_path_factory):
    """Return what a call of 24 tasks on three hosts of three workers did, with TLS and without."""
    folder = tmp_path_factory.mktemp("run")
    dask, ours = {}, {}
    if request.param == "tls":
        security = security_of(make_certificates(folder / "certificates"))
        dask = {"protocol": "tls", "options": options_of(folder / "certificates"), "security": security}
        ours = {"security": security}
    with (
        a_network(nursery, folder) as hosts,
        a_cluster(nursery, folder, hosts, dict.fromkeys(hosts.far, 3), **dask) as cluster,
    ):
        yield run_of_all(hosts, cluster, some_data(1), folder, **ours)


def run_of_all(hosts, cluster, data, folder, **options):
    def take_census():
        return [host.census(cluster.workers_at(host.place)) for host in hosts.far]

    before, during = take_census(), []
    with (
        on_dask(cluster, **options),
        counting(hosts) as traffic,
        while_held(folder, len(cluster.workers), lambda: during.extend(take_census())),
    ):
        results = fingerprints(data, folder)
    return Run(results, expected(data), traffic, before, during)


def test_the_results_are_those_of_one_process(run):
    assert run.results == run.expected


def test_data_comes_to_each_host_once(run):
    for i in range(N_FAR):
        assert NBYTES <= run.traffic[f"far{i}"].received < 1.5 * NBYTES


def test_hosts_feed_each_other(run):
    for sender in ("client", "head"):
        assert run.traffic[sender].sent < 2 * NBYTES, run.traffic


def test_workers_of_a_host_map_one_copy(run):
    for before, during in zip(run.before, run.during, strict=True):
        assert NBYTES <= during.files - before.files < 1.5 * NBYTES
        assert all(mapped >= NBYTES for mapped in during.mapped)
        assert during.mapped_once < 1.5 * NBYTES


def test_no_worker_has_a_copy_for_itself(run):
    for before, during in zip(run.before, run.during, strict=True):
        for own_before, own in zip(before.own, during.own, strict=True):
            assert own - own_before < PARTS


@pytest.mark.parametrize("n_elsewhere", [0, 1])
def test_workers_on_the_clients_host_map_its_file(make_cluster, hosts, tmp_path, n_elsewhere):
    cluster = make_cluster({hosts.near: 2, hosts.far[0]: n_elsewhere})
    data = some_data(2)

    def take_census():
        return hosts.near.census(cluster.workers_at(hosts.near.place))

    before, during = take_census(), []
    with (
        on_dask(cluster),
        counting(hosts) as traffic,
        while_held(tmp_path, 2 + n_elsewhere, lambda: during.append(take_census())),
    ):
        assert fingerprints(data, tmp_path) == expected(data)
    assert traffic["near"].received < LITTLE
    # Its workers have the data, and so may feed others as well as the client.
    assert traffic["client"].sent + traffic["near"].sent < n_elsewhere * 1.5 * NBYTES + LITTLE
    assert n_elsewhere * NBYTES <= traffic["far0"].received < n_elsewhere * 1.5 * NBYTES + LITTLE
    assert all(mapped >= NBYTES for mapped in during[0].mapped)
    assert during[0].mapped_once < 1.5 * NBYTES
    assert all(own - own_before < PARTS for own_before, own in zip(before.own, during[0].own, strict=True))


@pytest.mark.parametrize("again", ["same objects", "equal copies"])
def test_the_same_search_again_sends_nothing(make_cluster, hosts, again):
    cluster = make_cluster(dict.fromkeys(hosts.far, 1))
    # Wide, for what each task has for itself, y and the numbers of its rows, goes with it each time.
    X = some_data(3, 16_000_000).reshape(-1, 1_000)  # noqa: N806
    y = np.arange(len(X)) % 2

    def scores(X, y, n_jobs=None):  # noqa: N803
        search = GridSearchCV(Step(seconds=0.0), {"c": [1, 2, 3]}, cv=3, n_jobs=n_jobs, refit=False).fit(X, y)
        return [search.cv_results_[f"split{fold}_test_score"].tolist() for fold in range(3)]

    before = {host: host.link.traffic().received for host in hosts.far}
    with on_dask(cluster):
        first = scores(X, y)
        assert last_report().tier == "dask"
        # A short search may be over before all hosts have got its data.
        wait_until(lambda: all(host.link.traffic().received - before[host] > X.nbytes for host in hosts.far), SOON)
        with counting(hosts) as traffic:
            second = scores(X, y) if again == "same objects" else scores(X.copy(), y.copy())
        assert last_report().tier == "dask"
    assert first == second == scores(X, y, n_jobs=1)
    for name, one in traffic.items():
        assert one.received < LITTLE, name


def test_a_task_that_writes_to_its_data_changes_nobody_elses(make_cluster, hosts, tmp_path):
    cluster = make_cluster({hosts.near: 2, hosts.far[0]: 2})
    data = some_data(4, 8_000_000)
    whole = content(data)
    with on_dask(cluster):
        for _ in range(2):
            results = Parallel(batch_size=1)(delayed(scribble)(data, i, str(tmp_path)) for i in range(N_TASKS))
            assert results == [(whole, float(len(data) * i), i) for i in range(N_TASKS)]
            assert last_report().tier == "dask"
    assert content(data) == whole


@pytest.mark.parametrize("there", ["the same file", "no file", "another file"])
def test_a_memmap_travels_by_its_path_to_hosts_that_have_the_file(make_cluster, hosts, tmp_path, there):
    cluster = make_cluster({hosts.far[0]: 2})
    go(tmp_path)
    with tempfile.TemporaryDirectory() as own_folder, cluster.client() as client:
        path = (tmp_path if there == "the same file" else Path(own_folder)) / "data"
        data = np.memmap(path, float, "w+", shape=NBYTES // 8)
        data[:] = some_data(10)
        data.flush()
        if there == "another file":
            client.run(make_file, str(path), NBYTES)
        data = np.memmap(path, float, "r", shape=NBYTES // 8)
        with on_dask(cluster), counting(hosts) as traffic:
            assert fingerprints(data, tmp_path) == expected(data)
    if there == "the same file":
        assert traffic["far0"].received < LITTLE
    else:
        assert NBYTES <= traffic["far0"].received < 1.5 * NBYTES


# ---- memory, as Dask sees it


def test_mapped_pages_pause_and_restart_no_worker(make_cluster, hosts, tmp_path):
    cluster = make_cluster({hosts.far[0]: 2}, settings={"nanny": True, "memory_limit": "8GB"})
    data = [some_data(seed, 24_000_000) for seed in range(8)]
    nbytes = sum(one.nbytes for one in data)
    told = []
    with cluster.client() as client, on_dask(cluster):
        assert Parallel(batch_size=1)(delayed(abs)(-i) for i in range(N_TASKS)) == list(range(N_TASKS))
        before, pids = client.run(resident_memory), client.run(os.getpid)

        def look():
            # Not earlier, when what is on its way is the worker's own memory: now it is mapped, and with that, the
            # limit is reached; without, it is far.
            for nanny in (False, True):
                client.run(limit_memory, min(before.values()) + nbytes, nanny=nanny)
            wait_for_looks(client)
            told.extend(client.run_on_scheduler(accounts))

        with while_held(tmp_path, 2, look):
            assert fingerprints(data, tmp_path) == expected(data)
        assert client.run(os.getpid) == pids, "no worker was restarted"
    assert [state for state, _, _ in told] == ["running", "running"]
    assert sum(process for _, process, _ in told) < sum(before.values()) + 1.5 * nbytes
    assert sum(managed for _, _, managed in told) < 1.5 * nbytes


def wait_for_looks(client):
    """Wait until each worker has looked at its memory and has told the scheduler what it saw."""
    for ask in (lambda: client.run(n_looks), lambda: client.run_on_scheduler(last_heartbeats)):
        for _ in range(2):
            before = ask()
            # One that is gone, or new, is none to wait for.
            wait_until(lambda before=before, ask=ask: all(now != before.get(name) for name, now in ask().items()), SOON)


# ---- nothing stays


def test_nothing_is_left_on_a_host_when_the_client_is_gone(make_cluster, hosts, tmp_path):
    cluster = make_cluster(dict.fromkeys(hosts.far, 2))
    data = some_data(5)
    go(tmp_path)
    with on_dask(cluster):
        assert fingerprints(data, tmp_path) == expected(data)
    for host in hosts.far:
        assert eventually(lambda host=host: not data_files(host), SOON), data_files(host)
        assert eventually(lambda host=host: host.census([]).files < LITTLE, SOON), host.files()


@pytest.mark.parametrize("victim", ["the one with the file", "another one"])
def test_nothing_is_left_on_a_host_after_a_killed_worker_when_the_last_one_ends(make_cluster, hosts, tmp_path, victim):
    host = hosts.far[0]
    cluster = make_cluster({host: 2, hosts.far[1]: 1})
    data = some_data(6)

    def blow():
        workers = cluster.workers_at(host.place)
        keepers = keepers_of(host, workers)
        assert keepers, "none of the workers has the folder of the data open"
        workers.sort(key=lambda worker: worker in keepers)
        kill(workers[-1] if victim == "the one with the file" else workers[0])

    with on_dask(cluster), while_held(tmp_path, 3, blow):
        assert fingerprints(data, tmp_path) == expected(data)
    # A Dask worker that is told to end while it computes again what a killed one had may wait for that for ever.
    assert eventually(lambda: is_at_rest(cluster), SOON)
    for worker in cluster.workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.terminate()
    assert eventually(lambda: not any(map(is_alive, cluster.workers)), SOON)
    for one in (host, hosts.far[1]):
        assert not our_files(one)


def is_at_rest(cluster):
    """Return whether neither the scheduler nor a worker has anything to do, or to keep."""
    with cluster.client(n_workers=1) as client:
        n_known = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
        return not n_known and not any(client.run(lambda dask_worker: len(dask_worker.state.tasks)).values())


def our_files(host):
    return {path: size for path, size in host.files().items() if "joblib_backends" in str(path)}


def data_files(host):
    return {path: size for path, size in host.files().items() if size > LITTLE}


def keepers_of(host, workers):
    """Return the workers that have the folder of some data open: their store wrote it."""
    folders = tuple(f"{path.parent}/" for path in data_files(host))
    assert folders
    return [worker for worker in workers if any(target.startswith(folders) for target in open_files(worker))]


def open_files(worker):
    descriptors = Path(f"/proc/{worker.pid}/fd")
    for name in os.listdir(descriptors):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(descriptors / name)


# ---- a cluster that changes


def test_a_worker_that_joins_on_a_new_host_gets_data_and_work(make_cluster, hosts, tmp_path):
    cluster = make_cluster({hosts.far[0]: 2, hosts.far[1]: 2})
    data = some_data(7)
    with (
        on_dask(cluster),
        counting(hosts) as traffic,
        striking(has_started_on(tmp_path, 4), lambda: cluster.add_worker(place=hosts.far[2].place)),
        striking(has_started_at(tmp_path, hosts.far[2]), lambda: go(tmp_path)),
    ):
        assert fingerprints(data, tmp_path) == expected(data)
    assert NBYTES <= traffic["far2"].received < 1.5 * NBYTES


def test_a_cut_link_costs_no_result(make_cluster, hosts, tmp_path):
    # The scheduler finds out by heartbeats that do not come.
    environment = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "5s", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s"}
    cluster = make_cluster(dict.fromkeys(hosts.far, 2), environment=environment)
    data = some_data(8)
    cut_off = hosts.far[2]
    (before := tmp_path / "before").mkdir()
    with on_dask(cluster):
        # All hosts have the data then, so all get work at once.
        with while_held(before, 6, lambda: None):
            assert fingerprints(data, before) == expected(data)
        with striking(has_started_at(tmp_path, cut_off), cut_off.link.cut):
            # What runs there never ends.
            assert fingerprints(data, tmp_path, held_on=cut_off.name) == expected(data)
    assert not (tmp_path / "go").exists()


def test_a_link_that_is_cut_for_a_moment_loses_nothing(make_cluster, hosts, tmp_path):
    cluster = make_cluster(dict.fromkeys(hosts.far, 1))
    data = some_data(9)

    with cluster.client() as client:
        there = worker_at(client, hosts.far[2])

    def blow():
        assert can_connect(there)
        hosts.far[2].link.cut()
        assert not can_connect(there)
        hosts.far[2].link.mend()

    with on_dask(cluster), while_held(tmp_path, 3, blow):
        assert fingerprints(data, tmp_path) == expected(data)
    assert len(started(tmp_path)) == N_TASKS, "none ran twice"
    assert all(map(is_alive, cluster.workers))
