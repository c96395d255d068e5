"""What is recorded of a call, on one clock, and the trace files that are written of it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import COPYING_TIERS
from joblib import Parallel, delayed, parallel_backend
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier

import joblib_backends
from joblib_backends import CallReport, ConfigurationError, last_report, reports
from joblib_backends.errors import EnvironmentWarning
from joblib_backends.report import record
from joblib_backends.timeline import recorder as recording
from joblib_backends.timeline.chrome import calls_in, document_of
from joblib_backends.timeline.clocks import Exchange, seconds_ahead
from joblib_backends.timeline.model import KINDS, Mark, Row, Span, Timeline
from joblib_backends.timeline.recorder import BatchRecord, Recorder
from joblib_backends.timeline.trace_file import TraceFile
from joblib_backends.worker import Spent, Worker

resource = pytest.importorskip("resource", reason="limits of files are POSIX")
X, y = load_iris(return_X_y=True)


def square(i):
    return i * i


def meet(folder, i):
    """Run beside another task: both end when both have begun."""
    Path(folder, str(i)).touch()
    deadline = time.monotonic() + 30
    while len(os.listdir(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)


def inner(n):
    return Parallel(n_jobs=2)(delayed(square)(i) for i in range(n))


def some_report(**figures):
    return CallReport("f", "threads", "r", 1, 1, 1, 0.1, 0.1, 0, 0, 0, False, started_at=1e9, **figures)


# ---- clocks


def test_one_clock_is_told_as_one():
    assert seconds_ahead([Exchange(1.0, 1.2, 1.8, 2.0), Exchange(2.0, 2.1, 2.9, 3.0)]) == 0.0
    assert seconds_ahead([]) == 0.0


@pytest.mark.parametrize("ahead", [-7200.0, -0.5, 0.25, 1e6])
def test_another_clock_is_told_by_its_tightest_bounds(ahead):
    # The first is sent 10 ms before it begins, the second is received 10 ms after its end; the others take long.
    journeys = [(0.010, 0.4), (0.3, 0.010), (0.5, 0.6)]
    exchanges = [
        Exchange(sent, sent + there + ahead, sent + there + 1 + ahead, sent + there + 1 + back)
        for sent, (there, back) in enumerate(journeys)
    ]
    assert seconds_ahead(exchanges) == pytest.approx(ahead, abs=0.010)


# ---- the recorder


def a_record(worker, started, *, sent, received, **about):
    spent = Spent(wall=1.0, cpu=1.0, started=started, worker=worker, load=0.25, pack=0.125)
    return BatchRecord("dask", "fit", "task 3", 3, 1, sent, received, spent, **about)


def test_workers_of_other_hosts_are_drawn_on_the_clock_of_the_driver():
    far, near = Worker("far", 10, 1), Worker("near", 10, 1)
    recorder = Recorder()
    recorder.add(a_record(far, 5_000.0, sent=100.0, received=101.5))
    recorder.add(a_record(near, 100.25, sent=100.0, received=101.5))
    timeline = recorder.timeline(started=100.0)
    assert [(row.name, bool(row.host)) for row in timeline.rows] == [
        ("caller", True), ("dask 10", True), ("dask 10", True),
    ]  # fmt: skip
    first, second = (span for span in timeline.spans if span.n_tasks)
    assert (first.start, second.start) == (pytest.approx(0.25), pytest.approx(0.25))
    assert (first.seconds, first.task, first.kind, first.detail) == (1.0, 3, "fit", "task 3")


def test_phases_lie_inside_of_their_batch():
    recorder = Recorder()
    recorder.add(a_record(Worker("h", 1, 1), 10.0, sent=9.0, received=12.0, times=((0.5, 0.125),)))
    spans = recorder.timeline(started=9.0).spans
    batch, *phases = spans
    assert [(one.name, one.start - batch.start, one.seconds) for one in phases] == [
        ("load", 0.0, 0.25), ("fit", 0.25, 0.5), ("score", 0.75, 0.125), ("pack", 0.875, 0.125),
    ]  # fmt: skip
    assert all(not one.n_tasks for one in phases)


def test_times_that_are_somebody_elses_are_left_out():
    recorder = Recorder()
    recorder.add(a_record(Worker("h", 1, 1), 10.0, sent=9.0, received=12.0, times=((5.0, 0.1),)))
    assert "fit" not in {span.name for span in recorder.timeline(started=9.0).spans if not span.n_tasks}


def test_a_lost_batch_is_a_retry():
    recorder = Recorder()
    spent = Spent()
    recorder.add(BatchRecord("processes", "f", "task 0", 0, 2, 1.5, 4.0, spent, loss="WorkerLostError: killed"))
    timeline = recorder.timeline(started=1.0)
    [span] = timeline.spans
    assert (span.kind, span.start, span.seconds, span.detail) == ("retry", 0.5, 2.5, "WorkerLostError: killed")
    assert timeline.rows[span.row].name == "processes, lost"


def test_what_is_beyond_the_limit_is_counted(monkeypatch):
    monkeypatch.setattr(recording, "MOST_RECORDED", 3)
    recorder = Recorder()
    for _ in range(5):
        recorder.add(a_record(Worker("h", 1, 1), 10.0, sent=9.0, received=12.0))
        recorder.mark("something")
    timeline = recorder.timeline(started=9.0)
    assert sum(span.n_tasks for span in timeline.spans) == 3
    assert (timeline.n_omitted, len(timeline.marks)) == (2, 3)


# ---- calls


def check_order(report):
    """Check that nothing is drawn outside of its call, and that no row does two batches at once."""
    timeline = report.timeline
    for span in timeline.spans:
        assert -0.001 <= span.start <= span.start + span.seconds <= report.seconds + 0.001
        assert span.kind in KINDS
    for row in range(len(timeline.rows)):
        batches = sorted((span.start, span.seconds) for span in timeline.spans if span.row == row and span.n_tasks)
        for (start, seconds), (following, _) in itertools.pairwise(batches):
            assert start + seconds <= following + 1e-6


def test_every_task_is_in_the_timeline_of_its_call(hybrid):
    with hybrid():
        Parallel(batch_size=3, pre_dispatch="all")(delayed(square)(i) for i in range(20))
    report = last_report()
    batches = [span for span in report.timeline.spans if span.n_tasks]
    tasks = sorted(task for span in batches for task in range(span.task, span.task + span.n_tasks))
    assert tasks == list(range(20))
    assert {span.name for span in batches} == {"square"}
    check_order(report)


def test_tasks_that_run_at_once_are_on_rows_of_their_own(hybrid, tier, tmp_path):
    if tier in ("inline", "fake"):
        pytest.skip("one task at a time")
    with hybrid():
        Parallel(batch_size=1)(delayed(meet)(str(tmp_path), i) for i in range(2))
    report = last_report()
    one, other = (span for span in report.timeline.spans if span.n_tasks)
    assert one.row != other.row
    assert max(one.start, other.start) < min(one.start + one.seconds, other.start + other.seconds)
    check_order(report)


def test_a_search_shows_its_fits_scores_and_what_was_shared(hybrid, tier):
    pipeline = Pipeline([("pca", PCA(random_state=0)), ("tree", DecisionTreeClassifier(random_state=0))])
    # Long enough to be looked at, and to be worth sharing.
    many = X.repeat(200, axis=0), y.repeat(200)
    with hybrid():
        GridSearchCV(pipeline, {"tree__max_depth": [5, 6, 7]}, cv=2).fit(*many)
    spans = last_report().timeline.spans
    assert sum(span.n_tasks for span in spans) == 6
    described = [span for span in spans if span.n_tasks and "candidate tree__max_depth=" in span.detail]
    assert described
    assert {"fit", "score"} <= {span.kind for span in spans if not span.n_tasks}
    check_order(last_report())
    if tier in COPYING_TIERS:
        assert {"encode", "decode", "load", "pack"} <= {span.name for span in spans}


def test_inner_calls_are_part_of_their_task():
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        Parallel(batch_size=1)(delayed(inner)(5) for _ in range(3))
    assert sum(span.n_tasks for span in last_report().timeline.spans) == 3


def test_without_recording_there_is_no_timeline_and_all_figures(hybrid):
    with hybrid(record=False):
        Parallel(batch_size=5, pre_dispatch="all")(delayed(square)(i) for i in range(20))
    report = last_report()
    assert report.timeline is None
    assert (report.tasks, report.batches) == (20, 4)
    assert report.busy_seconds > 0


def test_without_recording_a_trace_has_reports_only(tmp_path):
    with parallel_backend("hybrid", tier="threads", n_jobs=2, record=False, trace=tmp_path / "run.json"):
        Parallel()(delayed(square)(i) for i in range(4))
    [(report, timeline)] = calls_in((tmp_path / "run.json").read_text())
    assert (report["tasks"], timeline.spans) == (4, [])


def test_reports_are_kept_in_their_order():
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        for n in (3, 4, 5):
            Parallel()(delayed(square)(i) for i in range(n))
    assert [report.tasks for report in reports()[-3:]] == [3, 4, 5]
    assert reports()[-1] is last_report()


def test_timelines_of_long_ago_are_given_up(monkeypatch):
    monkeypatch.setattr("joblib_backends.report.MOST_RECORDED", 10)
    for _ in range(3):
        report = some_report()
        report.put_timeline(Timeline, 6)
        record(report)
    assert [report.timeline is None for report in reports()[-3:]] == [True, True, False]


def test_figures_add_up(hybrid, tier):
    with hybrid():
        Parallel(batch_size=1)(delayed(sorted)(list(range(20_000, 0, -1))) for _ in range(6))
    report = last_report()
    assert 0 < report.longest_seconds <= report.busy_seconds
    assert 0 <= report.longest_task < 6
    assert report.speed_up == pytest.approx(report.busy_seconds / report.seconds)
    assert report.load_seconds + report.pack_seconds <= report.busy_seconds
    if tier in COPYING_TIERS:
        assert min(report.encode_seconds, report.decode_seconds, report.load_seconds, report.pack_seconds) > 0
        assert report.nbytes_results > 6 * 20_000
    else:
        assert report.encode_seconds == report.load_seconds == report.pack_seconds == report.nbytes_results == 0
    assert report.peak_nbytes > 1_000_000 or tier == "fake"


# ---- files


def a_timeline():
    rows = [Row("caller"), Row("process 7", "node1")]
    spans = [
        Span(1, "task", "f", 0.5, 0.25, 0, 4, "tasks 0 to 3"),
        Span(1, "transfer", "load", 0.5, 0.0625),
        Span(0, "transfer", "encode", 0.25, 0.125, detail="f"),
    ]
    return Timeline(rows, spans, [Mark(0, "goes to processes", 0.125, "because")], n_omitted=2)


def by_time(timeline):
    """Return the content of a timeline whatever the order of its rows."""
    return (
        sorted((span.start, timeline.rows[span.row], span[1:]) for span in timeline.spans),
        sorted((mark.at, timeline.rows[mark.row], mark[1:]) for mark in timeline.marks),
        timeline.n_omitted,
    )


def test_a_trace_is_read_as_it_was_written():
    # The second one began first: a call is written when it ends.
    first = some_report(seconds_saved=3.0)
    second = replace(some_report(advice=("Do this.",)), started_at=1e9 - 5.0)
    calls = [(first.to_dict(), a_timeline()), (second.to_dict(), a_timeline())]
    read = calls_in(document_of(calls))
    assert [CallReport.from_dict(*call) for call in read] == [first, second]
    assert [by_time(timeline) for _, timeline in read] == [by_time(a_timeline())] * 2


def test_a_trace_has_what_its_format_demands():
    events = json.loads(document_of([(some_report().to_dict(), a_timeline())]))
    spans = [one for one in events if one["ph"] == "X"]
    assert len(spans) == 4  # with the call itself
    assert all({"name", "cat", "ts", "dur", "pid", "tid", "args"} <= one.keys() for one in spans)
    assert {one["args"]["name"] for one in events if one["ph"] == "M"} == {
        "joblib calls", "calls", "workers", "workers on node1", "caller", "process 7",
    }  # fmt: skip
    [mark] = [one for one in events if one["ph"] == "i"]
    assert (mark["name"], mark["ts"], mark["s"]) == ("goes to processes", 125_000.0, "t")


def test_a_trace_that_ends_in_the_midst_of_an_event_is_read_until_there():
    text = document_of([(some_report().to_dict(), a_timeline())])
    cut = text[: text.index('"encode"') + 5]
    [(report, timeline)] = calls_in(cut)
    assert report["function"] == "f"
    assert [span.name for span in timeline.spans] == ["f", "load"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": []}', "no JSON", '[{"ph": "X"}]', "[1, 2]"])
def test_what_is_no_trace_is_refused(text):
    with pytest.raises(ValueError, match="no calls of joblib_backends"):
        calls_in(text)


def test_the_calls_of_a_process_go_into_one_trace(hybrid, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(document_of([(some_report().to_dict(), a_timeline())]))
    with hybrid(trace=path):
        for n in (3, 5):
            Parallel(batch_size=1)(delayed(square)(i) for i in range(n))
    calls = calls_in(path.read_text())
    assert [report["tasks"] for report, _ in calls] == [3, 5]
    assert [sum(span.n_tasks for span in timeline.spans) for _, timeline in calls] == [3, 5]
    json.loads(path.read_text())
    assert CallReport.from_dict(*calls[1]) == last_report()


SCRIPT = """
import os, sys
from joblib import Parallel, delayed
if sys.argv[1:]:
    import subprocess
    Parallel(n_jobs=2)(delayed(abs)(i) for i in range(3))
    subprocess.run([sys.executable, __file__], check=True)
Parallel(n_jobs=2)(delayed(abs)(i) for i in range(4))
"""


def test_scripts_that_a_script_starts_write_traces_of_their_own(tmp_path):
    script, path = tmp_path / "script.py", tmp_path / "run.json"
    script.write_text(SCRIPT)
    variables = {"JOBLIB_BACKEND": "hybrid", "JOBLIB_BACKEND_TRACE": str(path), "JOBLIB_BACKEND_TIER": "threads"}
    for _ in range(2):  # again: the trace of a process that is gone is replaced
        subprocess.run([sys.executable, str(script), "outer"], check=True, env={**os.environ, **variables}, timeout=60)
        assert [report["tasks"] for report, _ in calls_in(path.read_text())] == [3, 4]
    inner_ones = list(tmp_path.glob("run-*.json"))
    assert len(inner_ones) == 2
    assert [report["tasks"] for found in inner_ones for report, _ in calls_in(found.read_text())] == [4, 4]


def test_threads_add_their_calls_to_one_trace(tmp_path):
    path = tmp_path / "run.json"

    def call():
        with parallel_backend("hybrid", tier="threads", n_jobs=2, trace=path):
            Parallel()(delayed(square)(i) for i in range(4))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [report["tasks"] for report, _ in calls_in(path.read_text())] == [4] * 8


def test_a_trace_that_cannot_be_written_is_a_warning_and_the_results_are_there(tmp_path):
    path = tmp_path / "none" / "run.json"
    with parallel_backend("hybrid", tier="threads", n_jobs=2, trace=path):
        with pytest.warns(EnvironmentWarning, match=r"run\.json' cannot be written: .*No such file"):
            assert Parallel()(delayed(square)(i) for i in range(4)) == [0, 1, 4, 9]
        # Not even where warnings are errors, as they are here.
        assert Parallel()(delayed(square)(i) for i in range(4)) == [0, 1, 4, 9]
        path.parent.mkdir()
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]
    [(report, timeline)] = calls_in(path.read_text())
    assert report["tasks"] == sum(span.n_tasks for span in timeline.spans) == 3


@pytest.mark.parametrize("kind", ["a table of the user's", "a device", "a pipe", "no path"])
def test_what_is_no_trace_is_never_replaced(kind, tmp_path):
    path = tmp_path / "precious.json"
    if kind == "a table of the user's":
        path.write_text('{"precious": 1}')
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path = "/dev/full" if kind == "a device" else "null\0byte"
    with (
        parallel_backend("hybrid", tier="threads", n_jobs=2, trace=path),
        pytest.warns(EnvironmentWarning, match="cannot be written: .*(is no trace|no regular file|null)"),
    ):
        assert Parallel()(delayed(square)(i) for i in range(4)) == [0, 1, 4, 9]
    if kind == "a table of the user's":
        assert path.read_text() == '{"precious": 1}'


def test_a_trace_without_room_for_a_call_keeps_the_others(tmp_path):
    path, report = tmp_path / "run.json", some_report().to_dict()
    TraceFile.add(path, report, a_timeline())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
        with pytest.raises(OSError, match="too large"):
            TraceFile.add(path, report, a_timeline())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    TraceFile.add(path, report, a_timeline())
    read = calls_in(path.read_text())
    assert [by_time(timeline) for _, timeline in read] == [by_time(a_timeline())] * 2


def misfit(**results):
    return results


@pytest.mark.parametrize("form", ["list", "generator", "generator_unordered"])
def test_a_task_that_cannot_be_named_fails_as_it_does_without_a_timeline(form):
    from sklearn.model_selection._validation import _fit_and_score

    with parallel_backend("hybrid", tier="processes", n_jobs=2, initializer=time.sleep, initargs=(0.02,)):
        with pytest.raises(TypeError, match=r"missing .* required"):
            list(Parallel(return_as=form)(delayed(_fit_and_score)(PCA(), X) for _ in range(4)))
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]


@pytest.mark.parametrize("times", [[0.1, 0.2], None, "soon", float("nan"), -1.0])
def test_results_that_look_like_those_of_a_search_are_taken_for_what_they_are(times):
    with parallel_backend("hybrid", tier="threads", n_jobs=2, initializer=time.sleep, initargs=(0.02,)):
        Parallel(batch_size=1)(delayed(misfit)(fit_time=times, score_time=0.1) for _ in range(3))
    assert {span.name for span in last_report().timeline.spans} == {"misfit"}


def test_generators_in_the_order_of_their_end_are_recorded_too(hybrid):
    with hybrid():
        list(Parallel(return_as="generator_unordered", batch_size=1)(delayed(square)(i) for i in range(6)))
    assert sorted(span.task for span in last_report().timeline.spans if span.n_tasks) == list(range(6))
    check_order(last_report())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_fit_and_score-Pipeline", "task"),
        ("_parallel_build_trees", "fit"),
        ("Forest.predict", "score"),
        ("profit", "task"),
        ("rebuild_index", "task"),
        ("f-RefitModel", "task"),
    ],
)
def test_kinds_are_told_by_whole_words(name, kind):
    recorder = Recorder()
    recorder.add(a_record(Worker("h", 1, 1), 10.0, sent=9.0, received=12.0)._replace(name=name))
    assert recorder.timeline(started=9.0).spans[0].kind == kind


def test_reports_are_saved_as_pages_and_traces(tmp_path):
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        Parallel(batch_size=1)(delayed(square)(i) for i in range(4))
    report = last_report()
    report.save(tmp_path / "run.json")
    assert [CallReport.from_dict(*call) for call in calls_in((tmp_path / "run.json").read_text())] == [report]
    report.save(str(tmp_path / "run.html"))
    assert "square" in (tmp_path / "run.html").read_text()
    with pytest.raises(ConfigurationError, match=r"'run\.png'.*must end with \.html"):
        report.save("run.png")


def test_notebooks_show_a_table():
    shown = some_report(advice=("a < b",))._repr_html_()
    assert shown.startswith("<table>")
    assert "a &lt; b" in shown


def test_the_names_are_public():
    assert {"reports", "last_report", "CallReport"} <= set(joblib_backends.__all__)
