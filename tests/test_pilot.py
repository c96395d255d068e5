"""A call that changes its mind: begun in one place, moved while it runs, and right all the same."""

import os
import queue
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
from conftest import LONG, eventually
from joblib import Parallel, delayed, parallel_backend
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import FeatureUnion, _transform_one
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info

from joblib_backends import last_report
from joblib_backends.config import Config
from joblib_backends.crew import Crew
from joblib_backends.experience import Experience
from joblib_backends.kinds import kind_of
from joblib_backends.pilot import Pilot
from joblib_backends.profile import Profile
from joblib_backends.relief import Relief
from joblib_backends.rules import Facts
from joblib_backends.tiers import load_tier
from joblib_backends.workers.pool import WorkerPool


def square(i):
    return i * i


def where(_):
    return threading.current_thread() is threading.main_thread()


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


class Items:
    """What joblib calls a batch."""

    def __init__(self, *items):
        self.items = items


def known_as(function, *args, n_jobs=2, **experience):
    """Let the planner know a kind of task before its first call."""
    kind = kind_of(Items((function, args, {})), n_jobs).name
    Profile.shared().learn(kind, Experience(**experience))


# ---- kinds


def test_a_kind_is_the_function_the_estimators_and_the_size_of_the_data():
    data = np.zeros((1000, 10))
    kind = kind_of(Items((square, (StandardScaler(), data), {})), 2)
    assert kind.name == f"{__name__}.square(StandardScaler) of 4**8 bytes, 2 jobs"
    assert kind.nbytes == data.nbytes
    assert kind_of(Items((square, (StandardScaler(), data[:990]), {})), 2).name == kind.name
    assert kind_of(Items((square, (StandardScaler(), data[:10]), {})), 2).name != kind.name
    assert kind_of(Items((square, (StandardScaler(), data), {})), 3).name != kind.name


@pytest.mark.parametrize("function", [len, np.sin, str.upper, [].append, lambda: 0, StandardScaler().fit, print])
def test_every_callable_has_a_kind(function):
    assert kind_of(Items((function, (), {})), 2).name
    assert kind_of(function, 2).name


class Odd:
    """Has what estimators have, by accident."""

    steps = 1000
    estimators = {"a": 1}  # noqa: RUF012

    def fit(self):
        return self

    @property
    def transformers(self):
        raise RuntimeError("not now")


class Proxy:
    def __getattr__(self, name):
        raise RuntimeError("outside of a request")


def test_what_an_argument_does_when_it_is_looked_at_does_not_matter():
    endless = []
    endless.append(endless)
    deep = [0]
    for _ in range(60):
        deep = [deep, deep]
    for value in (Odd(), Proxy(), endless, deep):
        assert kind_of(Items((square, (value,), {})), 2).name.startswith(f"{__name__}.square")
    assert kind_of(Items((Odd().fit, (), {})), 2).name
    with parallel_backend("hybrid", n_jobs=2):
        assert Parallel()(delayed(id)(value) for value in (endless, endless)) == [id(endless)] * 2


def test_no_data_is_in_the_name_of_a_kind():
    secret = "secret" * 3
    assert secret not in kind_of(Items((square, (secret, [secret], {secret: 1}), {"key": secret})), 2).name


# ---- where tasks run


def test_tiny_tasks_run_in_the_calling_thread():
    with parallel_backend("hybrid", n_jobs=2):
        assert Parallel()(delayed(square)(i) for i in range(3000)) == [i * i for i in range(3000)]
        # On a machine that is busy with others a batch may take so long that the rest moves.
        assert last_report().tier.startswith("inline")
        assert Parallel()(delayed(where)(i) for i in range(20))[0]


def test_work_that_pays_moves_to_workers():
    with parallel_backend("hybrid", n_jobs=2) as (backend, _):
        load_tier("processes").start_workers(backend.config, 2, frozenset())
        assert eventually(lambda: load_tier("processes").ready_counter(backend.config)(), seconds=LONG)
        assert Parallel()(delayed(busy)(0.02) for _ in range(40)) == [0.02] * 40
        report = last_report()
    assert report.tier in ("inline + processes", "processes")
    assert report.tasks == 40


def test_what_was_learned_is_used_from_the_first_batch():
    known_as(square, 1, solo_s=1.0, n_tasks=100, task_s={"inline": 1.0}, efficiency={"inline": 1.0})
    with parallel_backend("hybrid", n_jobs=2) as (backend, _):
        load_tier("processes").start_workers(backend.config, 2, frozenset())
        assert eventually(lambda: load_tier("processes").ready_counter(backend.config)(), seconds=LONG)
        assert Parallel()(delayed(square)(i) for i in range(2)) == [0, 1]
    assert last_report().tier == "processes"
    assert last_report().predicted_seconds > 0


def test_a_failed_call_teaches_nothing():
    def fails(i):
        raise LookupError(i)

    with parallel_backend("hybrid", n_jobs=2), pytest.raises(LookupError):
        Parallel()(delayed(fails)(i) for i in range(4))
    assert "0 kinds" in repr(Profile.shared())


def test_the_report_has_every_tier_its_reason_and_the_prediction():
    # With workers there, a machine that stalls for a moment would rightly move the call.
    WorkerPool.close_all()
    with parallel_backend("hybrid", n_jobs=2):
        Parallel()(delayed(square)(i) for i in range(100))
        Parallel()(delayed(square)(i) for i in range(100))
    report = last_report()
    assert report.tier == "inline"
    assert report.reason.startswith("100 tasks of ~")
    assert 0 < report.predicted_seconds < LONG


# ---- the caller is not alone while it runs a task


def test_tasks_that_wait_for_each_other_meet():
    """The calling thread takes the first; the second must start while it waits."""
    barrier = threading.Barrier(2)

    def meet(i):
        barrier.wait(LONG)
        return i

    with parallel_backend("hybrid", n_jobs=2):
        known_as(meet, 1, solo_s=1e-6, n_tasks=2, task_s={"inline": 1e-6}, efficiency={"inline": 1.0})
        assert Parallel(prefer="threads")(delayed(meet)(i) for i in range(2)) == [0, 1]
        assert Parallel(require="sharedmem")(delayed(meet)(i) for i in range(6)) == list(range(6))


@pytest.mark.parametrize("option", [{"require": "sharedmem"}, {"prefer": "threads"}])
def test_tasks_that_wait_for_each_other_are_not_glued_together(option):
    """However small the tasks before them were."""
    barrier = threading.Barrier(2)

    def task(i):
        return i if i < 300 else barrier.wait(LONG) >= 0

    with parallel_backend("hybrid", n_jobs=2):
        assert Parallel(**option)(delayed(task)(i) for i in range(302)) == [*range(300), True, True]


def test_a_call_that_moves_keeps_to_its_jobs(tmp_path):
    """Begun in the calling thread and gone on in processes: never more than two at once."""
    with parallel_backend("hybrid", n_jobs=2) as (backend, _):
        load_tier("processes").start_workers(backend.config, 2, frozenset())
        assert eventually(lambda: load_tier("processes").ready_counter(backend.config)(), seconds=LONG)
        most = Parallel()(delayed(count_running)(str(tmp_path), i) for i in range(24))
    assert "processes" in last_report().tier
    assert max(most) <= 2


def count_running(folder, i):
    mine = Path(folder, f"{i}")
    mine.touch()
    busy(0.03)
    running = len(os.listdir(folder))
    mine.unlink()
    return running


def test_a_call_goes_on_where_no_thread_can_be_started(monkeypatch):
    class NoThreads:
        def run(self, body):
            raise RuntimeError("can't start new thread")

    relief = Relief(NoThreads(), lambda may_complete: None)
    with relief.standing_by(1, 0.0, may_complete=True):
        pass
    relief.end()
    # And the next one that can be looked after is.
    helped = threading.Event()
    relief = Relief(Crew.shared(), lambda may_complete: helped.set())
    with relief.standing_by(1, 0.0, may_complete=True):
        assert helped.wait(LONG)
    relief.end()


def test_the_rest_of_a_call_goes_on_while_the_caller_is_in_a_long_task():
    """All others are finished, the generator's later tasks too, before the first one is let go."""
    let_go, done = threading.Event(), []

    def task(i):
        if i == 0:
            assert let_go.wait(LONG)
        else:
            done.append(i)
            if len(done) == 49:
                let_go.set()
        return i

    with parallel_backend("hybrid", n_jobs=2):
        known_as(task, 1, solo_s=1e-6, n_tasks=50, task_s={"inline": 1e-6}, efficiency={"inline": 1.0})
        assert Parallel(require="sharedmem")(delayed(task)(i) for i in range(50)) == list(range(50))


def test_an_error_while_the_caller_is_in_a_task_ends_the_call_after_it():
    started = threading.Event()

    def task(i):
        if i == 0:
            assert started.wait(LONG)
            return i
        started.set()
        raise LookupError("mine")

    with parallel_backend("hybrid", n_jobs=2):
        known_as(task, 1, solo_s=1e-6, n_tasks=2, task_s={"inline": 1e-6}, efficiency={"inline": 1.0})
        with pytest.raises(LookupError, match="mine"):
            Parallel(require="sharedmem")(delayed(task)(i) for i in range(20))
        assert Parallel(require="sharedmem")(delayed(square)(i) for i in range(3)) == [0, 1, 4]


def test_no_more_than_n_jobs_run_with_the_caller_among_them():
    lock, running, most = threading.Lock(), [], []

    def task(i):
        with lock:
            running.append(i)
            most.append(len(running))
        time.sleep(0.005)  # long enough for the others to start, were they allowed to
        with lock:
            running.remove(i)
        return i

    with parallel_backend("hybrid", n_jobs=3):
        assert Parallel(require="sharedmem")(delayed(task)(i) for i in range(30)) == list(range(30))
    assert max(most) <= 3


# ---- the budget


def test_the_last_fold_of_three_has_both_cores_for_its_nested_calls():
    """Two run side by side with a core each; the third starts when nothing else waits or runs."""
    order = threading.Barrier(2)

    def task(i):
        if i < 2:
            order.wait(LONG)
        else:
            time.sleep(0.02)  # until the second has ended, too
        return joblib.effective_n_jobs(-1)

    with parallel_backend("hybrid", n_jobs=2, tier="threads"):
        shares = Parallel(batch_size=1)(delayed(task)(i) for i in range(3))
    assert shares[:2] == [max(1, joblib.cpu_count() // 2)] * 2


def test_nothing_is_learned_inside_tasks():
    def outer(i):
        return Parallel(n_jobs=2)(delayed(square)(j) for j in range(3))

    with parallel_backend("hybrid", n_jobs=2, tier="threads"):
        assert Parallel()(delayed(outer)(i) for i in range(2)) == [[0, 1, 4]] * 2
    assert "0 kinds" in repr(Profile.shared())


# ---- what must not depend on who runs a task


def test_a_task_that_runs_out_of_time_is_not_run_by_the_caller(tmp_path):
    with parallel_backend("hybrid", n_jobs=2):
        known_as(
            wait_for_go, str(tmp_path), solo_s=1e-6, n_tasks=2, task_s={"inline": 1e-6}, efficiency={"inline": 1.0}
        )
        for option in ({}, {"prefer": "threads"}):
            with pytest.raises(TimeoutError, match="timeout=0"):
                Parallel(timeout=0.2, **option)(delayed(wait_for_go)(str(tmp_path)) for _ in range(2))
        Path(tmp_path, "go").touch()


def wait_for_go(folder):
    return poll(lambda: Path(folder, "go").exists())


def poll(condition):
    """Wait inside of a task: without the collections of ``eventually``, which others would wait for."""
    end = time.monotonic() + LONG
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_task_on_threads_may_wait_for_tasks_that_are_not_dispatched_yet():
    """The first waits for all others, of which joblib has taken only a few from the generator when it starts."""
    inbox = queue.Queue()

    def task(i):
        return sorted(inbox.get(timeout=LONG) for _ in range(19)) if i == 0 else inbox.put(i)

    with parallel_backend("hybrid", n_jobs=2):
        results = Parallel(prefer="threads")(delayed(task)(i) for i in range(20))
    assert results == [list(range(1, 20)), *[None] * 19]


def wait_for_others(folder, i, n):
    Path(folder, f"{i}").touch()
    return i or poll(lambda: len(os.listdir(folder)) == n)


def test_a_task_in_the_caller_may_wait_for_tasks_of_workers_that_are_not_dispatched_yet(tmp_path):
    with parallel_backend("hybrid", n_jobs=2) as (backend, _):
        load_tier("processes").start_workers(backend.config, 2, frozenset())
        assert eventually(lambda: load_tier("processes").ready_counter(backend.config)(), seconds=LONG)
        results = Parallel()(delayed(wait_for_others)(str(tmp_path), i, 20) for i in range(20))
    assert results == [True, *range(1, 20)]
    assert last_report().tier.startswith("inline")


class OwnEstimator(BaseEstimator):
    """A user's estimator among scikit-learn's own."""


def test_nothing_of_a_call_runs_on_threads_beside_a_task_that_is_not_trusted():
    """Both would draw from the same global generators, and the caller's are not kept apart in a trusted call."""
    trusted, own = (
        Items((_transform_one, (step, np.zeros((3, 3)), {}), {})) for step in (StandardScaler(), OwnEstimator())
    )
    facts = Facts(trusted_on_threads=True, is_nested=True)
    pilot = Pilot(facts, Config())
    pilot.meet(trusted, 3)
    assert pilot.plan_for(trusted).tier == pilot.plan_for(own).tier == "inline"
    # Some run on threads now: neither they nor the caller may have it.
    assert pilot.replan(3, more_to_come=True, running=(0.2, 1, 1.0), in_caller=trusted)
    assert (pilot.plan_for(trusted).tier, pilot.plan_for(own).tier) == ("threads", "processes")
    # The caller has it already: no others on threads.
    pilot = Pilot(facts, Config())
    pilot.meet(trusted, 3)
    pilot.replan(3, more_to_come=True, running=(0.2, 1, 1.0), in_caller=own)
    assert pilot.plan_for(trusted).tier != "threads"


def limits_around_a_nested_call(_):
    import sklearn.ensemble  # noqa: F401  (loads OpenMP)

    def threads():
        return [pool["num_threads"] for pool in threadpool_info()]

    before = threads()
    during = Parallel(n_jobs=2, prefer="threads")(delayed(threads)() for i in range(2))
    return [before, *during, threads()]


def test_a_nested_call_in_the_caller_keeps_the_limits_of_the_task_that_it_is_in():
    with parallel_backend("hybrid", n_jobs=2, tier="processes", inner_max_num_threads=1):
        for before, _, _, after in Parallel(batch_size=1)(delayed(limits_around_a_nested_call)(i) for i in range(4)):
            assert {*before, *after} == {1}


def test_threads_go_back_to_the_crew_without_limits():
    def openmp(_):
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"]

    def meet(i):
        both.wait(LONG)
        return openmp(i)

    before, crew, both = openmp(0), Crew.shared(), threading.Barrier(2)
    with parallel_backend("hybrid", n_jobs=2, tier="threads", inner_max_num_threads=before[0] + 3):
        assert Parallel(batch_size=1)(delayed(meet)(i) for i in range(4)) == [[before[0] + 3] * len(before)] * 4
    # The next that the same threads do has nothing to do with that call.
    assert eventually(lambda: len(crew._roster.idle) >= 2, seconds=LONG)
    results = queue.Queue()
    for _ in range(len(crew._roster.idle)):
        crew.run(lambda: results.put((threading.get_ident(), openmp(0))))
        assert results.get(timeout=LONG)[1] == before
        # Behind the others, so that each has its turn.
        assert eventually(lambda: len(crew._roster.idle) >= 2, seconds=LONG)
        crew._roster.idle.rotate()


def test_the_initializer_is_pickled_once_a_call():
    class Counts:
        pickled = 0

        def __reduce__(self):
            Counts.pickled += 1
            return int, ()

    config = Config(initializer=square, initargs=(Counts(),))
    load_tier("processes")
    pilot = Pilot(Facts(), config, None)
    pilot.meet(Items((square, (1,), {})), 5)
    for _ in range(5):
        pilot.replan(3, more_to_come=True)
    assert Counts.pickled == 1
    assert not pilot._cannot_start


def test_help_comes_while_the_caller_is_in_a_task_however_long_that_was_expected_to_be():
    """Workers may have come, and nobody else would see that they did."""
    helped = threading.Event()
    relief = Relief(Crew.shared(), lambda may_complete: helped.set())
    with relief.standing_by(1, 1e6, may_complete=True):
        assert helped.wait(LONG)
    relief.end()


def test_batches_are_completed_in_the_end_even_beside_a_task_that_draws(monkeypatch):
    allowed, helped = [], threading.Event()

    def help_out(may_complete):
        allowed.append(may_complete)
        helped.set()
        time.sleep(0.01)

    relief = Relief(Crew.shared(), help_out)
    monkeypatch.setattr("joblib_backends.relief._MUST_COMPLETE_S", 1e6)
    with relief.standing_by(1, 0.0, may_complete=False):
        assert helped.wait(LONG)
        assert not any(allowed)
        monkeypatch.setattr("joblib_backends.relief._MUST_COMPLETE_S", 0.1)
        assert eventually(lambda: any(allowed), seconds=LONG)
    relief.end()


def seed_and_draw():
    np.random.seed(5)
    return np.random.rand()


class Seeds(BaseEstimator):
    """A user's estimator among scikit-learn's own, which seeds the global generator."""

    def fit(self, data, target=None):
        self.drawn_ = seed_and_draw()
        return self

    def transform(self, data):
        return data


def test_a_task_that_is_not_trusted_in_a_call_that_is_leaves_the_generator_alone():
    data = np.arange(12.0).reshape(4, 3)
    np.random.seed(0)
    expected = np.random.RandomState(0).rand()
    with parallel_backend("hybrid", n_jobs=2):
        union = FeatureUnion([("a", StandardScaler()), ("mine", Seeds()), ("c", StandardScaler())], n_jobs=2)
        fitted = union.fit(data).transformer_list[1][1].drawn_
    assert last_report().tier.startswith("inline")
    assert (np.random.rand(), fitted) == (expected, np.random.RandomState(5).rand())


def test_a_batch_that_must_not_stay_with_the_caller_any_more_is_put_back():
    """Between the moment in which the caller took it and that in which a helper could see that, others moved."""
    trusted, own = (
        Items((_transform_one, (step, np.zeros((3, 3)), {}), {})) for step in (StandardScaler(), OwnEstimator())
    )
    pilot = Pilot(Facts(trusted_on_threads=True, is_nested=True), Config())
    pilot.meet(trusted, 3)
    assert not pilot.has_left_caller(own)
    pilot.replan(3, more_to_come=True, running=(0.2, 1, 1.0))
    pilot.plan_for(trusted)
    assert pilot.has_left_caller(own)


def test_what_a_running_task_changes_is_not_trusted():
    class Changing(dict):
        def __iter__(self):
            raise RuntimeError("dictionary changed size during iteration")

    pilot = Pilot(Facts(trusted_on_threads=True), Config())
    assert not pilot._trusts(Items((clone, (Changing(a=1),), {})))
