"""What becomes of a batch that was lost: the rules, and what a call makes of them on a tier that a test controls."""

import itertools
import threading
import time

import pytest
from joblib import Parallel, delayed, parallel_backend
from joblib.parallel import BatchedCalls

from joblib_backends import RecoveryWarning, WorkerLostError, last_report
from joblib_backends.batches import Batch, BatchFuture, Parts
from joblib_backends.config import Config
from joblib_backends.errors import (
    BatchDataLostError,
    ClusterLostError,
    ClusterUnavailableError,
    DataLostError,
    HybridError,
    TaskTimeoutError,
)
from joblib_backends.recovery import failed_results, failure_of, is_fault, next_step, pieces_of, warn
from joblib_backends.tiers.fake import fake_control

NESTED = (None, None)


def batch_of(*arguments, first_task=0):
    function = BatchedCalls([(abs, (argument,), {}) for argument in arguments], NESTED)
    return Batch(BatchFuture(None, len(arguments)), function, NESTED, first_task)


def lost(n_deaths=1):
    return WorkerLostError("a worker died", n_deaths=n_deaths, how="it was killed by SIGKILL")


# ---- rules


@pytest.mark.parametrize(
    ("retries", "n_deaths", "steps"),
    [
        (0, 1, ["give up"]),
        (1, 1, ["run again", "give up"]),
        (2, 1, ["run again", "run again", "give up"]),
        # A Dask scheduler has let four workers die over it: one more try, alone.
        (2, 4, ["run again", "give up"]),
        (0, 4, ["give up"]),
        # No worker could be had at all: to ask again does not help.
        (2, 0, ["fail"]),
    ],
)
def test_a_batch_whose_worker_died_runs_again_as_often_as_retries_allow(retries, n_deaths, steps):
    batch, config = batch_of(-1), Config(retries=retries)
    assert [next_step(batch, lost(n_deaths), config) for _ in steps] == steps


def test_the_last_try_is_alone():
    batch, config = batch_of(-1), Config(retries=2)
    alone = []
    while next_step(batch, lost(), config) == "run again":
        [piece] = pieces_of(batch, config)
        alone.append(piece.is_alone)
    assert alone == [False, True]


def test_of_several_tasks_each_runs_by_itself_even_without_retries():
    batch, config = batch_of(-1, -2), Config(retries=0)
    assert next_step(batch, lost(), config) == "run again"
    assert [next_step(piece, lost(), config) for piece in pieces_of(batch, config)] == ["give up", "give up"]


def test_a_batch_of_several_tasks_runs_task_by_task_and_not_one_at_a_time():
    batch, config = batch_of(-1, -2, -3), Config(retries=1)
    assert next_step(batch, lost(), config) == "run again"
    pieces = pieces_of(batch, config)
    assert [piece.items[0][1] for piece in pieces] == [(-1,), (-2,), (-3,)]
    assert not any(piece.is_alone for piece in pieces)
    assert {piece.n_lost for piece in pieces} == {1}


@pytest.mark.parametrize(
    ("fault", "options", "step"),
    [
        (ClusterLostError("gone"), {}, "leave the cluster"),
        (ClusterLostError("gone"), {"fallback": False}, "fail"),
        (ClusterUnavailableError("no answer"), {}, "leave the cluster"),
        (TaskTimeoutError("late"), {}, "give up"),
        (DataLostError("deleted"), {}, "place again"),
        (DataLostError("deleted"), {"retries": 0}, "place again"),
    ],
)
def test_other_losses_have_one_answer(fault, options, step):
    assert is_fault(fault)
    assert next_step(batch_of(-1), fault, Config(**options)) == step


def test_data_that_is_gone_again_and_again_ends_the_call():
    batch, fault = batch_of(-1), BatchDataLostError(2, "is gone", "/a/file")
    assert [next_step(batch, fault, Config()) for _ in range(3)] == ["place again", "place again", "fail"]
    failure = failure_of(batch, fault, Config())
    assert type(failure) is DataLostError
    assert "/a/file" in str(failure)


def test_what_a_task_raises_is_no_fault():
    assert not is_fault(KeyError("the task's"))
    assert not is_fault(HybridError("ours, and not a tier's"))
    assert not is_fault(None)


# ---- what the user reads


def test_the_error_names_function_task_and_arguments():
    batch, config = batch_of(-41, -42, first_task=7), Config(retries=1)
    next_step(batch, lost(), config)
    piece = pieces_of(batch, config)[1]
    assert next_step(piece, lost(), config) == "give up"
    fault = WorkerLostError("died", exit_code=-9, peak_nbytes=123_000_000, how="it was killed by SIGKILL")
    failure = failure_of(piece, fault, config)
    assert "abs, task 8 (-42), died: it was killed by SIGKILL. It had used 123 MB." in str(failure)
    assert "It was tried 2 times (retries=1)." in str(failure)
    assert (failure.exit_code, failure.peak_nbytes) == (-9, 123_000_000)
    assert failure.__cause__ is fault


def test_long_arguments_are_cut():
    text = str(failure_of(batch_of("x" * 10_000), lost(), Config()))
    assert len(text) < 600


def test_a_call_that_is_no_search_has_no_score():
    assert failed_results(batch_of(-1), lost()) is None


def test_a_warning_is_of_our_own_kind():
    with pytest.warns(RecoveryWarning, match="was lost"):
        warn("Something was lost.")


# ---- parts of a batch


def test_a_batch_is_done_when_all_of_its_parts_are():
    parts = Parts(3)
    assert not parts.put([2], ["c"])
    assert parts.put([0, 1], ["a", "b"])
    assert parts.results == ["a", "b", "c"]


def test_a_batch_with_a_part_that_was_given_up_ends_with_its_last_part():
    parts = Parts(3)
    assert not parts.give_up([1])
    assert not parts.put([0], ["a"])
    assert parts.put([2], ["c"])
    assert parts.has_failed


# ---- in a call


def test_a_lost_batch_of_many_tasks_gives_all_results():
    with fake_control() as control, parallel_backend("hybrid", tier="fake", n_jobs=2):
        control.lose_next()
        assert Parallel(batch_size=5)(delayed(abs)(-i) for i in range(12)) == list(range(12))
    report = last_report()
    assert (report.tasks, report.lost_workers, report.retries) == (12, 1, 1)
    assert "1 workers lost, 1 batches run again" in str(report)


@pytest.mark.parametrize("form", ["list", "generator", "generator_unordered"])
def test_the_call_ends_with_what_was_given_up_when_all_else_is_done(form):
    done = []
    with fake_control() as control, parallel_backend("hybrid", tier="fake", n_jobs=2, retries=0):
        control.lose_next()
        with pytest.raises(WorkerLostError, match=r"task 0 \("):
            list(Parallel(batch_size=1, return_as=form, pre_dispatch=2)(delayed(done.append)(i) for i in range(9)))
        # The fake tier runs copies of what it is sent.
        assert len(control.submitted) == 9


def stuck_at(i, at):
    if i == at:
        threading.Event().wait(5)
    return i


def test_siblings_of_a_task_that_was_given_up_run_before_the_call_ends(tmp_path):
    def task(i):
        (tmp_path / str(i)).touch()
        return stuck_at(i, 1)

    with (
        parallel_backend("hybrid", tier="threads", n_jobs=2, task_timeout=1),
        pytest.raises(
            TaskTimeoutError,
            match=r"task 1 \(1\), ran longer than task_timeout=1 seconds, and its thread was left to itself",
        ),
    ):
        Parallel(batch_size=6)(delayed(task)(i) for i in range(6))
    assert len(list(tmp_path.iterdir())) == 6


def test_a_failure_after_a_task_was_given_up_leaves_the_rest_of_the_input_alone():
    taken = itertools.count()
    n_taken = 0

    def source():
        nonlocal n_taken
        for i in itertools.count():
            n_taken = next(taken)
            yield delayed(fails_at)(i, 9)

    with fake_control() as control, parallel_backend("hybrid", tier="fake", n_jobs=2, retries=0):
        control.lose_next()
        results = Parallel(return_as="generator", batch_size=1)(source())
        end = time.monotonic() + 60
        while n_taken < 9 and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(KeyError):
            list(results)
    assert n_taken < 100


def fails_at(i, at):
    if i == at:
        raise KeyError(i)
    return i


def test_a_timeout_of_the_call_does_not_hide_what_was_given_up():
    with (
        parallel_backend("hybrid", tier="threads", n_jobs=2, task_timeout=1),
        pytest.raises(TaskTimeoutError, match="task 0"),
    ):
        Parallel(timeout=1.5)(delayed(time.sleep)(seconds) for seconds in (4, *60 * [0.05]))


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_ends_the_call_and_hangs_nobody():
    from sklearn.datasets import load_iris
    from sklearn.model_selection import cross_validate
    from sklearn.tree import DecisionTreeClassifier

    data = load_iris(return_X_y=True)
    with fake_control() as control, parallel_backend("hybrid", tier="fake", n_jobs=2, retries=0):
        control.lose_next()
        with pytest.raises(RecoveryWarning, match="gets its error_score"):
            cross_validate(DecisionTreeClassifier(random_state=0), *data, cv=3)
