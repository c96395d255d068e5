"""A call of thousands of batches on a real scheduler with thirty workers: all of them work, and nothing stays there."""

import threading

import pytest
from clusters import LONG, wait_until
from joblib import Parallel, delayed, parallel_config

distributed = pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

import dask  # noqa: E402
from distributed.diagnostics.plugin import SchedulerPlugin  # noqa: E402

N_WORKERS = 30
N_TASKS = 900

#: As tiers/dask.py says: one that runs and nine on their way, for each job.
MOST_IN_FLIGHT = 10 * N_WORKERS

#: Where the first tasks of all workers meet: those are threads of this process.
MEETING = threading.Barrier(N_WORKERS)


def met(i):
    """Wait, as one of the first, until every worker runs a task; return the worker, and the answer."""
    if i < N_WORKERS:
        MEETING.wait(LONG)
    return distributed.get_worker().address, i * i


class InFlight(SchedulerPlugin):
    """How many tasks that have not ended the scheduler had at most."""

    name = "in-flight"

    def __init__(self):
        self.most = 0
        self._unfinished = set()

    def transition(self, key, start, finish, *args, **kwargs):
        if finish in ("waiting", "queued", "processing", "no-worker"):
            self._unfinished.add(key)
            self.most = max(self.most, len(self._unfinished))
        else:
            self._unfinished.discard(key)


@pytest.fixture
def cluster():
    """Return a cluster in one event loop of this process, which speaks TCP."""
    # What each worker does a hundred times a second for itself; thirty of those in one process would do little else.
    quiet = {"distributed.worker.profile.enabled": False, "distributed.admin.system-monitor.interval": "60s"}
    options = {"processes": False, "protocol": "tcp", "threads_per_worker": 1, "memory_limit": 0}
    with (
        dask.config.set(quiet),
        distributed.LocalCluster(n_workers=N_WORKERS, dashboard_address=":0", **options) as cluster,
    ):
        yield cluster


def connection_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("joblib_backends-dask")]


def test_all_workers_work_and_nothing_is_left_on_the_cluster(cluster):
    scheduler, in_flight = cluster.scheduler, InFlight()
    with distributed.Client(cluster, set_as_default=False) as client:
        client.register_plugin(in_flight)
        in_flight = scheduler.plugins[InFlight.name]
        with parallel_config("hybrid", client=client, tier="dask"):
            found = Parallel(n_jobs=-1, batch_size=1)(delayed(met)(i) for i in range(N_TASKS))
        assert [answer for _, answer in found] == [i * i for i in range(N_TASKS)]
        assert {worker for worker, _ in found} == set(scheduler.workers)
        # More than run at once, or every worker would wait for a round trip after each task.
        assert N_WORKERS < in_flight.most <= MOST_IN_FLIGHT
        wait_until(lambda: not scheduler.tasks)
        wait_until(lambda: not any(worker.data for worker in cluster.workers.values()))
        assert not any(state.wants_what for state in scheduler.clients.values())
    wait_until(lambda: not connection_threads())
