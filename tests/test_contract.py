"""joblib's contract, written once and run on every tier.

Rendezvous instead of sleeps: threading events where memory is shared, files (``wait_for``) where it is not.
"""

import contextlib
import gc
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from concurrent.futures import CancelledError
from pathlib import Path

import joblib
import numpy as np
import psutil
import pytest
from conftest import LONG, REAL_TIERS, eventually, make_hybrid
from endings import end_process
from joblib import Parallel, delayed, parallel_backend, parallel_config
from sklearn.utils import _openmp_helpers  # noqa: F401  loads an OpenMP runtime, in workers too
from threadpoolctl import threadpool_info

import joblib_backends
from joblib_backends import HybridBackend, WorkerLostError, last_report
from joblib_backends.scheduler import Call
from joblib_backends.workers.pool import WorkerPool

#: Tiers that run several tasks at once.
PARALLEL_TIERS = ["threads", "processes", "dask"]

FORMS = ["list", "generator", "generator_unordered"]


# ---- tasks: at module level, so that they pickle


def square(i):
    return i * i


def identity(value):
    return value


def pid(_=None):
    return os.getpid()


def worker(_=None):
    return os.getpid(), threading.get_ident()


def wait_for(condition):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "The rendezvous never came."
        time.sleep(0.005)


def mark(folder, name):
    Path(folder, name).touch()


def marks(folder, start):
    return [name for name in os.listdir(folder) if name.startswith(start)]


def meet(folder, n_expected, index):
    """Wait until ``n_expected`` tasks are inside."""
    mark(folder, f"in-{index}")
    wait_for(lambda: len(marks(folder, "in-")) >= n_expected)
    return index


def most_at_once(folder, allowed, index):
    """Return how many tasks were inside while this one was; give one too many a moment to come."""
    mark(folder, f"in-{index}")
    most, end = 1, time.monotonic() + 0.05
    while time.monotonic() < end and most <= allowed:
        most = max(most, len(marks(folder, "in-")))
        time.sleep(0.005)
    os.unlink(Path(folder, f"in-{index}"))
    return most


def fail_or_wait(folder, index):
    if index == 0:
        raise KeyError("the first")
    mark(folder, f"started-{index}")
    wait_for(lambda: Path(folder, "go").exists())
    mark(folder, f"ended-{index}")


def hold(folder, index):
    mark(folder, f"started-{index}")
    wait_for(lambda: Path(folder, "go").exists())
    return index


def raises(error):
    raise error


def raises_unless_zero(error, index):
    if index:
        raise error
    return index


def compiled_frame():
    raise ZeroDivisionError("in the worker")


def nested(depth, n_jobs):
    """Return the workers of the innermost tasks, ``depth`` levels down."""
    if depth == 0:
        return {worker()}
    return set().union(*Parallel(n_jobs=n_jobs)(delayed(nested)(depth - 1, n_jobs) for _ in range(2)))


def nested_shapes():
    return [(type(joblib.parallel.get_active_backend()[0]).__name__, joblib.effective_n_jobs(-1))]


def library_threads(_=None):
    return {info["user_api"]: info["num_threads"] for info in threadpool_info()}


def note_process(folder, *_):
    Path(folder, f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}").touch()


def fail_to_initialize():
    raise LookupError("no licence for this worker")


_INITIALIZED_BY = []


def initialize_as(name):
    _INITIALIZED_BY.append(name)


def initialized_by(_):
    return list(_INITIALIZED_BY)


class Unpicklable:
    def __reduce__(self):
        raise TypeError("stays at home")


def run_script(source, *arguments, timeout=LONG, **options):
    """Run ``source`` in a fresh interpreter, which dies with this test."""
    script = textwrap.dedent(source)
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parent, **options,
    )  # fmt: skip


# ---- how many


@pytest.mark.parametrize("n_jobs", [1, 2, 3, -1, -2, None, np.int64(2), np.int32(-1), 8])
def test_every_form_of_n_jobs_returns_the_results_in_order(hybrid, n_jobs):
    with hybrid():
        assert Parallel(n_jobs=n_jobs)(delayed(square)(i) for i in range(7)) == [i * i for i in range(7)]


def test_zero_jobs_are_refused(hybrid):
    with hybrid(), pytest.raises(ValueError, match="n_jobs == 0 in Parallel has no meaning"):
        Parallel(n_jobs=0)(delayed(square)(i) for i in range(2))


def test_one_job_runs_in_the_callers_own_thread(hybrid):
    with hybrid(n_jobs=1):
        assert set(Parallel()(delayed(worker)() for _ in range(4))) == {worker()}


def test_no_more_tasks_run_at_once_than_n_jobs_allows(hybrid, tier, tmp_path):
    """The pool is wider than the call: it was made for four jobs before."""
    with hybrid(n_jobs=4):
        Parallel(batch_size=1)(delayed(square)(i) for i in range(8))
        found = Parallel(n_jobs=2, batch_size=1)(delayed(most_at_once)(tmp_path, 2, i) for i in range(8))
    assert max(found) <= (2 if tier in PARALLEL_TIERS else 1)


def test_no_more_tasks_run_at_once_on_a_wider_cluster(tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "threads_per_worker": 4, "processes": False, "dashboard_address": ":0"}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        parallel_backend("hybrid", client=client, n_jobs=2),
    ):
        found = Parallel(batch_size=1)(delayed(most_at_once)(tmp_path, 2, i) for i in range(8))
    assert max(found) <= 2


@pytest.mark.parametrize("tier", PARALLEL_TIERS)
def test_as_many_tasks_run_at_once_as_n_jobs_says(tier, hybrid, tmp_path):
    with hybrid(n_jobs=2):
        assert Parallel(batch_size=1)(delayed(meet)(tmp_path, 2, i) for i in range(2)) == [0, 1]


def test_more_jobs_than_cores_run_at_once_where_asked_for(tmp_path):
    with parallel_backend("hybrid", tier="threads"):
        assert Parallel(n_jobs=9, batch_size=1)(delayed(meet)(tmp_path, 9, i) for i in range(9)) == [*range(9)]


def with_context_of_parallel_backend():
    with parallel_backend("hybrid"):
        return Parallel()


def with_context_of_parallel_config():
    with parallel_config("hybrid"):
        return Parallel()


@pytest.mark.parametrize(
    "open_parallel",
    [
        with_context_of_parallel_backend,
        with_context_of_parallel_config,
        lambda: Parallel(backend="hybrid"),
        lambda: Parallel(backend=HybridBackend()),
    ],
)
def test_every_way_to_select_the_backend_means_all_cores(open_parallel):
    assert joblib.cpu_count() == open_parallel()._effective_n_jobs()


# ---- results


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_return_each_result_once(hybrid, form):
    with hybrid():
        results = list(Parallel(return_as=form)(delayed(square)(i) for i in range(40)))
    expected = [i * i for i in range(40)]
    assert (sorted(results) if form == "generator_unordered" else results) == expected


@pytest.mark.parametrize("tier", [*PARALLEL_TIERS])
def test_an_unordered_generator_yields_what_is_done_first(tier, hybrid, tmp_path):
    with hybrid():
        batches = [delayed(hold)(tmp_path, 0), delayed(identity)(1)]
        results = Parallel(return_as="generator_unordered", batch_size=1)(batches)
        first = next(results)
        mark(tmp_path, "go")
        assert [first, *results] == [1, 0]


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_generator_dropped_half_way_leaves_nothing(hybrid, form, leaves_nothing):
    with hybrid():
        results = Parallel(return_as=form, pre_dispatch=4, batch_size=1)(delayed(square)(i) for i in itertools.count())
        next(results)
        with pytest.warns(UserWarning, match="adjusting the input task iterator"):
            results.close()
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_generator_may_be_consumed_after_the_context(hybrid, form, leaves_nothing):
    with hybrid():
        results = Parallel(return_as=form, batch_size=1)(delayed(square)(i) for i in range(20))
    assert sorted(results) == [i * i for i in range(20)]


@pytest.mark.parametrize("tier", ["threads", "processes", "dask", "fake"])
def test_the_input_may_wait_for_the_consumer_of_the_output(tier, hybrid, tmp_path):
    """The consumer is away with the first result while the input waits for it, in a thread of ours.

    joblib holds a lock while it advances the input, so the consumer must not need the next result meanwhile.
    """
    waits, released = threading.Event(), threading.Event()

    def tasks():
        yield delayed(identity)(0)
        yield from (delayed(hold)(tmp_path, i) for i in range(1, 4))
        waits.set()
        assert released.wait(LONG)
        yield from (delayed(identity)(i) for i in range(4, 8))

    with hybrid():
        results = Parallel(return_as="generator", pre_dispatch=2, batch_size=1)(tasks())
        first = next(results)
        mark(tmp_path, "go")
        assert waits.wait(LONG)
        released.set()
        assert [first, *results] == [*range(8)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pre_dispatch", ["2*n_jobs", "all"])
def test_an_empty_input_gives_an_empty_output(hybrid, form, pre_dispatch):
    exhausted = iter([delayed(square)(1)])
    next(exhausted)
    with hybrid():
        for empty in ([], (), exhausted):
            assert list(Parallel(return_as=form, pre_dispatch=pre_dispatch)(empty)) == []


# ---- input


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "n_good"), [(ValueError, 0), (ValueError, 7), (SystemExit, 7)])
def test_what_the_input_raises_ends_the_call(hybrid, form, kind, n_good):
    def tasks():
        yield from (delayed(square)(i) for i in range(n_good))
        raise kind("input")

    with hybrid():
        with pytest.raises(kind, match="input"):
            list(Parallel(return_as=form, pre_dispatch=2, batch_size=1)(tasks()))
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]


@pytest.mark.parametrize("form", ["list", "generator"])
@pytest.mark.parametrize("tier", PARALLEL_TIERS)
def test_what_the_input_raises_does_not_wait_for_tasks_that_run(tier, hybrid, form, tmp_path):
    """The task 0 holds a worker until the call is over."""

    def tasks():
        yield delayed(hold)(tmp_path, 0)
        yield delayed(square)(1)
        wait_for(lambda: marks(tmp_path, "started-0"))
        raise ValueError("input")

    with hybrid():
        with pytest.raises(ValueError, match="input"):
            list(Parallel(return_as=form, pre_dispatch=2, batch_size=1)(tasks()))
        mark(tmp_path, "go")


@pytest.mark.parametrize(("pre_dispatch", "most"), [(3, 3), ("2*n_jobs", 4), ("n_jobs + 1", 3), ("all", 30)])
def test_the_input_is_consumed_no_further_than_pre_dispatch(hybrid, tier, tmp_path, pre_dispatch, most):
    if tier == "inline":
        pytest.skip("nothing runs before it is asked for: the test below counts there")
    taken = itertools.count()

    def tasks():
        for i in range(30):
            next(taken)
            yield delayed(hold)(tmp_path, i)

    with hybrid():
        results = Parallel(return_as="generator", pre_dispatch=pre_dispatch, batch_size=1)(tasks())
        assert next(taken) == most
        mark(tmp_path, "go")
        assert list(results) == [*range(30)]


def test_inline_takes_a_task_when_it_has_run_one():
    taken = []
    tasks = (delayed(square)(taken.append(i) or i) for i in range(10))
    with parallel_backend("hybrid", tier="inline", n_jobs=2):
        results = Parallel(return_as="generator", pre_dispatch=2, batch_size=1)(tasks)
        assert taken == [0, 1]
        assert list(results) == [i * i for i in range(10)]


@pytest.mark.parametrize("batch_size", [1, 3, 100, "auto", np.int64(2)])
def test_every_batch_size_returns_every_result(hybrid, batch_size):
    with hybrid():
        call = Parallel(batch_size=batch_size)
        assert call(delayed(square)(i) for i in range(50)) == [i * i for i in range(50)]


def test_a_given_batch_size_is_kept(hybrid):
    with hybrid():
        Parallel(batch_size=5, pre_dispatch="all")([delayed(square)(i) for i in range(20)])
    report = last_report()
    assert (report.tasks, report.batches) == (20, 4)


@pytest.mark.parametrize("tier", PARALLEL_TIERS)
def test_automatic_batches_grow_when_tasks_are_short(tier, hybrid):
    with hybrid():
        Parallel()(delayed(square)(i) for i in range(3000))
    assert last_report().batches < 1500


# ---- words


def test_verbose_prints_what_joblib_prints(hybrid, capsys):
    with hybrid():
        Parallel(verbose=10, batch_size=1)([delayed(square)(i) for i in range(10)])
    text = capsys.readouterr().err
    assert "[Parallel(n_jobs=2)]: Using backend HybridBackend with 2 concurrent workers." in text
    assert re.search(r"Done 10 out of 10 \| elapsed: .* finished", text)


def test_very_verbose_prints_to_stdout(hybrid, capsys):
    with hybrid():
        Parallel(verbose=51)([delayed(square)(i) for i in range(4)])
    assert "Done   4 out of   4" in capsys.readouterr().out.replace("Done 4 out of 4", "Done   4 out of   4")


def test_a_quiet_call_prints_nothing(hybrid, capfd):
    with hybrid():
        Parallel()(delayed(square)(i) for i in range(10))
    assert capfd.readouterr() == ("", "")


# ---- time


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tier", PARALLEL_TIERS)
def test_a_timeout_ends_the_call_and_the_next_one_works(tier, hybrid, form, tmp_path):
    with hybrid():
        Parallel()(delayed(square)(i) for i in range(2))
        with pytest.raises(multiprocessing.TimeoutError) as caught:
            list(Parallel(timeout=0.2, return_as=form, batch_size=1)(delayed(hold)(tmp_path, i) for i in range(4)))
        # joblib itself watches the time of this form, and raises its own.
        assert isinstance(caught.value, TimeoutError) or form == "generator_unordered"
        mark(tmp_path, "go")
        assert Parallel(timeout=LONG)(delayed(square)(i) for i in range(3)) == [0, 1, 4]


def test_a_timeout_says_what_was_waited_for(tmp_path):
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        with pytest.raises(joblib_backends.BatchTimeoutError, match=r"batch of hold had no result after timeout=0.1 "):
            Parallel(timeout=0.1)(delayed(hold)(tmp_path, i) for i in range(2))
        mark(tmp_path, "go")


# ---- errors


@pytest.mark.parametrize(
    ("form", "kind", "arguments"),
    [
        ("list", KeyError, ("lost",)),
        ("generator", KeyError, ("lost",)),
        ("generator_unordered", KeyError, ("lost",)),
        ("list", TimeoutError, ("mine",)),
        ("generator_unordered", TimeoutError, ("mine",)),
        ("generator", CancelledError, ("mine",)),
        ("list", KeyboardInterrupt, ("mine",)),
        ("list", SystemExit, ("mine",)),
        ("generator_unordered", SystemExit, ("mine",)),
        ("list", OSError, (28, "No space left")),
    ],
)
def test_an_exception_of_a_task_arrives_as_it_is(hybrid, form, kind, arguments):
    with hybrid():
        with pytest.raises(kind) as caught:
            list(Parallel(return_as=form)(delayed(raises_unless_zero)(kind(*arguments), i) for i in range(4)))
        assert (type(caught.value), caught.value.args) == (kind, arguments)
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]


def test_a_task_that_raises_stop_iteration_does_not_end_the_results_early(hybrid):
    with hybrid(), pytest.raises(RuntimeError, match="raised StopIteration"):
        Parallel()(delayed(raises_unless_zero)(StopIteration(), i) for i in range(4))


def test_an_exception_shows_the_line_of_the_worker(hybrid):
    with hybrid(), pytest.raises(ZeroDivisionError) as caught:
        Parallel()(delayed(compiled_frame)() for _ in range(2))
    text = "".join(traceback.format_exception(caught.value))
    assert "in compiled_frame" in text
    assert 'raise ZeroDivisionError("in the worker")' in text


@pytest.mark.parametrize("form", FORMS)
def test_the_first_failure_ends_the_call_before_the_others_run(hybrid, tier, form, tmp_path):
    with hybrid():
        tasks = (delayed(fail_or_wait)(tmp_path, i) for i in range(30))
        with pytest.raises(KeyError, match="the first"):
            list(Parallel(return_as=form, batch_size=1, pre_dispatch="all")(tasks))
        assert not marks(tmp_path, "ended-")
        mark(tmp_path, "go")
        Parallel()(delayed(square)(i) for i in range(4))
    # Dask holds ten batches per job, and hears of the end in its own time.
    assert len(marks(tmp_path, "started-")) <= (20 if tier == "dask" else 4)


def test_one_parallel_object_serves_many_calls_and_keeps_its_settings(hybrid, tmp_path, leaves_nothing):
    with hybrid(), Parallel(batch_size=1, timeout=LONG) as parallel:
        for _ in range(3):
            assert parallel(delayed(square)(i) for i in range(6)) == [i * i for i in range(6)]
            with pytest.raises(KeyError):
                parallel(delayed(raises_unless_zero)(KeyError(1), i) for i in range(6))
            assert last_report().failed
        backend = parallel._backend
        parallel(delayed(square)(i) for i in range(4))
        assert (parallel._backend, last_report().batches, last_report().n_jobs) == (backend, 4, 2)


def test_workers_are_kept_between_the_calls_of_a_context():
    WorkerPool.close_all()  # an earlier test may have asked for more
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        found = set(Parallel(batch_size=1)(delayed(pid)() for _ in range(8)))
        with Parallel(n_jobs=2, batch_size=1) as parallel:
            for _ in range(5):
                found |= set(parallel(delayed(pid)() for _ in range(4)))
    assert len(found) <= 2


# ---- several at once


def test_one_instance_serves_several_threads_at_once(tier, request):
    client = request.getfixturevalue("dask_client") if tier == "dask" else None
    backend, together, answers = HybridBackend(tier, client=client), threading.Barrier(6, timeout=LONG), {}

    def call(k):
        together.wait()
        for _ in range(4):
            answers.setdefault(k, []).append(
                Parallel(n_jobs=2, backend=backend)(delayed(identity)((k, i)) for i in range(9))
            )

    threads = [threading.Thread(target=call, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert answers == {k: 4 * [[(k, i) for i in range(9)]] for k in range(6)}
    backend.close()


def tasks_that_do_not_start():
    """The other call may have all workers: fail without one."""
    yield delayed(square)(1)
    raise LookupError("mine")


def test_an_error_in_one_thread_leaves_the_call_of_another_alone(tier, request, tmp_path):
    if tier in ("inline", "fake"):
        pytest.skip("this tier runs one task at a time")
    client = request.getfixturevalue("dask_client") if tier == "dask" else None
    backend, answers = HybridBackend(tier, client=client), []

    def call():
        answers.append(Parallel(n_jobs=2, backend=backend, batch_size=1)(delayed(hold)(tmp_path, i) for i in (0, 1)))

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: marks(tmp_path, "started-"))
    with pytest.raises(LookupError, match="mine"):
        Parallel(n_jobs=2, backend=backend)(tasks_that_do_not_start())
    mark(tmp_path, "go")
    thread.join(LONG)
    assert answers == [[0, 1]]


@pytest.mark.parametrize("theirs", ["loky", "threading"])
def test_joblibs_own_backends_are_never_disturbed(tier, request, theirs):
    hybrid = make_hybrid(tier, request)
    with parallel_backend(theirs, n_jobs=2), Parallel(batch_size=1) as parallel:
        before = set(parallel(delayed(pid)() for _ in range(20)))
        with hybrid(), pytest.raises(KeyError):
            Parallel()(delayed(raises)(KeyError(1)) for _ in range(4))
        after = set(parallel(delayed(pid)() for _ in range(20)))
    assert len(before | after) <= (2 if theirs == "loky" else 1)
    joblib.externals.loky.get_reusable_executor().shutdown(wait=True)


# ---- initializers


@pytest.mark.parametrize("tier", ["processes", "dask"])
def test_an_initializer_runs_once_per_worker_process(tier, hybrid, tmp_path):
    with hybrid(initializer=note_process, initargs=(str(tmp_path),)):
        pids = {p for _ in range(3) for p in Parallel(batch_size=1)(delayed(pid)() for _ in range(6))}
    noted = [int(name.split("-")[0]) for name in os.listdir(tmp_path)]
    assert sorted(noted) == sorted(set(noted))
    assert pids <= set(noted)


@pytest.mark.parametrize("tier", ["inline", "threads"])
def test_an_initializer_runs_once_per_worker_thread_of_a_call(tier, hybrid, tmp_path):
    with hybrid(initializer=note_process, initargs=(str(tmp_path),)):
        idents = {ident for _, ident in Parallel(batch_size=1)(delayed(worker)() for _ in range(12))}
    noted = [int(name.split("-")[1]) for name in os.listdir(tmp_path)]
    assert sorted(noted) == sorted(set(noted))
    assert idents <= set(noted)


def test_an_initializer_that_fails_ends_the_call_with_its_error(hybrid):
    with hybrid(initializer=fail_to_initialize), pytest.raises(LookupError, match="no licence for this worker"):
        Parallel()(delayed(square)(i) for i in range(4))


@pytest.mark.parametrize("tier", ["processes", "dask", "fake"])
def test_an_initializer_that_cannot_be_pickled_is_named(tier, hybrid):
    with (
        hybrid(initializer=initialize_as, initargs=(Unpicklable(),)),
        pytest.raises(joblib_backends.TaskPicklingError, match="The initializer initialize_as or its initargs"),
    ):
        Parallel()(delayed(square)(i) for i in range(4))


def test_workers_of_different_initializers_are_different():
    def open_backend(name):
        return parallel_backend("hybrid", tier="processes", n_jobs=2, initializer=initialize_as, initargs=(name,))

    with open_backend("a"):
        for_a = Parallel(batch_size=1)(delayed(initialized_by)(i) for i in range(6))
        with open_backend("b"):
            for_b = Parallel(batch_size=1)(delayed(initialized_by)(i) for i in range(6))
        again = Parallel(batch_size=1)(delayed(initialized_by)(i) for i in range(6))
    assert (for_a, for_b, again) == (6 * [["a"]], 6 * [["b"]], 6 * [["a"]])


# ---- threads of libraries


def test_inner_max_num_threads_holds_inside_tasks_and_not_after_them(hybrid):
    before = library_threads()
    with hybrid(inner_max_num_threads=1):
        inside = Parallel(batch_size=1)(delayed(library_threads)() for _ in range(4))
    assert inside == 4 * [dict.fromkeys(before, 1)]
    assert library_threads() == before


def test_inner_max_num_threads_may_be_more_than_the_share(hybrid):
    with hybrid(inner_max_num_threads=3):
        inside = Parallel(batch_size=1)(delayed(library_threads)() for _ in range(2))
    assert [info["openmp"] for info in inside] == [3, 3]


def test_the_limits_of_the_parent_come_back_after_an_error(hybrid):
    before = library_threads()
    with hybrid(inner_max_num_threads=1), pytest.raises(KeyError):
        Parallel()(delayed(raises)(KeyError(1)) for _ in range(3))
    assert eventually(lambda: library_threads() == before)


# ---- nesting


@pytest.mark.parametrize("n_jobs", [2, -1])
def test_calls_nest_four_deep(hybrid, n_jobs):
    with hybrid():
        assert len(nested(4, n_jobs)) >= 1


@pytest.mark.parametrize("inner", ["inline", "threads", "processes", "fake"])
def test_tiers_nest_in_each_other(hybrid, inner):
    def both(i):
        with parallel_backend("hybrid", tier=inner, n_jobs=2):
            return Parallel()(delayed(square)(i + k) for k in range(3))

    with hybrid():
        expected = [[(i + k) ** 2 for k in range(3)] for i in range(4)]
        assert Parallel()(delayed(both)(i) for i in range(4)) == expected


@pytest.mark.parametrize("tier", ["inline", "threads", "processes", "fake"])
def test_nested_calls_for_all_cores_never_multiply(tier, hybrid):
    """Four levels of n_jobs=-1 below two jobs use no more workers than there are cores."""
    with hybrid(n_jobs=joblib.cpu_count()):
        workers = Parallel(batch_size=1)(delayed(nested)(3, -1) for _ in range(6))
    assert len(set().union(*workers)) <= joblib.cpu_count()


def test_nested_calls_without_n_jobs_run_one_after_the_other(hybrid):
    with hybrid():
        workers = Parallel(batch_size=1)(delayed(nested)(1, None) for _ in range(2))
    assert [len(found) for found in workers] == [1, 1]


def test_tasks_see_our_backend_as_the_active_one(hybrid):
    with hybrid():
        ((name, _),) = Parallel(batch_size=1)(delayed(nested_shapes)() for _ in range(2))[0]
    assert name == "HybridBackend"


def test_nested_backends_pickle(hybrid):
    with hybrid() as (backend, _), Parallel(n_jobs=2) as parallel:
        parallel(delayed(square)(i) for i in range(2))
        nested_backend, n_jobs = parallel._backend.get_nested_backend()
        copy = pickle.loads(pickle.dumps(nested_backend))
        assert (copy.nesting_level, copy.config.cores, n_jobs) == (1, nested_backend.config.cores, None)
        assert pickle.loads(pickle.dumps(backend)).config.tier == backend.config.tier


@pytest.mark.parametrize("form", FORMS)
def test_the_input_may_use_the_same_backend(hybrid, form):
    def tasks():
        for i in range(6):
            yield delayed(sum)(Parallel(n_jobs=2)(delayed(square)(i + k) for k in range(3)))

    with hybrid():
        results = list(Parallel(return_as=form, pre_dispatch=2, batch_size=1)(tasks()))
    assert sorted(results) == [sum((i + k) ** 2 for k in range(3)) for i in range(6)]


def own_calls():
    return [known for known in gc.get_objects() if type(known) is Call]


@pytest.mark.parametrize("form", FORMS)
def test_a_call_leaves_nothing_to_the_garbage_collector(hybrid, form):
    gc.collect()
    gc.disable()
    try:
        before = len(own_calls())
        with hybrid():
            assert sorted(Parallel(return_as=form)(delayed(square)(i) for i in range(6))) == [0, 1, 4, 9, 16, 25]
        # Threads that have brought the last results are still on their way out.
        wait_for(lambda: len(own_calls()) <= before)
    finally:
        gc.enable()


# ---- processes around us


INTERRUPTED = """
    import gc, os, signal, sys, time, joblib_backends
    from conftest import LONG, eventually, own_processes
    from joblib import Parallel, delayed, parallel_backend
    from joblib_backends.workers.pool import WorkerPool
    from test_contract import hold, square
    folder, tier = sys.argv[1:]
    # A suite that was started in the background has Ctrl-C ignored, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with parallel_backend("hybrid", tier=tier, n_jobs=2):
        try:
            Parallel(batch_size=1)(delayed(hold)(folder, i) for i in range(4))
        except KeyboardInterrupt:
            open(folder + "/go", "w").close()
            print(Parallel()(delayed(square)(i) for i in range(3)), flush=True)
    gc.collect()  # joblib's own frames hold the exception in a cycle
    WorkerPool.close_all()
    print(eventually(lambda: not own_processes(), LONG))
"""


@pytest.mark.parametrize("whole_group", [False, True], ids=["parent", "terminal"])
@pytest.mark.parametrize("tier", ["inline", "threads", "processes"])
def test_ctrl_c_ends_the_call_and_the_next_one_works(tier, whole_group, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tmp_path), tier],
        stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    try:
        wait_for(lambda: marks(tmp_path, "started-"))
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=LONG)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert out.splitlines() == ["[0, 1, 4]", "True"]


def call_as_daemon(connection):
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        results = Parallel(batch_size=1)(delayed(pid)() for _ in range(4))
        connection.send((set(results) == {os.getpid()}, last_report().tier, last_report().reason))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_daemonic_process_uses_threads(method):
    context = multiprocessing.get_context(method)
    mine, its = context.Pipe()
    process = context.Process(target=call_as_daemon, args=(its,), daemon=True)
    process.start()
    assert mine.poll(LONG)
    here, tier, reason = mine.recv()
    process.join(LONG)
    assert (here, tier) == (True, "threads")
    assert "this process is a daemon" in reason


FORKED = """
    import os, signal, sys, joblib_backends, numpy as np
    from joblib import Parallel, delayed, parallel_backend
    from test_contract import identity, pid
    tier = sys.argv[1]
    large = np.ones(200_000)
    def results(k):
        return [a[0] for a in Parallel(batch_size=1)(delayed(identity)(large + k + i) for i in range(3))]
    with parallel_backend("hybrid", tier=tier, n_jobs=2):
        mine = set(Parallel(batch_size=1)(delayed(pid)() for _ in range(4)))
        assert results(0) == [1, 2, 3]
        child = os.fork()
        if child == 0:
            signal.alarm(50)
            theirs = set(Parallel(batch_size=1)(delayed(pid)() for _ in range(4)))
            assert not mine & theirs, (mine, theirs)
            assert results(10) == [11, 12, 13]
        else:
            assert results(10) == [11, 12, 13]
            assert os.waitpid(child, 0)[1] == 0
            assert results(20) == [21, 22, 23]
            assert tier == "threads" or set(Parallel(batch_size=1)(delayed(pid)() for _ in range(4))) <= mine
    print("done", flush=True)
"""


@pytest.mark.parametrize("tier", ["threads", "processes"])
def test_a_forked_child_uses_the_backend_beside_its_parent(tier):
    done = run_script(FORKED, tier)
    assert (done.returncode, done.stdout) == (0, "done\ndone\n"), done.stderr


def test_the_interpreter_may_end_while_tasks_run(tier, tmp_path):
    if tier == "dask":
        pytest.skip("distributed's own cluster is stopped there, not ours")
    done = run_script(
        """
        import sys, threading, joblib_backends
        from joblib import Parallel, delayed, parallel_backend
        from test_contract import hold, marks, wait_for
        def call():
            with parallel_backend("hybrid", tier=sys.argv[1], n_jobs=2):
                Parallel()(delayed(hold)(sys.argv[2], i) for i in range(4))
        threading.Thread(target=call, daemon=True).start()
        wait_for(lambda: marks(sys.argv[2], "started-"))
        threading.Timer(1, open, (sys.argv[2] + "/go", "w")).start()
        print("ending", flush=True)
        """,
        tier,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "ending\n"), done.stderr


# ---- leaks


@pytest.mark.parametrize("tier", REAL_TIERS)
def test_many_calls_leave_threads_processes_and_descriptors_flat(tier, hybrid, leaves_nothing):
    me = psutil.Process()

    def counts():
        return me.num_threads(), me.num_fds(), len(me.children(recursive=True))

    n_calls = 60 if tier == "dask" else 300
    with hybrid():
        for _ in range(5):
            Parallel()(delayed(square)(i) for i in range(2))
        before = counts()
        for _ in range(n_calls):
            Parallel()(delayed(square)(i) for i in range(2))
        after = counts()
    # A call that comes before the threads of the last one are idle again starts more: a few, not one per call.
    assert all(now <= then + 8 for now, then in zip(after, before, strict=True)), (before, after)


def test_the_end_of_a_context_leaves_nothing(hybrid, leaves_nothing):
    with hybrid():
        large = np.ones(300_000)
        assert Parallel(batch_size=1)(delayed(np.sum)(large) for _ in range(4)) == 4 * [300_000]


def test_a_failed_call_leaves_nothing(hybrid, leaves_nothing):
    with hybrid(), contextlib.suppress(KeyError):
        Parallel(batch_size=1)(delayed(raises_unless_zero)(KeyError(1), i) for i in range(20))


# ---- dead workers


@pytest.mark.breaks_pool
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_dead_worker_ends_the_call_with_its_own_error(form, how):
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        with pytest.raises(WorkerLostError, match=r"Each worker that ran end_process, task \d \(.*\), died: it "):
            list(Parallel(return_as=form)(delayed(end_process)(how, i) for i in range(4)))
        assert Parallel()(delayed(square)(i) for i in range(6)) == [i * i for i in range(6)]


@pytest.mark.breaks_pool
def test_workers_that_die_between_two_calls_are_replaced():
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        pids = set(Parallel(batch_size=1)(delayed(pid)() for _ in range(6)))
        for victim in pids:
            os.kill(victim, signal.SIGKILL)
        assert pids.isdisjoint(Parallel(batch_size=1)(delayed(pid)() for _ in range(6)))


@pytest.mark.breaks_pool
def test_a_dead_worker_leaves_one_parallel_object_working():
    with parallel_backend("hybrid", tier="processes"), Parallel(n_jobs=2) as parallel:
        for _ in range(2):
            with pytest.raises(WorkerLostError):
                parallel(delayed(end_process)("exit", i) for i in range(4))
            assert parallel(delayed(square)(i) for i in range(6)) == [i * i for i in range(6)]


@pytest.mark.breaks_pool
def test_a_task_without_end_does_not_keep_workers_that_another_call_shares(tmp_path, leaves_nothing):
    """The aborted call kills the workers that run its tasks; the other one goes on and notices nothing."""
    backend, answers = HybridBackend("processes"), []

    def call():
        answers.append(Parallel(n_jobs=2, backend=backend, batch_size=1)(delayed(hold)(tmp_path, i) for i in (0, 1)))

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: len(marks(tmp_path, "started-")) == 2)
    other = tmp_path / "other"
    other.mkdir()

    def tasks():
        yield from (delayed(hold)(other, i) for i in range(4))
        wait_for(lambda: marks(other, "started-"))
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        Parallel(n_jobs=4, backend=backend, pre_dispatch="all", batch_size=1)(tasks())
    mark(tmp_path, "go")
    thread.join(LONG)
    assert answers == [[0, 1]]


# ---- gone before it is done


@pytest.mark.filterwarnings("ignore:A generator produced by joblib.Parallel has been gc'ed:UserWarning")
@pytest.mark.filterwarnings("ignore:.*adjusting the input task iterator:UserWarning")
@pytest.mark.parametrize("form", FORMS[1:])
def test_a_generator_may_be_dropped_in_another_thread(hybrid, form, leaves_nothing):
    with hybrid():
        held = [Parallel(return_as=form, batch_size=1)(delayed(square)(i) for i in itertools.count())]
        next(held[0])
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join(LONG)
        assert not thread.is_alive()
        gc.collect()
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]


def test_a_backend_refuses_batches_outside_of_a_call():
    with pytest.raises(RuntimeError, match="A batch was submitted to the hybrid backend outside of a call"):
        HybridBackend().submit(lambda: [1])


def test_the_effective_jobs_are_known_without_a_call(hybrid, tier):
    with hybrid(n_jobs=None):
        slots = 2 if tier == "dask" else joblib.cpu_count()
        assert joblib.effective_n_jobs(-1) == joblib.effective_n_jobs(None) == slots
        assert joblib.effective_n_jobs(n_jobs=-10) == 1
        assert joblib.effective_n_jobs(5) == 5


def test_a_call_reports_in_json_what_it_ran():
    """The report is plain data: a user may log it."""
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        Parallel()(delayed(math.sqrt)(i) for i in range(4))
    logged = json.loads(json.dumps(vars(last_report())))
    assert (logged["function"], logged["tasks"], logged["tier"]) == ("sqrt", 4, "threads")
