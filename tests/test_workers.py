"""Worker processes of our own: how they start, what they do, and that nothing of them is lost or left."""

import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import LONG, eventually, own_processes

from joblib_backends.errors import RemoteTraceback, WorkerLostError
from joblib_backends.workers import preload
from joblib_backends.workers.calls import CallQueue
from joblib_backends.workers.frames import FrameReader, pack
from joblib_backends.workers.pool import WorkerPool
from joblib_backends.workers.process import ForkedWorker, SpawnedWorker
from joblib_backends.workers.server import ForkServer


@pytest.fixture(scope="module", autouse=True)
def _alone():
    WorkerPool.close_all()
    yield
    WorkerPool.close_all()


@pytest.fixture
def pool():
    return WorkerPool.get(b"", 300.0)


@pytest.fixture
def call(pool):
    call = pool.join(2)
    yield call
    call.leave()


@pytest.fixture
def spawned(monkeypatch):
    """Have no server: workers are fresh interpreters, as where there is no fork."""
    WorkerPool.close_all()
    monkeypatch.setattr(ForkServer, "enabled", False)
    yield
    WorkerPool.close_all()


# ---- tasks


def pid():
    return os.getpid()


def identity(value):
    return value


def hold(folder, name):
    """Say that the task has started and wait for its "go"."""
    Path(folder, f"started-{name}").touch()
    end = time.monotonic() + LONG
    while not Path(folder, "go").exists():
        assert time.monotonic() < end
        time.sleep(0.002)
    return name


def end_process(how):
    os._exit(7) if how == "exit" else os.kill(os.getpid(), getattr(signal, how))


def end_if_first(path, how):
    """End the process the first time only."""
    if not os.path.exists(path):
        Path(path).touch()
        end_process(how)
    return "second"


def raises(error):
    raise error


def count_threads():
    return len(os.listdir("/proc/self/task"))


def blas_threads():
    import threadpoolctl

    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


def random_number():
    return np.random.rand()


def main_is_clean():
    return not hasattr(sys.modules["__main__"], "Path")


def started(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("started-"))


def results(futures):
    return [future.result(LONG) for future in futures]


# ---- what a server imports


def test_installed_modules_of_the_packages_are_preloaded_in_order():
    names = preload.modules_to_preload(frozenset({"psutil"}))
    assert names[:2] == ["joblib_backends.workers.main", "joblib_backends.worker"]
    assert {"psutil", "numpy", "joblib", "cloudpickle", "threadpoolctl"} <= set(names)
    assert "pytest" not in names


def test_the_users_own_modules_are_never_preloaded():
    own = {__name__, "conftest", "__main__"}
    assert not own & set(preload.modules_to_preload(frozenset(own)))


@pytest.mark.parametrize("stand_in", [None, types.SimpleNamespace(), 3, types.ModuleType("no_spec")])
def test_a_stand_in_for_a_module_is_not_preloaded(stand_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "stand_in", stand_in)
    assert "stand_in" not in preload.modules_to_preload(frozenset({"stand_in"}))


def test_the_search_path_of_a_server_has_no_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = preload.search_path()
    assert str(tmp_path) not in path
    assert "" not in path
    assert os.path.dirname(os.path.dirname(np.__file__)) in path


def uses_psutil(_):
    return psutil.Process()


def test_packages_are_found_in_functions_arguments_and_what_they_hold():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(LogisticRegression())
    assert preload.packages_of([(abs, (np.ones(3),), {})]) == {"numpy"}
    assert "sklearn" in preload.packages_of([(identity, (pipeline,), {})])
    assert "psutil" in preload.packages_of([(uses_psutil, (1,), {})])
    assert "psutil" in preload.packages_of([(functools.partial(uses_psutil, 1), (), {})])
    own = type("Own", (LogisticRegression,), {"__module__": "__main__"})
    assert "sklearn" in preload.packages_of([(identity, (own(),), {})])


def test_what_a_module_of_the_users_imports_is_needed_by_its_functions(tmp_path, monkeypatch):
    """A worker imports the module whole, with the user's modules that it imports, whatever of it the function uses."""
    (tmp_path / "own_outer.py").write_text("import own_inner\n\ndef task():\n    pass\n")
    (tmp_path / "own_inner.py").write_text("from tqdm import tqdm\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_outer

    try:
        assert "tqdm" in preload.packages_of([(own_outer.task, (), {})])
    finally:
        del sys.modules["own_outer"], sys.modules["own_inner"]


class Hostile:
    def __getattr__(self, name):
        raise RuntimeError(name)

    @property
    def __dict__(self):
        raise RuntimeError


def test_the_search_for_packages_never_raises_and_ends():
    endless = []
    endless.append(endless)
    assert isinstance(preload.packages_of([(abs, (Hostile(), endless), {})]), frozenset)
    assert preload.packages_of(None) == frozenset()
    many = [object() for _ in range(100_000)]
    begin = time.thread_time()
    preload.packages_of([(abs, (many,), {})])
    assert time.thread_time() - begin < 0.5


# ---- frames


def test_frames_are_put_together_however_they_come():
    import socket

    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.setblocking(False)
        reader, sent, got = FrameReader(), [(b"R", os.urandom(n)) for n in (0, 1, 100, 70_000, 3)], []
        stream = b"".join(piece for kind, body in sent for piece in pack(kind, body))
        for at in range(0, len(stream), 997):
            mine.sendall(stream[at : at + 997])
            received, is_over = reader.read(theirs)
            got += received
            assert not is_over
        assert [(kind, bytes(body)) for kind, body in got] == sent
        mine.close()
        assert reader.read(theirs) == ([], True)


# ---- start


@pytest.mark.skipif(not ForkServer.enabled, reason="no server here")
def test_workers_are_forks_of_one_server_that_has_one_thread(call, pool):
    assert results(call.submit(count_threads) for _ in range(4)) == [1] * 4
    members = pool._roster.members
    assert {type(member.process) for member in members} == {ForkedWorker}
    (server,) = {member.process.server.pid for member in members}
    assert len(os.listdir(f"/proc/{server}/task")) == 1


def test_a_warm_up_returns_at_once_and_workers_come(pool):
    WorkerPool.close_all()
    pool.warm_up(2, frozenset({"numpy"}))
    assert pool.n_workers == 2
    assert eventually(lambda: pool.n_ready == 2, LONG)
    assert 0 < pool.startup_seconds < LONG


def test_workers_have_random_numbers_of_their_own(tmp_path, pool):
    np.random.seed(0)
    call = pool.join(2)
    futures = [call.submit(hold, str(tmp_path), i) for i in range(2)]
    assert eventually(lambda: len(started(tmp_path)) == 2, LONG)
    Path(tmp_path, "go").touch()
    results(futures)
    numbers = results(call.submit(random_number) for _ in range(20))
    assert len(set(numbers)) == 20
    call.leave()


@pytest.mark.parametrize("way", ["forked", "spawned"])
def test_workers_follow_the_environment_and_the_folder(way, request, tmp_path, monkeypatch):
    if way == "spawned":
        request.getfixturevalue("spawned")
    pool = WorkerPool.get(b"", 300.0)
    for value in ("one", "two"):
        monkeypatch.setenv("A_VARIABLE", value)
        monkeypatch.chdir(tmp_path if value == "two" else "/")
        call = pool.join(2)
        assert call.submit(os.getenv, "A_VARIABLE").result(LONG) == value
        assert call.submit(os.getcwd).result(LONG) == os.getcwd()
        call.leave()
    monkeypatch.delenv("A_VARIABLE")
    call = pool.join(2)
    assert call.submit(os.getenv, "A_VARIABLE").result(LONG) is None
    assert call.submit(os.getenv, "JE_ARROW_MALLOC_CONF").result(LONG) is None
    call.leave()


def test_the_server_waits_for_what_the_last_worker_died_over(pool):
    """To start another takes many times as long as to fork a worker."""
    call = pool.join(1)
    assert call.submit(abs, -1).result(LONG) == 1
    server = ForkServer._current.pid
    with pytest.raises(WorkerLostError):
        call.submit(end_process, "SIGKILL").result(LONG)
    assert call.submit(abs, -2).result(LONG) == 2
    assert ForkServer._current.pid == server
    with pytest.raises(WorkerLostError):
        call.submit(end_process, "SIGKILL").result(LONG)
    call.leave()
    assert eventually(lambda: ForkServer._current is None, LONG), "it waits for ever"


def test_the_users_number_of_threads_holds_in_a_fork(monkeypatch):
    WorkerPool.close_all()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    call = WorkerPool.get(b"", 300.0).join(1)
    assert call.submit(blas_threads).result(LONG) == {3}
    assert call.submit(os.getenv, "OPENBLAS_NUM_THREADS").result(LONG) == "3"
    assert call.submit(os.getenv, "OMP_NUM_THREADS").result(LONG) == os.environ.get("OMP_NUM_THREADS")
    call.leave()
    WorkerPool.close_all()


def test_without_a_server_workers_are_fresh_interpreters(spawned, pool):
    call = pool.join(2)
    assert len(set(results(call.submit(pid) for _ in range(4)))) >= 1
    assert {type(member.process) for member in pool._roster.members} == {SpawnedWorker}
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        call.submit(end_process, "SIGKILL").result(LONG)
    assert call.submit(abs, -3).result(LONG) == 3
    call.leave()


def test_a_server_with_threads_is_not_used(monkeypatch, pool):
    """The module that starts a thread is left to the workers; the server without it forks."""
    WorkerPool.close_all()
    import joblib_backends.workers.server as server

    real = server.modules_to_preload
    folder = Path(__file__).parent / "servers"
    folder.mkdir(exist_ok=True)
    source = folder / "threaded_module.py"
    source.write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n")
    monkeypatch.setattr(server, "search_path", lambda: [*preload.search_path(), str(folder)])
    monkeypatch.setattr(
        server, "modules_to_preload", lambda packages: [*real(packages), *({"threaded_module"} & packages)]
    )
    monkeypatch.setattr(pool._starter, "packages", frozenset({"threaded_module"}))
    try:
        call = pool.join(2)
        assert call.submit(count_threads).result(LONG) == 1
        assert ForkServer._unsafe == {"threaded_module"}
        assert ForkServer.enabled
        call.leave()
    finally:
        shutil.rmtree(folder)
        ForkServer._unsafe = frozenset()
        WorkerPool.close_all()


SCRIPT = """
    import os, sys
    from joblib import Parallel, delayed, parallel_backend
    import joblib_backends
    parent = os.getpid()
    print("main", flush=True)
    def task(i):
        return i, os.getpid() != parent
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        print(Parallel()(delayed(task)(i) for i in range(3)), flush=True)
"""


@pytest.mark.parametrize("form", ["file", "stdin", "-c"])
def test_a_script_needs_no_guard_and_runs_once(form, tmp_path):
    source = textwrap.dedent(SCRIPT)
    path = tmp_path / "script.py"
    path.write_text(source)
    arguments = {"file": [str(path)], "stdin": ["-"], "-c": ["-c", source]}[form]
    done = subprocess.run(
        [sys.executable, *arguments], input=source if form == "stdin" else None,
        capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("main\n[(0, True), (1, True), (2, True)]\n", "", 0)


# ---- results and errors


def test_large_results_and_arguments_travel(call):
    big = call.submit(bytes, 200_000_000)
    assert call.submit(len, bytes(60_000_000)).result(LONG) == 60_000_000
    assert len(big.result(LONG)) == 200_000_000


def test_what_cannot_be_pickled_fails_only_its_future(call):
    with pytest.raises((TypeError, pickle.PicklingError)):
        call.submit(identity, threading.Lock()).result(LONG)
    with pytest.raises(TypeError, match="pickle"):
        call.submit(threading.Lock).result(LONG)
    assert call.submit(abs, -1).result(LONG) == 1


def test_an_exception_comes_with_the_traceback_of_the_worker(call):
    with pytest.raises(KeyError) as caught:
        call.submit(raises, KeyError("lost")).result(LONG)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in raises" in str(caught.value.__cause__)


# ---- lost workers


@pytest.mark.parametrize(("how", "words"), [("exit", "exit code 7"), ("SIGKILL", "SIGKILL"), ("SIGSEGV", "SIGSEGV")])
def test_a_worker_that_dies_fails_its_batch_by_name_and_no_other(how, words, call, tmp_path):
    other = call.submit(hold, str(tmp_path), "other")
    assert eventually(lambda: started(tmp_path), LONG)
    with pytest.raises(WorkerLostError, match=rf"a batch of end_process: .*{words}"):
        call.submit(end_process, how).result(LONG)
    Path(tmp_path, "go").touch()
    assert other.result(LONG) == "other"
    assert results(call.submit(pid) for _ in range(4))


def test_a_prefetched_batch_that_never_started_runs_elsewhere(pool, tmp_path):
    call = pool.join(1)
    results(call.submit(abs, -1) for _ in range(5))
    call.queue._mean_s = 0.0  # so short that the next one is sent ahead, however busy the machine was
    first = call.submit(hold, str(tmp_path), "first")
    second = call.submit(identity, "second")
    assert eventually(lambda: started(tmp_path) and pool._roster.members[0].prefetched is not None, LONG)
    os.kill(pool._roster.members[0].process.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="of hold"):
        first.result(LONG)
    assert second.result(LONG) == "second"
    call.leave()


def test_a_batch_sent_to_a_worker_that_is_dead_already_is_not_lost(pool):
    call = pool.join(2)
    for _ in range(5):
        results(call.submit(abs, -1) for _ in range(4))
        for member in list(pool._roster.members):
            os.kill(member.process.pid, signal.SIGKILL)
        assert results(call.submit(identity, i) for i in range(6)) == list(range(6))
    call.leave()


def test_workers_that_end_before_they_are_ready_fail_what_waits(spawned, pool, monkeypatch):
    monkeypatch.setattr("joblib_backends.workers.process.run_spawned_worker", os.abort)
    call = pool.join(2)
    for _ in range(2):
        with pytest.raises(WorkerLostError, match="ended before they could take a batch"):
            call.submit(abs, -1).result(LONG)
    call.leave()


def test_forks_that_end_before_they_are_ready_are_replaced_by_fresh_interpreters(pool, monkeypatch):
    WorkerPool.close_all()
    real = ForkedWorker._start

    def start_and_kill(self, theirs):
        real(self, theirs)
        self.kill()

    monkeypatch.setattr(ForkedWorker, "_start", start_and_kill)
    call = pool.join(2)
    assert call.submit(abs, -1).result(LONG) == 1
    assert {member.process.way for member in pool._roster.members if member.is_ready} == {"spawned"}
    call.leave()
    WorkerPool.close_all()


def test_a_pool_whose_workers_cannot_be_started_says_so(pool, monkeypatch):
    WorkerPool.close_all()
    monkeypatch.setattr("joblib_backends.workers.starter.start_worker", lambda *_, **__: raises(OSError("no memory")))
    call = pool.join(2)
    with pytest.raises(WorkerLostError, match="no memory"):
        call.submit(abs, -1).result(LONG)
    monkeypatch.undo()
    assert call.submit(abs, -1).result(LONG) == 1
    call.leave()


# ---- calls


@pytest.mark.parametrize("n_jobs", [1, 2, 3])
def test_no_more_batches_of_a_call_run_than_its_jobs(n_jobs, pool, tmp_path):
    """A second call has more jobs, so there are workers to spare."""
    folders = [tmp_path / "mine", tmp_path / "other"]
    mine, other = pool.join(n_jobs), pool.join(4)
    for folder, call in zip(folders, (mine, other), strict=True):
        folder.mkdir()
        results(call.submit(abs, -1) for _ in range(8))  # short: prefetching is on
    held = [mine.submit(hold, str(folders[0]), i) for i in range(6)]
    theirs = [other.submit(hold, str(folders[1]), i) for i in range(6)]
    assert eventually(lambda: len(started(folders[0])) == n_jobs and len(started(folders[1])) == 4 - n_jobs, LONG)
    assert mine.queue.n_running == n_jobs
    for folder in folders:
        Path(folder, "go").touch()
    assert results(held) == results(theirs) == list(range(6))
    mine.leave()
    other.leave()


def test_calls_are_served_in_turn(pool, tmp_path):
    # One worker, which the two calls share: a second would still be importing.
    WorkerPool.close_all()
    calls = [pool.join(1), pool.join(1)]
    order = []
    futures = [calls[0].submit(hold, str(tmp_path), 0)]
    assert eventually(lambda: started(tmp_path), LONG)
    for i in range(1, 7):
        futures.append(calls[i > 3].submit(identity, i))
        futures[-1].add_done_callback(lambda future: order.append(future.result()))
    time.sleep(0.05)  # long, or the call's next batches were sent ahead of the other's
    Path(tmp_path, "go").touch()
    results(futures)
    assert eventually(lambda: len(order) == 6)
    assert order.index(4) < order.index(3)
    for call in calls:
        call.leave()


def test_short_batches_are_sent_ahead_and_long_ones_are_not():
    queue = CallQueue(2)
    queue.waiting.append(None)
    queue.n_running = 2
    assert not queue.may_prefetch
    queue.note(0.001)
    assert queue.may_prefetch
    for _ in range(3):
        queue.note(0.05)
    assert not queue.may_prefetch


def test_an_abort_kills_the_workers_of_its_call_only(pool, tmp_path):
    mine, other = pool.join(1), pool.join(2)
    first = mine.submit(hold, str(tmp_path), "mine")
    waiting = mine.submit(hold, str(tmp_path), "waiting")
    second = other.submit(hold, str(tmp_path), "other")
    assert eventually(lambda: len(started(tmp_path)) == 2, LONG)
    members = {member.running.name: member for member in pool._roster.members if member.running is not None}
    pids = {m.running.queue is mine.queue: m.process.pid for m in pool._roster.members if m.running is not None}
    assert members
    mine.abort()
    mine.abort()
    with pytest.raises(CancelledError):
        first.result(LONG)
    assert waiting.cancelled()
    assert eventually(lambda: not psutil.pid_exists(pids[True]))
    Path(tmp_path, "go").touch()
    assert second.result(LONG) == "other"
    assert psutil.pid_exists(pids[False])
    late = mine.submit(abs, -1)
    assert late.cancelled()
    other.leave()


def test_an_abort_inside_of_the_pools_lock_does_not_wait(pool, call):
    """As from the garbage collector, which may run anywhere."""
    other = pool.join(1)
    waiting = other.submit(time.sleep, 0)
    with pool._held():
        other.abort()
        assert other.queue.is_over
    assert waiting.done() or waiting.cancelled() or not waiting.running()
    assert other.queue not in pool._roster.calls
    assert call.submit(abs, -1).result(LONG) == 1


def test_a_pool_grows_and_keeps_the_workers_that_it_has(pool, tmp_path):
    WorkerPool.close_all()
    small = pool.join(1)
    first = small.submit(pid).result(LONG)
    small.leave()
    large = pool.join(3)
    held = [large.submit(hold, str(tmp_path), i) for i in range(3)]
    assert eventually(lambda: len(started(tmp_path)) == 3, LONG)
    assert first in {member.process.pid for member in pool._roster.members}
    Path(tmp_path, "go").touch()
    results(held)
    large.leave()


def test_idle_workers_end_and_the_server_with_the_last():
    WorkerPool.close_all()
    before = len(own_processes())
    pool = WorkerPool.get(b"", 0.3)
    call = pool.join(2)
    assert results(call.submit(pid) for _ in range(4))
    assert eventually(lambda: len(own_processes()) <= before, LONG)
    assert eventually(lambda: pool._collector is None, LONG)
    assert call.submit(abs, -1).result(LONG) == 1
    call.leave()
    WorkerPool.get(b"", 300.0)
    WorkerPool.close_all()


def test_idle_pools_of_other_initializers_end():
    for key in (b"one", b"two", b"three"):
        call = WorkerPool.get(key, 300.0).join(1)
        assert call.submit(abs, -1).result(LONG) == 1
        call.leave()
    assert eventually(lambda: sum(pool.n_workers for key, pool in WorkerPool._pools.items() if key) == 1)
    assert set(WorkerPool._pools) - {b""} == {b"three"}


def forks():
    """Return the servers and forked workers, without joblib's own workers of other tests."""
    return [process for process in own_processes() if "joblib_backends.workers" in " ".join(process.cmdline())]


def test_a_closed_pool_fails_what_runs_and_works_again(pool, tmp_path):
    call = pool.join(2)
    held = call.submit(hold, str(tmp_path), 0)
    assert eventually(lambda: started(tmp_path), LONG)
    WorkerPool.close_all()
    with pytest.raises(WorkerLostError, match="was closed"):
        held.result(LONG)
    assert not forks()
    assert call.submit(abs, -1).result(LONG) == 1
    call.leave()


def test_many_threads_submit_to_one_pool(pool):
    answers = []

    def use(k):
        call = pool.join(2)
        answers.append(sum(results(call.submit(identity, k + i) for i in range(200))) == sum(range(k, k + 200)))
        call.leave()

    threads = [threading.Thread(target=use, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert answers == [True] * 6


# ---- around us


PARENT = """
    import os, sys, time
    from joblib_backends.workers.pool import WorkerPool
    from joblib_backends.workers.server import ForkServer
    from test_workers import hold, pid, results, started
    folder = sys.argv[1]
    pool = WorkerPool.get(b"", 300.0)
    call = pool.join(2)
    futures = [call.submit(hold, folder, i) for i in range(2)]
    while len(started(folder)) < 2:
        time.sleep(0.01)
    print(*[m.process.pid for m in pool._roster.members], ForkServer._current.pid, flush=True)
    {then}
"""


def run_parent(tmp_path, then):
    code = textwrap.dedent(PARENT).replace("{then}", then)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip


def test_busy_workers_and_their_server_end_with_a_parent_that_is_killed(tmp_path):
    parent = run_parent(tmp_path, "time.sleep(60)")
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 3
    parent.kill()
    parent.communicate(timeout=LONG)
    assert eventually(lambda: not any(map(psutil.pid_exists, pids)))


def test_workers_end_with_the_interpreter_quickly_and_quietly(tmp_path):
    parent = run_parent(tmp_path, "begin = time.perf_counter()")
    pids = list(map(int, parent.stdout.readline().split()))
    out, err = parent.communicate(timeout=LONG)
    assert (parent.returncode, out, err) == (0, "", "")
    assert not any(map(psutil.pid_exists, pids))


def test_an_interpreter_that_ends_while_workers_start_does_not_wait_for_them(tmp_path):
    code = """
        import sklearn.ensemble, sys, threading, time
        from joblib_backends.workers.pool import WorkerPool
        from joblib_backends.workers.server import ForkServer
        pool = WorkerPool.get(b"", 300.0)
        pool.warm_up(2, frozenset({"sklearn"}))
        while ForkServer._current is None:
            time.sleep(0.001)
        begin = time.perf_counter()
        WorkerPool.close_all()
        print(ForkServer._current, pool.n_workers, ForkServer.enabled, ForkServer._unsafe == set())
        print("late" if time.perf_counter() - begin > 5 else "soon")
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=LONG, check=False)
    assert (done.stdout, done.stderr) == ("None 0 True True\nsoon\n", "")


def test_a_task_that_forks_answers_once(call):
    assert call.submit(os.fork).result(LONG) > 0
    assert results(call.submit(abs, -i) for i in range(6)) == list(range(6))


def test_a_forked_child_has_workers_of_its_own_and_leaves_the_parents_alone(tmp_path):
    then = """
child = os.fork()
if child == 0:
    os.environ["CHILD"] = "yes"
    theirs = WorkerPool.get(b"", 300.0)
    assert theirs.n_workers == 0
    call = theirs.join(2)
    print(call.submit(os.getenv, "CHILD").result(50), flush=True)
    WorkerPool.close_all()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
open(folder + "/go", "w").close()
print(results(futures), flush=True)
print(call.submit(os.getenv, "CHILD").result(50), flush=True)
"""
    parent = run_parent(tmp_path, then)
    out, err = parent.communicate(timeout=LONG)
    assert out.splitlines()[1:] == ["yes", "[0, 1]", "None"], err


def test_a_server_that_is_killed_is_replaced_and_its_workers_go_on(tmp_path, pool):
    WorkerPool.close_all()
    call = pool.join(2)
    held = call.submit(hold, str(tmp_path), "held")
    assert eventually(lambda: started(tmp_path), LONG)
    os.kill(ForkServer._current.pid, signal.SIGKILL)
    assert eventually(lambda: psutil.Process(ForkServer._current.pid).status() == psutil.STATUS_ZOMBIE)
    assert call.submit(abs, -1).result(LONG) == 1
    Path(tmp_path, "go").touch()
    assert held.result(LONG) == "held"
    call.leave()
    WorkerPool.close_all()
    assert not forks()
    assert ForkServer.enabled
