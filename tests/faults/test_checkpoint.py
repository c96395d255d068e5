"""Finished tasks survive their process: what was done is not done again, and nothing else is taken for it."""

import contextlib
import signal
import sqlite3
import subprocess
import warnings

import joblib
import numpy as np
import psutil
import pytest
from injection import KINDS, finish, mount_small, open_tier, script, search_of, two_halves, unmount
from sklearn.exceptions import FitFailedWarning
from tasks import Task, Wrong, fail, leave, notes, wait_for

from joblib_backends import last_report
from joblib_backends.errors import CheckpointWarning, RecoveryWarning, WorkerLostError

N = 8


@pytest.fixture
def path(tmp_path):
    return tmp_path / "search.ckpt"


def runs(folder):
    """Return how often each task was started, by its index."""
    lines = notes(folder / "started")
    return {int(line): lines.count(line) for line in lines}


ONCE = dict.fromkeys(range(N), 1)


# ---- another process goes on

DRIVER = """
    import sys
    from injection import KINDS, open_tier
    from tasks import Task
    folder, kind, tier, seconds = sys.argv[1:5]
    task = Task(folder, seconds=float(seconds))
    with open_tier(tier, checkpoint=folder + "/search.ckpt"):
        print(KINDS[kind](task, int(sys.argv[5])) == task.expected(int(sys.argv[5])))
"""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nested"])
def test_a_second_process_runs_no_finished_task_again(kind, tmp_path):
    for _ in range(2):
        with script(DRIVER, tmp_path, kind, "inline", 0, N) as driver:
            assert finish(driver) == (["True"], "")
        assert runs(tmp_path) == ONCE


LAUNCHER = """
    import os, random, signal, sys, time
    from injection import KINDS, open_tier
    from tasks import Task, notes, wait_for
    folder, tier, n, n_kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    rng, task = random.Random(0), Task(folder, seconds=0.02)
    for attempt in range(n_kills + 1):
        before = len(notes(folder + "/started"))
        driver = os.fork()
        if not driver:
            with open_tier(tier, checkpoint=folder + "/search.ckpt"):
                ok = KINDS["search"](task, n) == task.expected(n)
            os._exit(0 if ok else 1)
        if attempt < n_kills:
            wait_for(lambda: len(notes(folder + "/started")) > before)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(driver, signal.SIGKILL)
        _, status = os.waitpid(driver, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize(("tier", "n_kills"), [("threads", 20), ("processes", 20)])
def test_a_search_whose_driver_is_killed_at_any_moment_goes_on_until_it_is_done(tier, n_kills, tmp_path):
    """Each driver is forked, so that it need not import everything; tasks that were in flight run again."""
    n, journal = 40 + 6 * n_kills, tmp_path / "search.ckpt"
    in_flight, codes = [], []
    with script(LAUNCHER, tmp_path, tier, n, n_kills, stdin=subprocess.PIPE, env={"RUN": str(tmp_path)}) as launcher:
        for _ in range(n_kills + 1):
            begun, kept = len(notes(tmp_path / "started")), entries(journal)
            codes.append(launcher.stdout.readline().strip())
            wait_for(lambda: not workers_of(tmp_path))
            in_flight.append(len(notes(tmp_path / "started")) - begun - (entries(journal) - kept))
            launcher.stdin.write("\n")
            launcher.stdin.flush()
        _, err = launcher.communicate(timeout=60)
    assert (codes, err) == (["-9"] * n_kills + ["0"], "")
    assert entries(journal) == n
    assert in_flight[-1] == 0
    assert max(in_flight) <= 8, "what two jobs ran, and what was done and not in the journal yet"
    assert len(notes(tmp_path / "started")) == n + sum(in_flight)


def workers_of(folder):
    """Return the workers and servers of a launcher's drivers that are still there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = "joblib_backends.workers.forking" in " ".join(process.cmdline())
            if is_ours and process.environ().get("RUN") == str(folder):
                found.append(process)
    return found


def entries(journal):
    if not journal.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as connection:
        try:
            return connection.execute("SELECT count(*) FROM entries").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def test_ctrl_c_keeps_what_was_done(tmp_path):
    code = """
        import sys, threading
        import joblib
        from injection import open_tier
        from tasks import Task, wait_for_go
        folder = sys.argv[1]
        task = Task(folder, wait_for_go, [folder + "/go"], always={5}, seconds=0.05)
        with open_tier("processes", checkpoint=folder + "/search.ckpt"):
            for attempt in range(2):
                try:
                    print(joblib.Parallel(batch_size=1)(joblib.delayed(task)(i) for i in range(8)) == task.expected(8))
                except KeyboardInterrupt:
                    open(folder + "/go", "w").close()
    """
    with script(code, tmp_path) as driver:
        wait_for(lambda: len(notes(tmp_path / "done")) == 7 or driver.poll() is not None)
        wait_for(lambda: entries(tmp_path / "search.ckpt") == 7 or driver.poll() is not None)
        driver.send_signal(signal.SIGINT)
        assert finish(driver) == (["True"], "")
    assert runs(tmp_path) == {**ONCE, 5: 2}


# ---- what counts as the same task


def run_all(path, function, arguments, **options):
    with open_tier("inline", checkpoint=path, **options):
        return joblib.Parallel()(joblib.delayed(function)(*one) for one in arguments)


def test_a_changed_argument_or_a_changed_array_is_another_task(path, tmp_path):
    task, values = Task(tmp_path), np.ones(1_000)
    run_all(path, task, [(0, values), (1, values)])
    values[7] = 5.0
    assert run_all(path, task, [(0, values), (1, np.ones(1_000))]) == [1_004.0, 1_010.0]
    assert runs(tmp_path) == {0: 2, 1: 1}


WORK = """
from tasks import note
def work(folder, i):
    note(folder, i)
    return {body}
"""


def write_module(folder, body):
    (folder / "changing.py").write_text(WORK.replace("{body}", body))


CHANGING = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import joblib, joblib_backends
    from changing import work
    with joblib.parallel_backend("hybrid", n_jobs=2, tier="inline", checkpoint=sys.argv[1] + "/search.ckpt"):
        print(*joblib.Parallel()(joblib.delayed(work)(sys.argv[1] + "/started", i) for i in range(3)))
"""


def test_a_changed_function_body_is_another_task_and_the_old_one_is_still_known(tmp_path):
    for body, results, n_runs in [("i + 1", "123", 3), ("i + 2", "234", 6), ("i + 1", "123", 6)]:
        write_module(tmp_path, body)
        with script(CHANGING, tmp_path, env={"PYTHONDONTWRITEBYTECODE": "1"}) as driver:
            assert finish(driver) == (list(results), "")
        assert len(notes(tmp_path / "started")) == n_runs


ESTIMATOR = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import joblib, joblib_backends, numpy as np
    from changing import Own
    from sklearn.model_selection import GridSearchCV
    with joblib.parallel_backend("hybrid", n_jobs=2, tier="inline", checkpoint=sys.argv[1] + "/search.ckpt"):
        search = GridSearchCV(Own(sys.argv[1] + "/started"), {"value": [1, 2]}, cv=2, refit=False)
        print(*search.fit(np.zeros((10, 2)), np.zeros(10)).cv_results_["mean_test_score"].astype(int))
"""

OWN = """
from sklearn.base import BaseEstimator
from tasks import note
class Own(BaseEstimator):
    def __init__(self, log=None, value=0):
        self.log, self.value = log, value
    def fit(self, X, y):
        note(self.log, self.value)
        return self
    def score(self, X, y):
        return self.value * {factor}
"""


def test_the_changed_code_of_an_estimator_makes_other_tasks(tmp_path):
    for factor, n_runs in [(1, 4), (1, 4), (3, 8)]:
        (tmp_path / "changing.py").write_text(OWN.replace("{factor}", str(factor)))
        with script(ESTIMATOR, tmp_path, env={"PYTHONDONTWRITEBYTECODE": "1"}) as driver:
            assert finish(driver) == ([str(factor), str(2 * factor)], "")
        assert len(notes(tmp_path / "started")) == n_runs


@pytest.mark.parametrize("tier", ["inline", "threads", "processes"])
def test_a_larger_search_runs_only_what_is_new(tier, path, tmp_path):
    task = Task(tmp_path)
    for n in (N, 2 * N):
        with open_tier(tier, checkpoint=path):
            assert KINDS["search"](task, n) == task.expected(n)
    assert runs(tmp_path) == dict.fromkeys(range(2 * N), 1)
    assert last_report().tasks_restored == N


def draw():
    return np.random.rand()


def test_equal_calls_of_a_function_that_draws_get_numbers_of_their_own(path):
    def two_calls():
        with open_tier("inline", checkpoint=path):
            return [joblib.Parallel()(joblib.delayed(draw)() for _ in range(3)) for _ in range(2)]

    first = two_calls()
    assert len({*first[0], *first[1]}) == 6
    assert two_calls() == first


# ---- what is kept, and what is not


@pytest.mark.parametrize("kind", ["list", "generator", "unordered", "search"])
@pytest.mark.parametrize("tier", ["inline", "processes"])
def test_what_was_done_before_a_failure_is_kept_in_the_same_context(tier, kind, path, tmp_path):
    task = Task(tmp_path, fail, once=7)
    with open_tier(tier, checkpoint=path):
        with pytest.raises(Wrong, match="mine"):
            KINDS[kind](task, N)
        kept = entries(path)
        before = len(notes(tmp_path / "started"))
        healthy = Task(tmp_path, fail, once=7)
        assert KINDS[kind](healthy, N) == healthy.expected(N)
    # A generator's tasks are completed beside its consumer: some may be kept when the failure is known already.
    assert 1 <= len(notes(tmp_path / "started")) - before <= N - kept
    assert entries(path) == N


def test_a_task_that_was_given_up_is_not_kept_and_all_others_are(path, tmp_path):
    task = Task(tmp_path, leave, always={5})
    with open_tier("processes", checkpoint=path, retries=0):
        with pytest.raises(WorkerLostError):
            KINDS["list"](task, N)
        assert entries(path) == N - 1
        with pytest.warns() as caught:
            search_of(task, N, error_score=-1.0).fit(two_halves(10))
    assert {one.category for one in caught} == {RecoveryWarning, FitFailedWarning}
    assert entries(path) == 2 * (N - 1)


def test_a_nested_call_is_part_of_its_task(path, tmp_path):
    task = Task(tmp_path)
    for _ in range(2):
        with open_tier("inline", checkpoint=path):
            assert KINDS["nested"](task, N) == task.expected(N)
    assert entries(path) == 2
    assert runs(tmp_path) == ONCE


def make_lock(log, i):
    import threading

    Task(log)(i)
    return threading.Lock() if i == 1 else i


def test_a_result_that_cannot_be_pickled_is_not_kept_and_nothing_else_suffers(path, tmp_path):
    for n_runs in (1, 2):
        with open_tier("threads", checkpoint=path):
            results = joblib.Parallel(batch_size=1)(joblib.delayed(make_lock)(str(tmp_path), i) for i in range(4))
        assert [results[0], *results[2:]] == [0, 2, 3]
        assert runs(tmp_path) == {0: 1, 1: n_runs, 2: 1, 3: 1}


def test_the_variable_of_the_environment_is_the_parameter(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JOBLIB_BACKEND_CHECKPOINT", str(path))
    task = Task(tmp_path)
    for _ in range(2):
        with open_tier("inline"):
            assert KINDS["list"](task, N) == task.expected(N)
    monkeypatch.undo()
    assert runs(tmp_path) == ONCE


# ---- a checkpoint that cannot be used


@pytest.mark.parametrize("tier", ["inline", "processes"])
def test_a_full_disk_costs_the_checkpoint_and_one_warning(tier, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount_small(place, 1 << 20)
    try:
        with open_tier(tier, checkpoint=place / "search.ckpt"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                results = joblib.Parallel()(joblib.delayed(bytes)(100_000 + i) for i in range(30))
                assert [len(result) for result in results] == [100_000 + i for i in range(30)]
    finally:
        unmount(place)
    assert [one.category for one in caught] == [CheckpointWarning]
    assert "Make room" in str(caught[0].message)


def foreign(path):
    path.write_text("my notes, no checkpoint")


def writable_by_others(path):
    path.touch()
    path.chmod(0o666)


def a_link(path):
    (path.parent / "target").write_text("precious")
    path.symlink_to(path.parent / "target")


@pytest.mark.parametrize("make", [foreign, writable_by_others, a_link])
def test_a_file_that_must_not_be_used_costs_one_warning_and_stays_as_it_is(make, path, tmp_path):
    make(path)
    before = path.read_bytes(), path.lstat()
    task = Task(tmp_path)
    with (
        open_tier("inline", checkpoint=path),
        pytest.warns(CheckpointWarning, match="without its checkpoint") as caught,
    ):
        assert [KINDS["list"](task, N) for _ in range(2)] == [task.expected(N)] * 2
    assert len(caught) == 1
    after = path.read_bytes(), path.lstat()
    assert after[0] == before[0]
    assert (after[1].st_mode, after[1].st_mtime_ns, after[1].st_ino) == tuple(
        getattr(before[1], name) for name in ("st_mode", "st_mtime_ns", "st_ino")
    )


def test_two_drivers_share_one_file(tmp_path):
    with (
        script(DRIVER, tmp_path, "list", "processes", 0.005, 60) as one,
        script(DRIVER, tmp_path, "generator", "processes", 0.005, 90) as other,
    ):
        assert finish(one) == (["True"], "")
        assert finish(other) == (["True"], "")
    assert entries(tmp_path / "search.ckpt") == 90
    begun = len(notes(tmp_path / "started"))
    assert 90 <= begun <= 150
    with script(DRIVER, tmp_path, "list", "inline", 0.005, 90) as third:
        assert finish(third) == (["True"], "")
    assert len(notes(tmp_path / "started")) == begun
