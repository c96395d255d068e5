"""What every test shares: the tiers, a Dask cluster for the session, guards against leaks and hangs."""

import contextlib
import gc
import os
import signal
import threading
import time
from pathlib import Path

import joblib
import psutil
import pytest

import joblib_backends
from joblib_backends.crew import Crew
from joblib_backends.data.store import default_store
from joblib_backends.profile import Profile
from joblib_backends.workers.pool import WorkerPool

#: No test reads or writes the user's own profile, and neither do the scripts that tests start.
os.environ["JOBLIB_BACKEND_PROFILE"] = "off"

TIERS = ["inline", "threads", "processes", "dask", "fake"]

#: Tiers that users have; the fake one is for the contract itself.
REAL_TIERS = ["inline", "threads", "processes", "dask"]

#: Tiers whose workers do not see the parent's objects.
COPYING_TIERS = ["processes", "dask", "fake"]

#: A wait that ends a test that hangs; reaching it means a deadlock.
LONG = 60


def pytest_configure():
    """Have Ctrl-C as in the foreground: a shell starts what runs in the background, and all it starts, without."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def dask_client():
    """Return a client of a cluster of two worker processes with one thread each."""
    distributed = pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(params=TIERS)
def tier(request):
    """Each tier of the table: the same contract holds on all of them."""
    return request.param


@pytest.fixture
def hybrid(tier, request):
    """Return a context manager like ``parallel_backend("hybrid", ...)`` on the test's tier, with two jobs."""
    return make_hybrid(tier, request)


def make_hybrid(tier, request):
    """Return the factory of the fixture ``hybrid`` for one tier."""
    client = request.getfixturevalue("dask_client") if tier == "dask" else None

    def open_backend(n_jobs=2, **options):
        return joblib.parallel_backend("hybrid", n_jobs=n_jobs, tier=tier, client=client, **options)

    return open_backend


@pytest.fixture(autouse=True)
def _works_afterwards(request):
    """Show after each test that broke a pool that the next call has a whole one."""
    yield
    if request.node.get_closest_marker("breaks_pool"):
        with joblib.parallel_backend("hybrid", n_jobs=2, tier="processes"):
            assert joblib.Parallel()(joblib.delayed(abs)(-i) for i in range(8)) == list(range(8))


@pytest.fixture(autouse=True)
def _no_task_goes_on():
    """Wait for tasks that a failed call left running in threads.

    scikit-learn runs each under warning filters of its own, and what it puts back at the end is what it found.
    """
    yield
    assert eventually(lambda: len(own_threads("crew")) <= len(Crew.shared()._roster.idle))


@pytest.fixture(autouse=True)
def _nothing_learned():
    """Let no test decide by what another one's tasks took."""
    Profile._shared = Profile(None)


@pytest.fixture(autouse=True)
def _environment_unchanged():
    before = {name: value for name, value in os.environ.items() if name.startswith("JOBLIB")}
    yield
    assert {name: value for name, value in os.environ.items() if name.startswith("JOBLIB")} == before


def own_threads(kind=""):
    return {t for t in threading.enumerate() if t.name.startswith(f"joblib_backends{kind and '-'}{kind}")}


def own_processes():
    """Return our workers and servers, and joblib's workers; resource trackers stay until the interpreter ends."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(child.cmdline())
            if "loky.backend.popen_loky" in command or "joblib_backends.workers.forking" in command:
                found.append(child)
    return found


def resident_files():
    places = {Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp"))}
    folders = [f for place in places if place.exists() for f in place.glob("joblib_backends-*")]
    mine = {str(path) for resident in default_store().residents for path in [resident.path]}
    return [str(f) for folder in folders for f in folder.glob("0*") if str(f) in mine or _is_mine(folder)]


def _is_mine(folder):
    return any(str(folder) == str(own.path) for own in default_store()._folders.values())


def eventually(condition, seconds=LONG):
    """Return whether ``condition()`` comes true; for what ends by itself, in its own time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        # Each time: a thread that is still on its way out, one of the crew too, may close a cycle after the last.
        gc.collect()
        time.sleep(0.01)
    return True


@pytest.fixture
def leaves_nothing(request):
    """Check that a test leaves no thread, worker, file in shared memory or descriptor behind.

    The pool of workers outlives contexts on purpose: it is closed before and after.
    """
    WorkerPool.close_all()
    # What the process keeps for calls without a context would keep this test's idle threads, too.
    joblib_backends.HybridBackend(nesting_level=0).close()
    gc.collect()
    threads, workers = own_threads(), {p.pid for p in own_processes()}
    files, descriptors = set(resident_files()), psutil.Process().num_fds()
    yield
    WorkerPool.close_all()
    assert eventually(lambda: own_threads() <= threads), own_threads() - threads
    assert eventually(lambda: {p.pid for p in own_processes()} <= workers), own_processes()
    assert eventually(lambda: set(resident_files()) <= files), set(resident_files()) - files
    # loky's and multiprocessing's resource trackers and a store's lock stay open for the process: once each. A Dask
    # client also keeps the connections that it opened meanwhile; the test of 300 calls catches what grows.
    allowed = 16 if "dask_client" in request.fixturenames or "dask" in request.node.name else 6
    assert eventually(lambda: psutil.Process().num_fds() <= descriptors + allowed)


@pytest.fixture(scope="session", autouse=True)
def _session_leaves_nothing():
    """Check the same for the whole suite, when every context is over."""
    yield
    joblib_backends.HybridBackend(nesting_level=0).close()
    WorkerPool.close_all()
    gc.collect()
    assert eventually(lambda: not resident_files()), resident_files()
    assert eventually(lambda: not [t for t in own_threads() if "dask" not in t.name]), own_threads()


# ---- clusters for the tests of ``faults/``


@pytest.fixture(scope="module")
def nursery():
    """Return the process whose children are schedulers and workers."""
    from clusters import Nursery

    with contextlib.closing(Nursery()) as nursery:
        yield nursery


@pytest.fixture
def make_cluster(nursery, tmp_path):
    """Return a function that starts a cluster; all of them are ended after the test."""
    from clusters import Cluster

    with contextlib.ExitStack() as stack:

        def make(n_workers=2, **options):
            cluster = Cluster(nursery, tmp_path, n_workers, **options)
            stack.callback(cluster.close)
            return cluster.ready() if n_workers else cluster

        yield make
