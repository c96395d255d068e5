"""What a call says about itself."""

import itertools
import pickle
import re
from dataclasses import replace

import joblib
import numpy as np
import pytest
from conftest import COPYING_TIERS
from joblib import Parallel, delayed, parallel_backend
from sklearn.base import clone
from sklearn.linear_model import Ridge

import joblib_backends
from joblib_backends import CallReport, last_report
from joblib_backends.report import announce, record
from joblib_backends.wording import readable_nbytes

_serial = itertools.count(1)


def square(i):
    return i * i


def fails(i):
    raise KeyError(i)


def inner(n):
    return Parallel(n_jobs=2)(delayed(square)(i) for i in range(n))


def total(array):
    return float(array.sum())


def test_a_report_counts_what_ran(hybrid, tier):
    with hybrid():
        Parallel(batch_size=5, pre_dispatch="all")([delayed(square)(i) for i in range(20)])
    report = last_report()
    assert (report.function, report.tier, report.n_jobs) == ("square", tier, 2)
    assert (report.tasks, report.batches, report.failed) == (20, 4, False)
    assert report.reason == f"tier={tier!r} was asked for"
    assert report.busy_seconds > 0
    assert report.seconds > 0


def test_a_failed_call_says_so(hybrid):
    with hybrid(), pytest.raises(KeyError):
        Parallel()(delayed(fails)(i) for i in range(4))
    assert last_report().failed
    assert "fails: 0 tasks in 0 batches failed after" in str(last_report())


def test_large_data_counts_as_moved_once_and_then_as_saved(hybrid, tier):
    array = np.full(300_000, float(next(_serial)))
    with hybrid():
        Parallel(batch_size=1)(delayed(total)(array) for _ in range(4))
    report = last_report()
    copies = tier in COPYING_TIERS
    assert report.nbytes_moved == (array.nbytes if copies else 0)
    assert report.nbytes_saved == (3 * array.nbytes if copies else 0)
    assert (report.nbytes_pickled > 0) == copies


def test_nested_calls_leave_the_report_of_the_outermost():
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        Parallel(batch_size=1)(delayed(inner)(7) for _ in range(3))
    assert (last_report().function, last_report().tasks) == ("inner", 3)


def test_one_job_leaves_the_last_report_alone():
    with parallel_backend("hybrid", tier="threads"):
        Parallel(n_jobs=2)(delayed(square)(i) for i in range(5))
        before = last_report()
        Parallel(n_jobs=1)(delayed(square)(i) for i in range(9))
    assert last_report() is before


def test_an_empty_call_reports_no_tier():
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        Parallel()([])
    assert (last_report().tier, last_report().reason) == ("none", "there were no tasks")


def test_batches_of_one_call_may_differ_in_tier():
    with parallel_backend("hybrid", n_jobs=2):
        list(Parallel(batch_size=1, return_as="generator")([delayed(clone)(Ridge()), delayed(square)(2)]))
    assert last_report().tier == "threads + processes"
    assert "come from scikit-learn" in last_report().reason
    assert "not known to be safe on threads" in last_report().reason


def test_a_report_reads_as_a_line_for_each_thing():
    figures = {"cores": 4, "cpu_seconds": 3.0, "queue_seconds": 0.05, "encode_seconds": 0.25, "load_seconds": 2e-5}
    plain = CallReport("fit", "threads", "because", 2, 10, 5, 1.5, 2.25, 3_000_000, 500, 7, False, **figures)
    lines = [
        "fit: 10 tasks in 5 batches done in 1.500 s",
        "  tier     threads, n_jobs=2",
        "  reason   because",
        "  time     2.25 s of tasks, 1.50 times as fast as one by one; 2.0 of 4 cores used",
        "  around   queue, a batch 10 ms, encode 250 ms, load 20 µs",
        "  bytes    3.0 MB moved, 7 B not moved again, 500 B pickled",
    ]
    assert str(plain).splitlines() == lines
    full = replace(
        plain,
        peak_nbytes=1_500_000,
        lost_workers=1,
        retries=2,
        tasks_restored=3,
        fits_run=4,
        fits_shared=6,
        transforms_run=1,
        transforms_shared=1,
        seconds_saved=0.5,
        nbytes_shared=10,
        advice=("Do this.",),
    )
    assert str(full).splitlines() == [
        *lines,
        "  memory   1.5 MB at most in one process",
        "  faults   1 workers lost, 2 batches run again",
        "  kept     3 of 10 tasks were in the checkpoint",
        "  shared   6 of 10 fits and 1 of 2 transforms of common steps, 0.500 s saved, at most 10 B held",
        "  advice   Do this.",
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (2e9, "2.0 GB"), (3e16, "30000.0 TB")],
)
def test_bytes_read_in_a_unit_of_their_size(nbytes, text):
    assert readable_nbytes(nbytes) == text


def test_residents_are_counted_once_and_shown():
    array = np.full(300_000, float(next(_serial)))
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        Parallel(batch_size=1)(delayed(total)(array) for _ in range(4))
    assert last_report().residents == 1
    assert "not moved again (1 resident), " in str(last_report())


def test_a_report_can_be_pickled_without_its_timeline():
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        Parallel()(delayed(square)(i) for i in range(5))
    copied = pickle.loads(pickle.dumps(last_report()))
    assert copied == last_report()
    assert copied.timeline is None


def test_the_last_report_is_what_was_recorded_last():
    report = CallReport("f", "threads", "r", 1, 1, 1, 0.1, 0.1, 0, 0, 0, False)
    record(report)
    assert joblib_backends.last_report() is report


def test_announcements_go_to_stderr(capsys):
    announce("something")
    assert capsys.readouterr().err == "joblib_backends: something\n"


def test_functools_partials_and_lambdas_have_names():
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        Parallel()(delayed(lambda i: i)(i) for i in range(2))
    assert re.search(r"<lambda>$", last_report().function)
    assert joblib.effective_n_jobs(1) == 1


def test_each_decision_is_a_line_of_the_log(hybrid, tier, caplog):
    with caplog.at_level("DEBUG", logger="joblib_backends"), hybrid():
        Parallel(batch_size=1)(delayed(square)(i) for i in range(3))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("joblib_backends.")]
    assert f"square goes to {tier}, n_jobs=2: tier={tier!r} was asked for" in lines
    assert any(line.startswith("square: 3 tasks in 3 batches done in") for line in lines)


def test_nothing_is_printed(hybrid, capfd):
    with hybrid():
        Parallel(batch_size=1)(delayed(square)(i) for i in range(3))
    assert capfd.readouterr() == ("", "")
