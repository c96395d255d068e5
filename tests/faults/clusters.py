"""Dask clusters of real processes, started in a moment, and the tasks that run on them.

::

    test ──a line of JSON──> nursery (this file as a script; has distributed imported) ──fork──> scheduler, workers

Each child runs the very command ``dask scheduler`` or ``dask worker``, in a session of its own, without the second that
a fresh interpreter takes to import it. Workers import the tasks from here, so nothing here needs pytest.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from joblib import Parallel, delayed
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: A wait that ends a test that hangs; reaching it means a deadlock.
LONG = 60.0

#: mount(2), unshare(2) and prctl(2).
_MS_BIND, _MS_REC, _MS_PRIVATE, _CLONE_NEWNS, _PR_SET_PDEATHSIG = 0x1000, 0x4000, 1 << 18, 0x20000, 1


# ---- tasks: each leaves a file when it starts


def started(folder):
    """Return the names of the tasks that have started, one for each time."""
    return sorted(path.name.partition("@")[0] for path in Path(folder).glob("*@*"))


def pids(folder):
    """Return the processes in which tasks have started."""
    return {int(path.name.partition("@")[2].partition("-")[0]) for path in Path(folder).glob("*@*")}


def start(folder, name):
    (Path(folder) / f"{name}@{os.getpid()}-{uuid.uuid4().hex[:8]}").touch()


def square(i, folder, seconds=0.01):
    start(folder, i)
    time.sleep(seconds)
    return i * i


def squares(indices, folder):
    """Make a call of its own."""
    return Parallel(n_jobs=2)(delayed(square)(i, folder) for i in indices)


def hold(i, folder):
    """Start, and end when the test has made the file "go"."""
    start(folder, i)
    wait_until((Path(folder) / "go").exists)
    return i * i


def hold_first(i, n_held, folder):
    return hold(i, folder) if i < n_held else square(i, folder, 0.0)


def poison(i, bad, folder, driver):
    """End the process of a worker, at the task ``bad``."""
    start(folder, i)
    if i == bad:
        die_unless_in(driver)
    return i * i


def die_unless_in(driver):
    """SIGKILL this process, but never the one that runs the tests."""
    assert os.getpid() != driver, "the poison task came to the calling process"
    os.kill(os.getpid(), signal.SIGKILL)


def total(X, i, folder):  # noqa: N803
    start(folder, i)
    wait_until((Path(folder) / "go").exists)
    return float(X.sum()) + i


def endless_at(i, bad, folder, seconds=LONG):
    start(folder, i)
    if i == bad:
        time.sleep(seconds)
    return i * i


class Step(ClassifierMixin, BaseEstimator):
    """A classifier whose fits leave a file, and at one value of ``c`` kill the worker, or never end."""

    def __init__(self, c=0, folder=None, kills=None, stays=None, driver=None, seconds=0.01):
        self.c = c
        self.folder = folder
        self.kills = kills
        self.stays = stays
        self.driver = driver
        self.seconds = seconds

    def fit(self, X, y):  # noqa: N803
        if self.folder is not None:
            start(self.folder, f"c={self.c}")
        if self.c == self.kills:
            die_unless_in(self.driver)
        time.sleep(LONG if self.c == self.stays else self.seconds)
        self.classes_ = np.unique(y)
        self.mean_ = float(X.mean())
        return self

    def predict(self, X):  # noqa: N803
        return (X[:, 0] * (self.c + 1) > self.mean_).astype(int)


def endless_before(i, n_endless, folder, seconds=LONG):
    start(folder, i)
    if i < n_endless:
        time.sleep(seconds)
    return i * i


def key_of_this_task(i):
    """Return what Dask calls the task that runs this."""
    import distributed

    return str(distributed.get_worker().get_current_task())


class KeyKeeper(ClassifierMixin, BaseEstimator):
    """Writes down the key of the Dask task in which it is fitted."""

    def __init__(self, c=0, folder=None):
        self.c = c
        self.folder = folder

    def fit(self, X, y):  # noqa: N803
        (Path(self.folder) / f"{uuid.uuid4().hex}.key").write_text(key_of_this_task(0))
        return self

    def score(self, X, y):  # noqa: N803
        return 0.0


class Centred(TransformerMixin, BaseEstimator):
    """A transformer that is slow enough for its fits to be shared."""

    def fit(self, X, y=None):  # noqa: N803
        time.sleep(0.1)
        self.mean_ = X.mean(axis=0)
        return self

    def transform(self, X):  # noqa: N803
        return X - self.mean_


# ---- waiting


def eventually(condition, seconds=LONG):
    """Return whether ``condition()`` comes true; for what ends by itself, in its own time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def wait_until(condition, seconds=LONG):
    assert eventually(condition, seconds), "this did not happen in time"


@contextlib.contextmanager
def striking(condition, blow, delay_s=0.0):
    """Call ``blow()`` from another thread as soon as ``condition()`` is true; it must have come to that at the end."""
    problems = []
    over = threading.Event()

    def wait_and_strike():
        try:
            wait_until(lambda: condition() or over.is_set())
            if condition():
                time.sleep(delay_s)
                blow()
            else:
                problems.append(AssertionError("the block was over before it was struck"))
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=wait_and_strike, name="striking")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LONG)
    assert not problems, problems


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- processes


class Nursery:
    """The process whose children are schedulers and workers."""

    def __init__(self):
        environment = {name: text for name, text in os.environ.items() if not name.startswith(("JOBLIB", "DASK"))}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT))), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()

    def fork(self, command, *arguments, log, environment=None, private_shm=False, hidden=(), holder=None):
        """Start ``dask COMMAND ARGUMENTS``, in the namespaces of the process ``holder``, and return its process."""
        order = {
            "command": command,
            "arguments": [str(argument) for argument in arguments],
            "log": str(log),
            "environment": environment or {},
            "private_shm": private_shm,
            "hidden": [str(folder) for folder in hidden],
            "holder": holder,
        }
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return psutil.Process(int(self._process.stdout.readline()))

    def close(self):
        self._process.stdin.close()
        self._process.wait(LONG)
        self._process.stdout.close()


class Place(NamedTuple):
    """Where processes of a cluster run: here, or on one of the hosts of ``hosts.py``."""

    #: Where they listen.
    address: str = "127.0.0.1"
    #: The number of a process whose namespaces they enter.
    holder: int | None = None
    #: For what the workers of a host write; None is the cluster's own folder.
    scratch: Path | None = None


class Cluster:
    """A scheduler and its workers.

    Parameters
    ----------
    nursery : Nursery
        Where they come from.
    folder : path
        For what they write.
    n_workers : int
        Workers to start with.
    port : int
        Of the scheduler; 0 takes any.
    protocol : str
        How the scheduler listens.
    place : Place
        Where the scheduler runs, and workers for which no other place is given.
    options : tuple
        More arguments for all of them.
    environment : dict
        More variables for all of them.
    security : distributed.Security, optional
        Of the test's own clients.
    **settings
        Of the workers: see :meth:`add_worker`.
    """

    def __init__(
        self,
        nursery,
        folder,
        n_workers=2,
        *,
        port=0,
        protocol="tcp",
        place=Place(),  # noqa: B008 - it never changes
        options=(),
        environment=None,
        security=None,
        **settings,
    ):
        self._nursery = nursery
        self._folder = Path(folder) / f"cluster-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir(parents=True)
        self._place = place
        self._options = options
        self._security = security
        self._environment = environment
        self._settings = settings
        self._has_ended = False
        self.workers = []
        self._places = []
        description = self._folder / "scheduler.json"
        self.scheduler = self._fork(
            *("scheduler", place),
            *("--protocol", protocol, "--port", port, "--no-show", "--scheduler-file", description),
        )
        wait_until(lambda: _is_whole(description) or not is_alive(self.scheduler))
        assert is_alive(self.scheduler), self.log()
        self.address = json.loads(description.read_text())["address"]
        self.scheduler_file = description
        for _ in range(n_workers):
            self.add_worker(**settings)

    def _fork(self, command, place, *arguments, **options):
        options |= {"log": self._folder / f"{command}-{len(self.workers)}.log", "environment": self._environment}
        common = ("--host", place.address, "--no-dashboard", *self._options)
        return self._nursery.fork(command, *arguments, *common, holder=place.holder, **options)

    def log(self):
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("*.log")))

    def add_worker(
        self,
        *,
        place=None,
        nanny=False,
        private_shm=False,
        hidden=(),
        nthreads=1,
        name=None,
        resources=None,
        memory_limit=0,
    ):
        """Start a worker, of one thread if nothing else is said; return its process, or that of its nanny.

        It may have a ``/dev/shm`` of its own, and empty folders in the place of some.
        """
        number = len(self.workers)
        place = place or self._place
        worker = self._fork(
            *("worker", place, self.address),
            *("--name", number if name is None else name, "--nthreads", nthreads, "--memory-limit", memory_limit),
            *(("--resources", resources) if resources else ()),
            *("--local-directory", (place.scratch or self._folder) / f"worker-{number}"),
            "--nanny" if nanny else "--no-nanny",
            private_shm=private_shm,
            hidden=hidden,
        )
        self.workers.append(worker)
        self._places.append(place)
        return worker

    def workers_at(self, place):
        """Return the workers that were started at a place."""
        return [worker for worker, its_place in zip(self.workers, self._places, strict=True) if its_place == place]

    @contextlib.contextmanager
    def client(self, n_workers=None):
        """Return a client of the test's own, when so many workers are there."""
        import distributed

        options = {} if self._security is None else {"security": self._security}
        with distributed.Client(self.address, set_as_default=False, timeout=LONG, **options) as client:
            n_workers = len(self.workers) if n_workers is None else n_workers
            if n_workers:
                client.wait_for_workers(n_workers, timeout=LONG)
            yield client

    def ready(self, n_workers=None):
        """Wait for the workers, and return the cluster."""
        with self.client(n_workers):
            return self

    def worker_pids(self):
        """Return the numbers of the processes that run tasks."""
        with self.client(n_workers=0) as client:
            return sorted(client.run(os.getpid).values())

    def kill_scheduler(self):
        kill(self.scheduler)

    def kill_workers(self):
        for worker in self.workers:
            kill(worker)

    def close(self):
        """End all that is left."""
        for process in [self.scheduler, *self.workers]:
            for one in [*_children(process), process]:
                with contextlib.suppress(psutil.Error):
                    one.kill()


def tasks_known_to(dask_scheduler):
    """Return the keys of a scheduler's tasks; runs there."""
    return [str(key) for key in dask_scheduler.tasks]


def _children(process):
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def is_alive(process):
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def kill(process):
    """SIGKILL a process, and wait until it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    wait_until(lambda: not is_alive(process))


def _is_whole(description):
    try:
        return bool(json.loads(description.read_text()))
    except (OSError, ValueError):
        return False


def moments(n, most, seed):
    """Return ``n`` pairs (tasks that have started by then, seconds after that), always the same for a seed."""
    draw = random.Random(seed)
    return [(draw.randint(1, most), draw.random() * 0.01) for _ in range(n)]


# ---- the nursery's own process


def _main():
    import distributed.cli.dask_scheduler
    import distributed.cli.dask_worker
    import distributed.http.scheduler.info
    import hosts
    import sklearn.model_selection  # noqa: F401

    import joblib_backends.cluster.exchange
    import joblib_backends.remote  # noqa: F401

    # The modules were imported as this script's; tasks arrive under their own name.
    scheduler, worker = distributed.cli.dask_scheduler.main, distributed.cli.dask_worker.main
    mains = {
        "scheduler": functools.partial(scheduler, standalone_mode=False),
        "worker": functools.partial(worker, standalone_mode=False),
        "host": hosts.hold,
    }
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _be_born(json.loads(line), mains)
        print(pid, flush=True)


def _be_born(order, mains):
    status = 1
    try:
        os.setsid()
        # It ends with the nursery, which ends with the tests, even if those are killed.
        system("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        for fd, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(fd, target)
        os.environ |= order["environment"]
        if order["holder"]:
            enter(order["holder"])
        if order["private_shm"] or order["hidden"]:
            hide(*(["/dev/shm"] if order["private_shm"] else []), *order["hidden"])
        import dask.config

        dask.config.refresh()
        sys.argv = [f"dask {order['command']}", *order["arguments"]]
        mains[order["command"]](order["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        # As an interpreter that ends does: a worker that ends in peace leaves no file.
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def system(call, *arguments):
    """Make a call of the C library's, or raise the OSError that it says."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, call)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def hide(*folders, size="64m", seen=()):
    """Give this process an empty folder in memory in the place of each one, and what is ``seen`` where it was."""
    system("unshare", _CLONE_NEWNS)
    system("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    # Those that will be hidden are held open, among the mounts of this process: what is not there can be no source.
    held = {path: os.open(path, os.O_PATH) for path in map(str, seen)}
    for folder in folders:
        system("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size},mode=1777".encode())
    for path, fd in held.items():
        if not os.path.exists(path):
            os.makedirs(path)
            bind(f"/proc/self/fd/{fd}", path)
        os.close(fd)


def bind(source, target):
    """Have a file or folder seen at a second path, by this process alone."""
    system("mount", os.fsencode(source), os.fsencode(target), None, _MS_BIND, None)


def enter(holder):
    """Have this process live in the namespaces of another one."""
    with contextlib.ExitStack() as files:
        # All are opened first: among the mounts of another host, these paths may mean something else.
        namespaces = [files.enter_context(open(f"/proc/{holder}/ns/{name}")) for name in ("uts", "net", "mnt")]
        for namespace in namespaces:
            system("setns", namespace.fileno(), 0)
    # The mounts came with a root of their own.
    os.chdir(ROOT)


if __name__ == "__main__":
    _main()
