"""How many cores a task may use, and the limits that keep it to them."""

import contextlib
import threading

import joblib
import pytest
from conftest import LONG
from threadpoolctl import threadpool_info

from joblib_backends.budget import (
    ProcessWideLimit,
    Share,
    available_cores,
    cores_for_batch,
    cores_per_task,
    is_daemonic,
    keep_limits,
    keep_thread_limits,
    limited,
    resolve_n_jobs,
    share_of,
    using,
)
from joblib_backends.config import Config

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def threads_of(api):
    from sklearn.utils import _openmp_helpers  # noqa: F401  loads an OpenMP runtime

    return [info["num_threads"] for info in threadpool_info() if info["user_api"] == api]


@pytest.fixture
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("n_jobs", "capacity", "expected"),
    [(1, 8, 1), (3, 8, 3), (50, 8, 50), (-1, 8, 8), (-2, 8, 7), (-8, 8, 1), (-20, 8, 1), (-1, 1, 1)],
)
def test_negative_n_jobs_count_from_the_capacity(n_jobs, capacity, expected):
    assert resolve_n_jobs(n_jobs, capacity) == expected


@pytest.mark.parametrize(
    ("cores", "n_jobs", "expected"), [(64, 5, 12), (64, 64, 1), (2, 8, 1), (8, 1, 8), (1, 1, 1), (4, 0, 4)]
)
def test_tasks_share_the_cores_and_never_get_none(cores, n_jobs, expected):
    assert cores_per_task(cores, n_jobs) == expected


def test_the_cores_are_joblibs_count_unless_a_share_was_given():
    assert available_cores(Config()) == joblib.cpu_count()
    assert available_cores(Config(cores=3)) == 3


def test_the_count_follows_lokys_variable(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert available_cores(Config()) == 1


def test_each_task_gets_its_share_of_threads(no_variables):
    assert share_of(Config(), 2) == Share(2, {"openmp": 2, "blas": 2})


def test_an_explicit_number_of_threads_wins(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert share_of(Config(inner_max_num_threads=5), 2) == Share(2, {"openmp": 5, "blas": 5})


@pytest.mark.parametrize(
    ("variable", "left"),
    [("OMP_NUM_THREADS", set()), ("OPENBLAS_NUM_THREADS", {"openmp"}), ("MKL_NUM_THREADS", {"openmp"})],
)
def test_what_the_user_fixed_by_a_variable_is_left_alone(no_variables, monkeypatch, variable, left):
    monkeypatch.setenv(variable, "3")
    assert share_of(Config(), 4).limits.keys() == left


@pytest.mark.parametrize(
    ("cores", "n_jobs", "left", "n_waiting", "more", "expected"),
    [
        # Five folds on 64 cores: each gets twelve, also the last to start, whose neighbours all still run.
        (64, 64, [], 4, False, 12),
        (64, 64, [1.0] * 4, 0, False, 12),
        # While the generator may yield more, every job counts.
        (64, 64, [], 4, True, 1),
        # Three folds on two cores: the last starts when one neighbour ends, and the other is about to.
        (2, 2, [], 2, False, 1),
        (2, 2, [0.03], 0, False, 2),
        (2, 2, [-0.2], 0, False, 2),
        # One that has been running for twice as long as expected may go on as long.
        (2, 2, [-1.0], 0, False, 1),
        (2, 2, [0.6], 0, False, 1),
        (2, 2, [0.03], 1, False, 1),
        # More batches than jobs never count twice.
        (8, 4, [1.0, 1.0], 20, False, 2),
        # More jobs than cores get one each.
        (2, 8, [1.0] * 7, 9, True, 1),
        (1, 1, [], 0, False, 1),
    ],
)
def test_a_batch_shares_the_cores_with_those_that_run_beside_it(cores, n_jobs, left, n_waiting, more, expected):
    assert cores_for_batch(cores, n_jobs, left, n_waiting, more_to_come=more) == expected


def test_nested_calls_find_the_share_of_their_task():
    outside = available_cores(Config())
    with using(3):
        assert available_cores(Config()) == 3
        with using(1):
            assert available_cores(Config(cores=2)) == 1
        assert available_cores(Config(cores=2)) == 3
        seen = []
        other = threading.Thread(target=lambda: seen.append(available_cores(Config())))
        other.start()
        other.join(LONG)
        assert seen == [outside]
    assert available_cores(Config()) == outside


def test_this_process_is_no_daemon():
    assert not is_daemonic()


def test_a_process_wide_limit_ends_with_its_block():
    before, limit = threads_of("blas"), ProcessWideLimit()
    with limit.applied({"blas": 1}):
        assert set(threads_of("blas")) == {1}
    assert threads_of("blas") == before


def test_the_lowest_limit_wins_while_several_calls_run():
    """The first to begin is the first to end."""
    limit = ProcessWideLimit()
    wide, narrow = limit.applied({"blas": 2}), limit.applied({"blas": 1})
    before = threads_of("blas")
    wide.__enter__()
    narrow.__enter__()
    assert set(threads_of("blas")) == {1}
    wide.__exit__(None, None, None)
    assert set(threads_of("blas")) == {1}
    narrow.__exit__(None, None, None)
    assert threads_of("blas") == before


def test_a_limit_holds_and_goes_whichever_thread_was_first():
    """threadpoolctl 3.8 listens to the first thread that limited OpenBLAS, and to no other."""
    before, limit = threads_of("blas"), ProcessWideLimit()
    with limit.applied({"blas": 1}):
        pass

    block = limit.applied({"blas": 1})
    assert set(in_a_thread(lambda: block.__enter__() or threads_of("blas"))) == {1}
    block.__exit__(None, None, None)
    assert threads_of("blas") == before


def test_no_limit_changes_nothing():
    before, limit = threads_of("blas"), ProcessWideLimit()
    with limit.applied({}), limited({}):
        assert threads_of("blas") == before


def test_limits_in_a_foreign_thread_are_put_back_after_an_error():
    before = threads_of("blas"), threads_of("openmp")
    with contextlib.suppress(KeyError), limited({"blas": 1, "openmp": 1}):
        assert set(threads_of("blas") + threads_of("openmp")) == {1}
        raise KeyError
    assert (threads_of("blas"), threads_of("openmp")) == before


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(LONG)
    return found[0]


def test_a_thread_keeps_its_own_openmp_limit_and_leaves_blas_alone():
    before = threads_of("blas"), threads_of("openmp")

    def work():
        keep_thread_limits({"openmp": 1, "blas": 1})
        return threads_of("openmp"), threads_of("blas")

    assert in_a_thread(work) == ([1] * len(before[1]), before[0])
    assert threads_of("openmp") == before[1]


def test_kept_limits_change_and_go():
    def work():
        seen = [threads_of("openmp")]
        for limits in ({"openmp": 1}, {"openmp": 3}, {}):
            keep_limits(limits)
            seen.append(threads_of("openmp"))
        return seen

    before, one, three, after = in_a_thread(work)
    assert (set(one), set(three), after) == ({1}, {3}, before)
