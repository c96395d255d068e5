"""What tasks say on workers reaches the parent: once each, with the task it came from, before the task's result."""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest
from conftest import make_hybrid
from joblib import Parallel, delayed, parallel_config
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from joblib_backends import last_report
from joblib_backends.budget import is_daemonic
from joblib_backends.errors import BatchDataLostError, DataLostError
from joblib_backends.hearing import Heard, Listening, belonging_to, current, hearing
from joblib_backends.messages import OmittedMessages, SaidPrint, SaidRecord, SaidWarning
from joblib_backends.report import Message
from joblib_backends.retelling import retell
from joblib_backends.tiers import fake
from joblib_backends.worker import Outcome
from joblib_backends.workers.pool import WorkerPool

#: Tiers whose workers are other processes; in the parent everybody hears what is said.
TELLING_TIERS = ["processes", "dask"]

log = logging.getLogger("tests.messages")


@pytest.fixture(params=TELLING_TIERS)
def tier(request):
    return request.param


@pytest.fixture
def processes(request):
    return make_hybrid("processes", request)


@pytest.fixture
def heard():
    """Return the records that a handler of the user's gets, on the root logger, but for those of Dask's own."""

    class Collecting(logging.Handler):
        def emit(self, record):
            if not record.name.startswith("distributed"):
                records.append(record)

    records = []
    handler = Collecting()
    logging.getLogger().addHandler(handler)
    yield records
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def new_workers():
    """Have workers whose standard streams are those of the test: a worker keeps those that it was started with."""
    WorkerPool.close_all()
    yield
    WorkerPool.close_all()


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))


def texts(records):
    return sorted(record.getMessage() for record in records)


# ---- tasks


def call_elsewhere(function, i):
    """Call a function in two tasks of a task, in worker processes of the worker if it has the cores."""
    with parallel_config("hybrid", tier="processes"):
        pids = Parallel(n_jobs=2)(delayed(and_pid)(function, 10 * i + k) for k in range(2))
    # A Dask worker gives a task one core: there it calls them itself.
    assert is_daemonic() or os.getpid() not in pids


def and_pid(function, i):
    function(i)
    return os.getpid()


class Odd(UserWarning):
    """A warning with state."""

    def __init__(self, number):
        super().__init__(f"odd {number}")
        self.number = number

    def __reduce__(self):
        return Odd, (self.number,)


class Unpicklable(UserWarning):
    def __reduce__(self):
        raise TypeError("not me")


class Unloadable(UserWarning):
    """A warning that can be pickled, and not loaded: its __init__ needs what is not in its args."""

    def __init__(self, text, other):
        super().__init__(text)


def log_one(i, name="tests.messages", level=logging.WARNING, **options):
    logging.getLogger(name).log(level, "number %d", i, **options)
    return i


def log_at_root(i):
    logging.warning("number %d", i)
    return i


def log_failure(i):
    try:
        raise KeyError(i)
    except KeyError:
        log.exception("failed", extra={"candidate": {"C": i}, "lock": threading.Lock()})


def log_with_null_handler(i):
    logging.getLogger("quiet_package").addHandler(logging.NullHandler())
    logging.getLogger("quiet_package.part").warning("number %d", i)


def log_configured(i, path):
    logging.basicConfig(filename=path, force=True, format="%(message)s")
    try:
        log.warning("number %d", i)
    finally:
        for handler in logging.getLogger().handlers[:]:
            if isinstance(handler, logging.FileHandler):
                logging.getLogger().removeHandler(handler)
                handler.close()
    log.warning("later %d", i)


def log_in_threads(i):
    def say(k):
        log.warning("number %d.%d", i, k)

    with parallel_config("hybrid", tier="threads"):
        Parallel(n_jobs=2)(delayed(say)(k) for k in range(3))


def log_in_own_thread(i):
    thread = threading.Thread(target=log.warning, args=("number %d", i))
    thread.start()
    thread.join()


def log_in_calls(i):
    log.warning("outer %d", i)
    call_elsewhere(log_one, i)


def log_and_fail(i):
    log.warning("number %d", i)
    raise ValueError(f"task {i}")


def log_and_die_once(i, folder):
    log.warning("number %d", i)
    if i == 2 and not (Path(folder) / "died").exists():
        (Path(folder) / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def log_in_child(i):
    pid = os.fork()
    if pid == 0:
        log.warning("child")
        os._exit(0)
    os.waitpid(pid, 0)
    log.warning("number %d", i)


def log_much(i, n):
    for k in range(n):
        log.warning("number %d", k)


def handlers_of_root():
    return [type(handler).__name__ for handler in logging.getLogger().handlers]


def warn_one(i, category=UserWarning):
    warnings.warn(f"number {i}", category, stacklevel=1)
    return i


def warn_odd(i):
    warnings.warn(Odd(i), stacklevel=1)


def warn_unloadable(i):
    warnings.warn(Unloadable(f"number {i}", None), stacklevel=1)


def warn_recorded(i):
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        warnings.warn(f"number {i}", stacklevel=1)
    with pytest.warns(UserWarning, match="expected"):
        warnings.warn("expected", stacklevel=1)
    return len(recorded)


def warn_in_calls(i):
    call_elsewhere(warn_one, i)


def print_one(i):
    print("number", i, flush=True)
    print("error", i, file=sys.stderr, flush=True)
    return sys.stdout.isatty()


def print_in_calls(i):
    print("outer", i)
    call_elsewhere(print_one, i)


# ---- log records


def test_records_reach_the_parents_handlers_with_their_task(hybrid, heard):
    with hybrid():
        assert Parallel(batch_size=3)(delayed(log_one)(i) for i in range(6)) == list(range(6))
    assert texts(heard) == [f"number {i}" for i in range(6)]
    record = min(heard, key=lambda record: record.getMessage())
    assert (record.name, record.levelname, record.funcName) == ("tests.messages", "WARNING", "log_one")
    assert record.process != os.getpid()
    assert {record.joblib_task for record in heard} == {f"task {i} of log_one" for i in range(6)}
    assert all(record.joblib_task == f"task {record.getMessage()[7:]} of log_one" for record in heard)


def test_records_come_before_the_result_of_their_task(hybrid, heard):
    with hybrid():
        results = Parallel(batch_size=1, return_as="generator")(delayed(log_one)(i) for i in range(3))
        for i in results:
            assert f"number {i}" in texts(heard)
    assert len(heard) == 3


@pytest.mark.parametrize("task", [log_at_root, log_with_null_handler, log_in_threads])
def test_every_way_to_log_is_heard(hybrid, heard, task):
    with hybrid():
        Parallel(batch_size=1)(delayed(task)(i) for i in range(2))
    suffixes = [f".{k}" for k in range(3)] if task is log_in_threads else [""]
    assert texts(heard) == sorted(f"number {i}{suffix}" for i in range(2) for suffix in suffixes)


def test_process_workers_hear_every_thread(processes, heard):
    with processes():
        Parallel(batch_size=1)(delayed(log_in_own_thread)(i) for i in range(2))
    assert texts(heard) == ["number 0", "number 1"]


def test_exceptions_and_extras_travel_as_far_as_they_can(hybrid, heard):
    with hybrid():
        Parallel()(delayed(log_failure)(i) for i in range(2))
    for i, record in enumerate(sorted(heard, key=lambda record: record.joblib_task)):
        shown = logging.Formatter("%(message)s").format(record)
        assert shown.startswith("failed\nTraceback (most recent call last):\n")
        assert shown.endswith(f"\nKeyError: {i}")
        assert record.candidate == {"C": i}
        assert "lock" in record.lock


def test_what_a_task_configured_has_its_records_and_nobody_else(hybrid, heard, tmp_path):
    with hybrid():
        Parallel(batch_size=1)(delayed(log_configured)(i, str(tmp_path / f"{i}.log")) for i in range(2))
    assert [(tmp_path / f"{i}.log").read_text() for i in range(2)] == ["number 0\n", "number 1\n"]
    assert texts(heard) == ["later 0", "later 1"]


def test_what_an_initializer_configured_has_the_records(processes, heard, tmp_path, capfd):
    with processes(initializer=_configure, initargs=(str(tmp_path),)):
        Parallel()(delayed(log_one)(i, level=logging.INFO) for i in range(4))
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert sorted(lines) == [f"number {i}" for i in range(4)]
    assert (heard, capfd.readouterr().err) == ([], "")


def _configure(folder):
    logging.basicConfig(filename=f"{folder}/{os.getpid()}.log", format="%(message)s", level=logging.INFO)


def test_nothing_stays_in_the_root_logger_of_a_worker(dask_client, request):
    with make_hybrid("dask", request)():
        assert Parallel()(delayed(log_one)(i, level=logging.DEBUG) for i in range(4)) == list(range(4))
    assert set(map(tuple, dask_client.run(handlers_of_root).values())) == {()}


def test_process_workers_take_over_levels_and_give_them_up(processes, heard):
    logger, quiet = logging.getLogger("tests.messages.chatty"), logging.getLogger("tests.messages.quiet")

    def call():
        heard.clear()
        with processes():
            for name in (logger.name, quiet.name, "tests.messages.other"):
                Parallel()(delayed(log_one)(i, name, logging.INFO) for i in range(2))
                Parallel()(delayed(log_one)(i, name, logging.WARNING) for i in range(2))
        return [(record.name.rpartition(".")[2], record.levelname) for record in heard]

    loud = [("chatty", "WARNING"), ("quiet", "WARNING"), ("other", "WARNING")]
    assert call() == [one for one in loud for _ in range(2)]
    logger.setLevel(logging.INFO)
    quiet.setLevel(logging.ERROR)
    try:
        assert sorted(call()) == sorted(2 * [("chatty", "INFO"), ("chatty", "WARNING"), ("other", "WARNING")])
        logging.disable(logging.WARNING)
        assert call() == []
    finally:
        logger.setLevel(logging.NOTSET)
        quiet.setLevel(logging.NOTSET)
        logging.disable(logging.NOTSET)
    assert call() == [one for one in loud for _ in range(2)]


def test_the_parents_levels_decide(hybrid, heard):
    log.setLevel(logging.ERROR)
    try:
        with hybrid():
            Parallel()(delayed(log_one)(i) for i in range(2))
    finally:
        log.setLevel(logging.NOTSET)
    assert (heard, last_report().messages) == ([], ())


def test_without_any_handler_records_go_to_stderr_once(hybrid, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with hybrid():
        Parallel()(delayed(log_one)(i) for i in range(2))
    assert sorted(capfd.readouterr().err.splitlines()) == ["number 0", "number 1"]


def test_a_task_that_fails_is_heard_first(hybrid, heard):
    with hybrid(), pytest.raises(ValueError, match="task 0"):
        Parallel()(delayed(log_and_fail)(i) for i in range(1))
    assert texts(heard) == ["number 0"]


def test_a_batch_that_lost_its_data_is_heard_when_it_ran(request, monkeypatch, capsys):
    lost = BatchDataLostError.like(DataLostError(2, "gone", "/nowhere"))
    outcomes = [Outcome(None, lost, said=(SaidPrint(0, "stdout", ["lost\n"]),))]
    outcomes.append(Outcome([1], None, said=(SaidPrint(0, "stdout", ["found\n"]),)))
    monkeypatch.setattr(fake, "unpack", lambda packed: outcomes.pop(0))
    with make_hybrid("fake", request)():
        assert Parallel(n_jobs=2)([delayed(log_one)(1)]) == [1]
    assert capsys.readouterr().out == "found\n"


@pytest.mark.breaks_pool
@pytest.mark.filterwarnings("ignore::joblib_backends.errors.RecoveryWarning")
def test_a_worker_that_dies_says_nothing_twice(processes, heard, tmp_path):
    with processes():
        got = Parallel(batch_size=1)(delayed(log_and_die_once)(i, str(tmp_path)) for i in range(4))
    assert got == list(range(4))
    assert (tmp_path / "died").exists()
    assert texts(record for record in heard if record.name == log.name) == [f"number {i}" for i in range(4)]


def test_a_forked_child_says_what_it_says_where_it_is(processes, heard, new_workers, capfd):
    with processes():
        Parallel(batch_size=1)(delayed(log_in_child)(i) for i in range(2))
    assert texts(heard) == ["number 0", "number 1"]
    assert capfd.readouterr().err.splitlines() == ["child", "child"]


def test_calls_in_tasks_are_heard_once_with_both_tasks(hybrid, tier, heard):
    with hybrid():
        Parallel(batch_size=1)(delayed(log_in_calls)(i) for i in range(2))
    assert texts(heard) == ["number 0", "number 1", "number 10", "number 11", "outer 0", "outer 1"]
    tasks = {record.getMessage(): record.joblib_task for record in heard}
    assert tasks["outer 1"] == "task 1 of log_in_calls"
    inner = "" if tier == "dask" else "task 1 of and_pid, in "
    assert tasks["number 11"] == f"{inner}task 1 of log_in_calls"


def test_what_is_too_much_is_counted(processes, heard):
    with processes():
        Parallel(batch_size=1)(delayed(log_much)(i, 1_005 - i) for i in range(2))
    said = texts(record for record in heard if record.name == log.name)
    assert len(said) == 2_000
    omitted = texts(record for record in heard if record.name != log.name)
    assert omitted == [
        "4 more messages of the batch of task 1 of log_much were left out.",
        "5 more messages of the batch of task 0 of log_much were left out.",
    ]


def test_a_report_counts_what_was_said(hybrid, heard):
    with hybrid():
        Parallel(batch_size=4)(delayed(log_one)(i % 2) for i in range(4))
    messages = sorted(last_report().messages)
    assert [message[:3] for message in messages] == [("WARNING", "number 0", 2), ("WARNING", "number 1", 2)]
    assert messages[1].task in ("task 1 of log_one", "task 3 of log_one")


def test_a_handler_that_raises_fails_no_call(hybrid):
    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("broken")

    handler = Broken()
    log.addHandler(handler)
    try:
        with hybrid():
            assert Parallel()(delayed(log_one)(i) for i in range(3)) == [0, 1, 2]
    finally:
        log.removeHandler(handler)


# ---- warnings


def test_warnings_reach_the_parents_filters_with_class_place_and_task(hybrid):
    with hybrid(), pytest.warns(Odd) as recorded:
        Parallel(batch_size=1)(delayed(warn_odd)(i) for i in (1, 3))
    assert sorted(one.message.number for one in recorded) == [1, 3]
    assert {one.message.joblib_task for one in recorded} == {"task 0 of warn_odd", "task 1 of warn_odd"}
    assert {(one.category, one.filename, one.lineno) for one in recorded} == {
        (Odd, __file__, warn_odd.__code__.co_firstlineno + 1)
    }


def test_the_parent_shows_what_its_filters_let_pass_once_a_place(hybrid, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__warningregistry__", {}, raising=False)
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.filterwarnings("ignore", "number 1", module=__name__)
        warnings.showwarning = lambda message, *rest: shown.append(str(message))
        with hybrid():
            for _ in range(2):
                Parallel(batch_size=1)(delayed(warn_one)(i, ResourceWarning if i == 3 else UserWarning) for i in (0, 1))
    assert shown == ["number 0"]


def test_a_warning_that_the_parent_makes_an_error_is_shown(hybrid, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: shown.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hybrid():
            assert Parallel(batch_size=1)(delayed(warn_one)(20 + i) for i in range(2)) == [20, 21]
    assert sorted(shown) == ["number 20", "number 21"]


@pytest.mark.parametrize("task", [warn_unloadable, warn_one])
def test_a_class_that_cannot_travel_becomes_a_user_warning(hybrid, task):
    args = () if task is warn_unloadable else (Unpicklable,)
    name = "Unloadable" if task is warn_unloadable else "Unpicklable"
    with hybrid(), pytest.warns(UserWarning, match="number") as recorded:
        Parallel(batch_size=1)(delayed(task)(i, *args) for i in range(30, 32))
    assert sorted((one.category, str(one.message)) for one in recorded) == [
        (UserWarning, f"{name}: number {i}") for i in (30, 31)
    ]


def test_what_a_task_records_it_keeps(hybrid, recwarn):
    with hybrid():
        assert Parallel()(delayed(warn_recorded)(i) for i in range(2)) == [1, 1]
    assert not recwarn.list


def test_warnings_of_calls_in_tasks_come_once(hybrid):
    with hybrid(), pytest.warns(UserWarning, match="number") as recorded:
        Parallel(batch_size=1)(delayed(warn_in_calls)(4 + i) for i in range(2))
    assert sorted(str(one.message) for one in recorded) == [f"number {n}" for n in (40, 41, 50, 51)]


def test_a_search_warns_as_with_one_job(hybrid):
    X, y = load_iris(return_X_y=True)  # noqa: N806
    search = GridSearchCV(LogisticRegression(max_iter=1), {"C": [1.0, 2.0]}, cv=3, refit=False)
    counts = {}
    for n_jobs in (1, 2):
        search.set_params(n_jobs=n_jobs)
        with hybrid(), pytest.warns(ConvergenceWarning) as recorded:
            search.fit(X, y)
        counts[n_jobs] = [str(one.message) for one in recorded if one.category is ConvergenceWarning]
    assert counts[2] == counts[1]
    assert len(counts[2]) == 6
    assert re.search(r"^task \d of _fit_and_score \(candidate C=.*, fold \d of 3\)$", last_report().messages[0].task)


def test_what_is_shared_is_warned_of_for_each_task(hybrid):
    X, y = load_iris(return_X_y=True)  # noqa: N806
    steps = make_pipeline(FunctionTransformer(_scale_slowly), StandardScaler(), LogisticRegression())
    search = GridSearchCV(steps, {"logisticregression__C": [1.0, 2.0, 3.0]}, cv=2, refit=False, n_jobs=2)
    with hybrid(), pytest.warns(UserWarning, match="slow") as recorded:
        search.fit(X, y)
    # Once when it is fitted, once when the test part is transformed.
    assert len([one for one in recorded if "slow" in str(one.message)]) == 2 * 3 * 2


def _scale_slowly(X):  # noqa: N803
    import time

    time.sleep(0.02)
    warnings.warn("slow", stacklevel=1)
    return X


# ---- prints


def test_prints_are_not_lost_in_notebooks(hybrid, notebook, capsys):
    with hybrid():
        assert Parallel(batch_size=1)(delayed(print_one)(i) for i in range(3)) == [False] * 3
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == [f"number {i}" for i in range(3)]
    assert sorted(err.splitlines()) == [f"error {i}" for i in range(3)]
    assert Message("print", "number 1", 1, "task 1 of print_one") in last_report().messages


def test_prints_of_calls_in_tasks_are_not_lost_in_notebooks(hybrid, notebook, capsys):
    with hybrid():
        Parallel(batch_size=1)(delayed(print_in_calls)(i) for i in range(2))
    lines = ["number 0", "number 1", "number 10", "number 11", "outer 0", "outer 1"]
    assert sorted(capsys.readouterr().out.splitlines()) == lines


def test_prints_go_straight_through_elsewhere(processes, new_workers, capfd):
    with processes():
        Parallel(batch_size=1)(delayed(print_one)(i) for i in range(3))
    assert sorted(capfd.readouterr().out.splitlines()) == [f"number {i}" for i in range(3)]
    assert last_report().messages == ()


# ---- one batch, without a worker


@pytest.fixture
def batch():
    """Return what hears a batch, of which nothing is put in place."""
    return Heard(Listening(hears_prints=True))


def test_a_batch_that_says_nothing_sends_nothing(batch):
    assert list(batch.each("ab")) == ["a", "b"]
    assert batch.end() == ()


def test_prints_of_one_task_are_one_message(batch):
    for _ in batch.each(range(2)):
        for text in ("a", "\n", "b", "\n"):
            batch.add_print("stdout", text)
    batch.add_print("stderr", "c")
    assert [(one.place, one.stream, one.text) for one in batch.end()] == [
        (0, "stdout", "a\nb\n"), (1, "stdout", "a\nb\n"), (1, "stderr", "c"),
    ]  # fmt: skip


def test_a_megabyte_is_all_that_travels(batch):
    batch.add_print("stdout", 900_000 * "x")
    batch.add_print("stdout", 200_000 * "x")
    batch.add_print("stdout", "\n")
    batch.add(lambda place: SaidWarning(place, b"", "UserWarning", 100_000 * "x", "", 1, None))
    kept, omitted = batch.end()
    assert (len(kept.text), omitted) == (900_001, OmittedMessages(-1, 2))


def test_what_a_batch_left_behind_is_not_heard_after_it(batch):
    with belonging_to(batch):
        assert current() is batch
        batch.end()
        assert current() is None


def test_the_parent_hears_nothing_of_its_own():
    hook, stream = warnings.showwarning, sys.stdout
    with hearing(Listening(hears_prints=True), is_worker=False, is_alone=False) as heard:
        assert current() is None
        assert (warnings.showwarning, sys.stdout) == (hook, stream)
    assert heard.end() == ()


def test_a_stream_that_is_closed_fails_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    assert retell([SaidPrint(0, "stdout", ["a"])], str) == []
    monkeypatch.setattr(sys, "stdout", None)
    assert len(retell([SaidPrint(0, "stdout", ["a"])], str)) == 1


def test_a_record_whose_text_cannot_be_made_is_the_handlers_trouble():
    record = logging.LogRecord("tests", logging.INFO, __file__, 1, "%d", ("x",), None)
    with pytest.raises(TypeError):
        SaidRecord.of(record, 0)


def test_warnings_of_modules_that_are_not_here_are_shown_once_a_place():
    said = [SaidWarning(0, b"", "Strange", "text", "/nowhere/strange.py", 7, "strange.module")] * 2
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as shown:
        warnings.simplefilter("default")
        warnings.showwarning = warnings._showwarning_orig
        warnings._showwarnmsg_impl = lambda one: shown.write(f"{one.message}\n")
        retell(said, str)
    assert shown.getvalue() == "Strange: text\n"
