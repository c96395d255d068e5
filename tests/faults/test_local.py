"""Faults of this machine: its workers, its files, its memory, its signals. Results stay exact, and nothing is left."""

import contextlib
import gc
import itertools
import os
import signal
import subprocess
import time
import warnings
from pathlib import Path

import joblib
import numpy as np
import psutil
import pytest
from conftest import eventually, own_processes, own_threads, resident_files
from crashing import CRASHES, delayed_at, takes
from injection import (
    KINDS,
    Killer,
    finish,
    mount_small,
    open_tier,
    own_server_pids,
    script,
    search_of,
    two_halves,
    unmount,
    workers,
)
from sklearn.exceptions import FitFailedWarning
from tasks import (
    Task,
    Wrong,
    crash,
    exit_task,
    fail,
    kill,
    leave,
    notes,
    remove_files,
    remove_folders,
    truncate_files,
    wait_for_go,
)

from joblib_backends.data.store import default_store
from joblib_backends.errors import (
    BatchTimeoutError,
    RecoveryWarning,
    TaskTimeoutError,
    WorkerLostError,
)
from joblib_backends.workers.pool import WorkerPool

pytestmark = pytest.mark.usefixtures("leaves_only_warm_workers")

N = 8

#: What ends the process of a task, or takes its data away: the call recovers.
LOSSES = {
    "SIGKILL": kill,
    "os._exit": leave,
    "segfault": crash,
    "files removed": remove_files,
    "files truncated": truncate_files,
    "folders removed": remove_folders,
}

#: What a task does to its call by Python's own means: the call ends with just that.
FAILURES = {"exception": (fail, Wrong, "mine"), "sys.exit": (exit_task, SystemExit, "4")}


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_no_worker():
    WorkerPool.close_all()
    WorkerPool.get(b"", 300.0).warm_up(2, frozenset({"sklearn"}))
    yield
    WorkerPool.close_all()
    assert eventually(lambda: not own_processes()), own_processes()


@pytest.fixture
def leaves_only_warm_workers(tmp_path, monkeypatch):
    """Check as ``leaves_nothing`` does, but leave the pool to the next test: a server takes a second to start."""
    works()
    gc.collect()
    threads, files, folders = own_threads(), set(resident_files()), own_folders()
    descriptors = psutil.Process().num_fds()
    yield
    works()
    assert eventually(lambda: {p.pid for p in own_processes()} <= known_processes()), own_processes()
    assert len(workers()) <= 2
    assert eventually(lambda: not {t for t in own_threads() - threads if t.name != "joblib_backends-pool"})
    assert eventually(lambda: set(resident_files()) <= files), set(resident_files()) - files
    assert eventually(lambda: psutil.Process().num_fds() <= descriptors + 6)
    # One for the residents of this process, in each place, if this was the first test to place any.
    assert len(own_folders() - folders) <= 1


def known_processes():
    """Return the workers of our pools, and the servers that forked them."""
    return {*workers(), *own_server_pids()}


def own_folders():
    return {
        str(path) for place in ("/dev/shm", "/tmp") for path in Path(place).glob("joblib_backends-*") if is_ours(path)
    }


def is_ours(path):
    return any(str(path) == str(own.path) for own in default_store()._folders.values())


@pytest.fixture(params=list(KINDS))
def kind(request):
    return KINDS[request.param]


def works(tier="processes"):
    with open_tier(tier):
        assert joblib.Parallel()(joblib.delayed(abs)(-i) for i in range(8)) == list(range(8))


# ---- one fault


@pytest.mark.parametrize("fault", LOSSES)
def test_a_call_that_loses_a_worker_or_its_data_gives_the_right_results(fault, kind, tmp_path):
    values = two_halves(20_000)  # 16 MB: a fold of it, too, is placed and not pickled
    with open_tier("processes"):
        warm = Task(tmp_path)
        expected = kind(warm, N, values)
        residents = [resident.path for resident in default_store().residents]
        task = Task(tmp_path, LOSSES[fault], residents, once=3)
        assert kind(task, N, values) == expected
        assert (tmp_path / "fault").exists()
        assert kind(warm, N, values) == expected
    assert expected == warm.expected(N, None if kind is KINDS["search"] else values)


@pytest.mark.parametrize("seed", range(2))
def test_a_worker_that_is_killed_at_any_moment_costs_nothing_but_time(seed, kind, tmp_path):
    task = Task(tmp_path, seconds=0.02)
    with open_tier("processes"), Killer(seed, 1, 0.05, lambda: notes(tmp_path / "started")) as killer:
        # A machine that is busy may not let the killer run in time for the first call.
        while not killer.n_killed:
            assert kind(task, N) == task.expected(N)
    assert killer.n_killed == 1


@pytest.mark.parametrize("tier", ["inline", "threads", "processes"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_task_that_fails_ends_its_call_with_its_own_exception_and_no_worker_is_lost(failure, tier, kind, tmp_path):
    fault, error, text = FAILURES[failure]
    task = Task(tmp_path, fault, always={3})
    with open_tier(tier):
        with pytest.raises(error, match=text) as caught:
            kind(task, N)
        assert caught.type is error
        assert notes(tmp_path / "started").count("3") == 1
        healthy = Task(tmp_path)
        assert kind(healthy, N) == healthy.expected(N)


# ---- poison


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("kind", ["list", "generator", "unordered"])
@pytest.mark.parametrize(("fault", "code", "words"), [(leave, 3, "exit code 3"), (kill, -9, "SIGKILL")])
def test_a_task_that_always_kills_its_worker_is_named_when_all_others_are_done(
    fault, code, words, kind, batch_size, tmp_path
):
    task = Task(tmp_path, fault, always={6})
    names = rf"Task, task 6 \(6, None\), died: it .*{words}\..*retries=2"
    with open_tier("processes"), pytest.raises(WorkerLostError, match=names) as caught:
        KINDS[kind](task, 20, batch_size=batch_size)
    assert caught.value.exit_code == code
    assert set(map(int, notes(tmp_path / "done"))) == set(range(20)) - {6}
    assert notes(tmp_path / "started").count("6") == 3


@pytest.mark.parametrize("error_score", [np.nan, -1.0])
def test_a_search_goes_on_with_the_error_score_of_a_fit_that_kills_its_worker(error_score, tmp_path):
    task = Task(tmp_path, leave, always={5})
    with open_tier("processes"), pytest.warns() as caught:
        search = search_of(task, N, error_score=error_score).fit(two_halves(10)).cv_results_
    kinds = {one.category for one in caught}
    assert kinds == {RecoveryWarning, FitFailedWarning} | ({UserWarning} if np.isnan(error_score) else set())
    assert any("exit code 3" in str(one.message) and "fold 2 of 2" in str(one.message) for one in caught)
    scores = np.stack([search["split0_test_score"], search["split1_test_score"]], axis=1).ravel()
    expected = np.array(task.expected(N))
    expected[5] = error_score
    np.testing.assert_array_equal(scores, expected)


def test_a_search_that_asks_for_errors_names_candidate_and_fold(tmp_path):
    task = Task(tmp_path, leave, always={5})
    with open_tier("processes"), pytest.raises(WorkerLostError, match=r"candidate .*index.*2.*, fold 2 of 2"):
        search_of(task, N, error_score="raise").fit(two_halves(10))
    assert set(map(int, notes(tmp_path / "done"))) == set(range(N)) - {5}


@pytest.mark.parametrize("kind", ["list", "generator", "unordered"])
def test_many_poison_tasks_do_not_keep_the_others_from_being_dispatched(kind, tmp_path):
    """joblib dispatches the next tasks from the callbacks of those that are done, which these never are."""
    task = Task(tmp_path, leave, always={0, 1, 2, 7, 9})
    with open_tier("processes", retries=0), pytest.raises(WorkerLostError, match=r"task [0129]"):
        KINDS[kind](task, 12, pre_dispatch="n_jobs", batch_size=1)
    assert set(map(int, notes(tmp_path / "done"))) == set(range(12)) - {0, 1, 2, 7, 9}


# ---- time


@pytest.mark.parametrize("tier", ["processes", "threads"])
@pytest.mark.parametrize("kind", ["list", "generator", "unordered"])
def test_a_task_that_runs_too_long_is_named_and_all_others_are_done(tier, kind, tmp_path):
    task = Task(tmp_path, wait_for_go, [str(tmp_path / "go")], always={3})
    names = r"Task, task 3 \(3, None\), ran longer than task_timeout=2 seconds"
    with open_tier(tier, task_timeout=2), pytest.raises(TaskTimeoutError, match=names):
        KINDS[kind](task, N)
    (tmp_path / "go").touch()
    assert {*map(int, notes(tmp_path / "done"))} >= set(range(N)) - {3}
    works(tier)


@pytest.mark.parametrize("tier", ["processes", "threads"])
def test_a_fit_that_runs_too_long_gets_its_error_score(tier, tmp_path):
    task = Task(tmp_path, wait_for_go, [str(tmp_path / "go")], always={3})
    with open_tier(tier, task_timeout=2), pytest.warns() as caught:
        found = search_of(task, N, error_score=-1.0).fit(two_halves(10)).cv_results_
    assert {one.category for one in caught} == {RecoveryWarning, FitFailedWarning}
    (tmp_path / "go").touch()
    expected = [-1.0 if place == 3 else value for place, value in enumerate(task.expected(N))]
    assert np.stack([found["split0_test_score"], found["split1_test_score"]], axis=1).ravel().tolist() == expected


@pytest.mark.parametrize("tier", ["processes", "threads"])
def test_joblibs_own_timeout_ends_the_call_whatever_a_task_may_take(tier, tmp_path):
    task = Task(tmp_path, wait_for_go, [str(tmp_path / "go")], always={3})
    with open_tier(tier, task_timeout=50), pytest.raises(BatchTimeoutError, match=r"timeout=0.3"):
        KINDS["list"](task, N, timeout=0.3)
    (tmp_path / "go").touch()
    works(tier)


# ---- many kills


def test_two_hundred_kills_change_nothing_but_the_time(tmp_path):
    n = 400
    task = Task(tmp_path, seconds=0.04)
    with open_tier("processes", retries=50), Killer(0, 200, 0.06, lambda: notes(tmp_path / "started")) as killer:
        found = search_of(task, n, error_score="raise").fit(two_halves(10)).cv_results_
    scores = np.stack([found["split0_test_score"], found["split1_test_score"]], axis=1).ravel()
    assert scores.tolist() == task.expected(n)
    assert killer.n_killed == 200
    assert len(notes(tmp_path / "started")) <= n + killer.n_killed


# ---- loky's table: where things go wrong, and how


@pytest.mark.parametrize("form", ["list", "generator", "generator_unordered"])
@pytest.mark.parametrize(("where", "how", "error"), CRASHES)
def test_a_crash_anywhere_is_the_error_of_its_place(where, how, error, form):
    tasks = [joblib.delayed(takes)(i) for i in range(3)] + [delayed_at(where, how)]
    with open_tier("processes", retries=1):
        with pytest.raises(error) as caught:
            list(joblib.Parallel(return_as=form)(tasks))
        assert caught.type is error
        assert joblib.Parallel()(joblib.delayed(takes)(i) for i in range(4)) == [1] * 4


@pytest.mark.parametrize("tier", ["inline", "threads", "processes"])
@pytest.mark.parametrize("form", ["list", "generator", "generator_unordered"])
def test_an_input_that_raises_in_joblibs_callback_ends_the_call_with_its_error(form, tier):
    def tasks():
        for i in range(9):
            yield joblib.delayed(takes)(i)
        raise Wrong("mine")

    with open_tier(tier):
        with pytest.raises(Wrong, match="mine"):
            list(joblib.Parallel(return_as=form, pre_dispatch=2, batch_size=1)(tasks()))
        assert joblib.Parallel()(joblib.delayed(takes)(i) for i in range(4)) == [1] * 4


@pytest.mark.parametrize("tier", ["inline", "threads", "processes"])
@pytest.mark.parametrize("form", ["generator", "generator_unordered"])
def test_a_consumer_that_fails_or_leaves_half_way_ends_the_call(form, tier, tmp_path):
    task = Task(tmp_path, seconds=0.001)
    with open_tier(tier):
        results = joblib.Parallel(return_as=form, pre_dispatch=4, batch_size=1)(
            joblib.delayed(task)(i) for i in range(500)
        )
        assert next(results) in task.expected(500)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            del results
            gc.collect()
        assert KINDS["list"](task, N) == task.expected(N)
    assert len(notes(tmp_path / "started")) < 400


# ---- signals to the driver, and its end


DRIVER = """
    import os, sys, threading, time
    import joblib, numpy as np
    from injection import open_tier, own_server_pids, workers
    from joblib_backends.data.store import default_store
    from tasks import Task, wait_for_go, notes, wait_for
    folder, form = sys.argv[1:3]
    task = Task(folder, wait_for_go, [folder + "/go"], always={4})
    data = np.ones(400_000)
    def tell():
        wait_for(lambda: "4" in notes(folder + "/started"))
        print(*workers(), *own_server_pids(), *(r.path for r in default_store().residents), flush=True)
    def call(**options):
        parallel = joblib.Parallel(return_as=form, batch_size=1, **options)
        return list(parallel(joblib.delayed(task)(i, data) for i in range(8)))
"""

INTERRUPTED = (
    DRIVER
    + """
    with open_tier("processes"):
        threading.Thread(target=tell).start()
        try:
            call()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        task.always = frozenset()
        print(call() == task.expected(8, data), flush=True)
    from joblib_backends.workers.pool import WorkerPool
    WorkerPool.close_all()
"""
)

WAITING = (
    DRIVER
    + """
    with open_tier("processes"):
        threading.Thread(target=tell, daemon=True).start()
        call()
"""
)


FRESH = (
    """
    from joblib_backends.workers.server import ForkServer
    ForkServer.enabled = False
"""
    + WAITING
)


def told(process, n_processes=3):
    """Return the processes and the files that a driver has while its tasks wait."""
    words = process.stdout.readline().split()
    pids, paths = [int(word) for word in words if word.isdigit()], [word for word in words if not word.isdigit()]
    assert len(pids) >= n_processes, process.stderr.read()
    assert paths
    return pids, paths


def are_gone(pids):
    return eventually(lambda: not any(map(_runs, pids)), 10)


def _runs(pid):
    with contextlib.suppress(psutil.Error):
        # Where nobody reaps them, those that have ended stay as zombies.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("form", ["list", "generator"])
def test_ctrl_c_ends_the_call_at_once_and_the_next_one_works(form, tmp_path):
    with script(INTERRUPTED, tmp_path, form) as driver:
        pids, paths = told(driver)
        begin = time.monotonic()
        driver.send_signal(signal.SIGINT)
        assert driver.stdout.readline().split() == ["interrupted"]
        assert time.monotonic() - begin < 5
        out, err = finish(driver)
        assert (out, err) == (["True"], "")
    assert are_gone(pids)
    assert not any(map(os.path.exists, paths))


def test_sigterm_leaves_no_process_and_no_file(tmp_path):
    with script(WAITING, tmp_path, "list") as driver:
        pids, paths = told(driver)
        driver.terminate()
        assert driver.wait(10) == -signal.SIGTERM
        assert are_gone(pids)
        # By the server, which ends after its parent.
        assert eventually(lambda: not any(map(os.path.exists, paths)))


def test_a_driver_that_is_killed_takes_its_workers_with_it_and_the_next_start_sweeps_its_files(tmp_path):
    with script(WAITING, tmp_path, "generator") as driver:
        pids, paths = told(driver)
        driver.kill()
        assert are_gone(pids)
        assert_swept(paths)


def test_workers_that_no_server_kills_end_with_a_driver_that_is_killed(tmp_path):
    """Fresh interpreters, in the middle of a task that has no end."""
    with script(FRESH, tmp_path, "list") as driver:
        pids, _ = told(driver, 2)
        driver.kill()
        assert are_gone(pids)


def assert_swept(paths):
    """Show that another process that places data removes what a dead one left."""
    code = """
        import joblib, numpy as np
        from injection import open_tier
        with open_tier("processes", scatter=[np.ones(300_000)]):
            print(joblib.Parallel()(joblib.delayed(len)(np.ones(300_000)) for _ in range(2)))
    """
    with script(code) as process:
        finish(process)
    assert not any(map(os.path.exists, paths))


def test_the_main_thread_may_end_while_another_runs_a_call(tmp_path):
    code = (
        DRIVER
        + """
    def run():
        with open_tier("processes"):
            print(call() == task.expected(8, data), flush=True)
    threading.Thread(target=run).start()
    threading.Thread(target=tell).start()
    """
    )
    with script(code, tmp_path, "list") as driver:
        pids, paths = told(driver)
        (tmp_path / "go").touch()
        out, err = finish(driver)
        assert (out, err) == (["True"], "")
    assert are_gone(pids)
    assert not any(map(os.path.exists, paths))


# ---- resources


LARGE = """
    import os, sys
    import joblib, numpy as np
    from injection import open_tier
    from joblib_backends.data.store import default_store
    from tasks import total
    options = {"temp_folder": sys.argv[2]} if len(sys.argv) > 2 else {}
    data = np.arange(int(sys.argv[1]), dtype=float)
    with open_tier("processes"):
        try:
            sums = joblib.Parallel(**options)(joblib.delayed(total)(data, i) for i in range(4))
            places = {os.path.dirname(resident.path) for resident in default_store().residents}
            print(sums == [total(data, i) for i in range(4)], *places)
        except OSError as error:
            print(type(error).__name__, "temp_folder" in str(error))
        print(joblib.Parallel()(joblib.delayed(abs)(-i) for i in range(3)) == [0, 1, 2])
"""


@pytest.fixture
def small_place(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mount_small(place, 1 << 20)
    yield place
    unmount(place)


@pytest.mark.parametrize("way", ["parameter", "variable"])
def test_a_full_temp_folder_is_an_error_that_says_so_and_the_next_call_works(way, small_place):
    given = [small_place] if way == "parameter" else []
    variable = {} if given else {"JOBLIB_TEMP_FOLDER": str(small_place)}
    with script(LARGE, 500_000, *given, env=variable) as process:
        assert finish(process)[0] == ["StoreError", "True", "True"]
    assert not list(small_place.glob("*/0*"))


def test_a_temp_folder_that_cannot_be_written_is_an_error_that_says_so(small_place):
    subprocess.run(["mount", "-o", "remount,ro", str(small_place)], check=True)
    with script(LARGE, 500_000, small_place) as process:
        assert finish(process)[0] == ["StoreError", "True", "True"]


def test_a_container_with_64_mb_of_shared_memory_takes_the_next_place(tmp_path):
    mount = f'mount --make-rprivate / && mount -t tmpfs -o size=64m tmpfs /dev/shm && TMPDIR={tmp_path} exec "$@"'
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace is not permitted here")
    with script(LARGE, 12_500_000, prefix=("unshare", "-m", "sh", "-c", mount, "sh")) as process:
        out, _ = finish(process)
    assert (out[0], out[-1]) == ("True", "True")
    assert out[1].startswith(str(tmp_path))


def test_a_process_without_descriptors_says_so_and_works_when_there_are_some():
    """Each child has one more to spare, so that each place that opens one is the first to fail in some."""
    code = """
        import os, resource, signal
        import joblib, joblib_backends
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        def call():
            with joblib.parallel_backend("hybrid", n_jobs=2, tier="processes"):
                return joblib.Parallel()(joblib.delayed(abs)(-i) for i in range(4)) == [0, 1, 2, 3]
        for spare in range(-1, 11):
            child = os.fork()
            if not child:
                signal.alarm(50)
                resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, hard))
                try:
                    ok = call()
                except Exception as error:
                    ok = "Too many open files" in str(error)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                os._exit(0 if ok and call() else 1)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
    with script(code) as process:
        assert finish(process)[0] == ["0"] * 12


@pytest.fixture
def memory_group():
    """A control group below our own that allows 420 MB; of the first version, or of the second."""
    groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for controllers, path in groups if controllers == "memory"), None)
    root, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if own is None:
        own, root, limit = (
            next(path for controllers, path in groups if not controllers),
            Path("/sys/fs/cgroup"),
            "memory.max",
        )
    group = root / own.lstrip("/") / f"joblib_backends-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(420 << 20))
    except OSError as error:
        # Also where a group of the second version has processes and must not limit those below it.
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"control groups for memory are not permitted here: {error}")
    try:
        yield group
    finally:
        assert eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


IN_LITTLE_MEMORY = """
    import sys, joblib, joblib_backends
    from tasks import use_memory
    n_mb, n = map(int, sys.argv[1:])
    with joblib.parallel_backend("hybrid", n_jobs=4, tier="processes"):
        try:
            found = joblib.Parallel(batch_size=1)(joblib.delayed(use_memory)(n_mb, i) for i in range(n))
            print(found == list(range(n)))
            print(joblib_backends.last_report().lost_workers)
        except joblib_backends.WorkerLostError as error:
            print("probably by the kernel because memory had run out" in str(error))
"""


def in_little_memory(memory_group, n_mb, n):
    enter = f'echo $$ > {memory_group}/cgroup.procs && exec "$@"'
    with script(IN_LITTLE_MEMORY, n_mb, n, prefix=("sh", "-c", enter, "sh")) as process:
        return finish(process)[0]


def test_tasks_that_need_more_memory_together_than_there_is_take_turns_once_a_worker_was_killed(memory_group):
    is_right, n_lost = in_little_memory(memory_group, 100, 24)
    assert is_right == "True"
    # Of those that began together. One by one, each that starts beside too many would be killed: 36 to 46, as measured.
    assert 1 <= int(n_lost) <= 4


def test_a_task_that_needs_more_memory_than_there_is_is_told_so(memory_group):
    assert in_little_memory(memory_group, 500, 1) == ["True"]


# ---- many calls


@pytest.mark.parametrize("tier", ["inline", "threads", "processes"])
def test_thousands_of_calls_leave_memory_descriptors_threads_and_files_as_they_were(tier):
    """10,000 in all: one context, whose calls open and close everything that a call has."""
    process, calls = psutil.Process(), {"inline": 4_000, "threads": 3_000, "processes": 3_000}[tier]
    with open_tier(tier):
        figures = [_figures_after(calls // 3, process) for _ in range(3)]
    for (_, nbytes, *before), (_, nbytes_later, *after) in itertools.pairwise(figures):
        assert all(later - sooner <= 2 for later, sooner in zip(after, before, strict=True)), figures
        assert nbytes_later - nbytes < 4 << 20, figures
    # The crew grows when more are needed at once: on a busy machine those of the last calls are still on their way out.
    # What leaks grows with each third.
    assert min(later[0] - sooner[0] for sooner, later in itertools.pairwise(figures)) <= 2, figures


def _figures_after(n_calls, process):
    for _ in range(n_calls):
        assert joblib.Parallel()([joblib.delayed(abs)(-1), joblib.delayed(abs)(-2)]) == [1, 2]
    gc.collect()
    # Each thread of the crew has a descriptor of its own.
    n_crew, n_threads, n_fds = len(own_threads("crew")), len(own_threads()), process.num_fds()
    counts = n_fds - n_crew, n_threads - n_crew, len(own_processes()), len(resident_files())
    return n_crew, process.memory_info().rss, *counts
