"""One call's batches, with tiers that do what the test says: every future ends exactly once, whatever dies."""

import contextlib
import copy
import itertools
import threading
from concurrent.futures import CancelledError, Future

import pytest
from conftest import LONG, eventually
from joblib._parallel_backends import SequentialBackend
from joblib.parallel import BatchedCalls

from joblib_backends.budget import Share
from joblib_backends.config import Config
from joblib_backends.data.scope import ResidentScope
from joblib_backends.data.store import default_store
from joblib_backends.errors import TaskPicklingError, WorkerLostError
from joblib_backends.pilot import Pilot
from joblib_backends.rules import Facts, Plan
from joblib_backends.scheduler import Call
from joblib_backends.tiers import Tier, register_tier
from joblib_backends.tiers.fake import fake_control
from joblib_backends.worker import Outcome, run_here

FORMS = ["list", "generator", "generator_unordered"]

#: The backend, and n_jobs, of calls inside tasks.
NESTED = (SequentialBackend(nesting_level=1), None)


class ManualTier(Tier):
    """Gives the test the futures; ``answer`` runs a batch."""

    name = "manual"
    shares_memory = True
    pending = ()
    looks_ahead = 0

    @classmethod
    def capacity(cls, config):
        return 2

    def __init__(self, config, n_jobs):
        type(self).pending = self.futures = []
        self.events = []

    @property
    def look_ahead(self):
        return self.looks_ahead

    def submit(self, work):
        self.futures.append((work, Future()))
        return self.futures[-1][1]

    def outcome(self, future):
        return future.result()

    def abort(self):
        for _, future in self.futures:
            future.cancel()

    def close(self):
        pass


class InstantTier(ManualTier):
    name = "instant"

    def submit(self, work):
        future = Future()
        future.set_result(run_here(work.function, Share(None, {}), None))
        return future


class RefusingTier(ManualTier):
    name = "refusing"

    def submit(self, work):
        raise WorkerLostError("no worker is left")


for _tier in (ManualTier, InstantTier, RefusingTier):
    register_tier(f"test-{_tier.name}", f"{__name__}:{_tier.__name__}")


def answer(work, future):
    future.set_result(run_here(work.function, Share(None, {}), None))


@contextlib.contextmanager
def open_call(tier="fake", n_jobs=2, form="list"):
    scope = ResidentScope(default_store(), outlives_calls=True)
    pilot = Pilot(Facts(tier, n_jobs=n_jobs), Config())
    call = Call(Config(), n_jobs, pilot, scope, {}, return_as=form)
    try:
        yield call
    finally:
        call.abort()
        call.end()
        ManualTier.pending = ()


class Callbacks:
    """Counts calls of each batch's callback, and what was wrong with the moment."""

    def __init__(self, call):
        self.call = call
        self.seen = []
        self.inside_submit = threading.local()
        self.wrong = []

    def submit(self, function):
        self.inside_submit.now = True
        try:
            return self.call.submit(function, self.note, NESTED)
        finally:
            self.inside_submit.now = False

    def note(self, future):
        self.seen.append(future)
        if getattr(self.inside_submit, "now", False):
            self.wrong.append("inside submit")
        if self.call._lock.locked() and not self.call._lock.acquire(timeout=LONG):
            self.wrong.append("under the lock")
        with contextlib.suppress(RuntimeError):
            self.call._lock.release()


def results_of(value):
    return BatchedCalls([(copy.copy, (value,), {})], NESTED)


def fails():
    raise KeyError("the task")


# ---- results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tier", ["fake", "threads", "inline", "test-instant"])
def test_every_batch_ends_with_its_results_and_one_callback(tier, form):
    with open_call(tier, form=form) as call:
        callbacks = Callbacks(call)
        futures = [callbacks.submit(results_of(i)) for i in range(20)]
        assert [call.retrieve(future, LONG) for future in futures] == [[i] for i in range(20)]
        assert eventually(lambda: len(callbacks.seen) == 20)
        assert (set(callbacks.seen), callbacks.wrong) == (set(futures), [])


def test_batches_that_end_at_once_do_not_recurse():
    """5000 of them, each submitted by the callback of the one before, as joblib does."""
    with open_call("test-instant") as call:
        futures, n_left = [], itertools.count()

        def submit_next(_=None):
            if next(n_left) < 5000:
                futures.append(call.submit(results_of(1), submit_next, NESTED))

        submit_next()
        for index in range(5000):
            assert call.retrieve(futures[index], LONG) == [1]
    assert len(futures) == 5000


@pytest.mark.parametrize("form", FORMS)
def test_five_thousand_waiting_batches_do_not_recurse(form):
    with open_call("test-instant", form=form) as call:
        futures = [call.submit(results_of(i), lambda _: None, NESTED) for i in range(5000)]
        assert call.retrieve(futures[-1], LONG) == [4999]


def test_a_batch_completed_out_of_order_waits_for_whoever_asks():
    with open_call("test-manual", n_jobs=3) as call:
        futures = [call.submit(results_of(i), None, NESTED) for i in range(3)]
        for item in reversed(ManualTier.pending):
            answer(*item)
        assert [call.retrieve(future, LONG) for future in futures] == [[0], [1], [2]]


# ---- the limit


@pytest.mark.parametrize(("n_jobs", "look_ahead"), [(1, 0), (2, 0), (2, 3)])
def test_the_tier_never_holds_more_than_n_jobs_and_what_it_looks_ahead(n_jobs, look_ahead, monkeypatch):
    monkeypatch.setattr(ManualTier, "looks_ahead", look_ahead)
    with open_call("test-manual", n_jobs=n_jobs) as call:
        futures = [call.submit(results_of(i), None, NESTED) for i in range(10)]
        for done in range(10):
            assert len(ManualTier.pending) == min(10, done + n_jobs + look_ahead)
            answer(*ManualTier.pending[done])
        assert [call.retrieve(future, LONG) for future in futures] == [[i] for i in range(10)]


def test_batches_start_in_the_order_in_which_they_came():
    with fake_control() as control, open_call() as call:
        control.hold()
        futures = [call.submit(results_of(i), None, NESTED) for i in range(6)]
        control.release()
        assert [call.retrieve(future, LONG) for future in futures] == [[i] for i in range(6)]
        assert len(control.submitted) == 6


def test_submit_does_not_wait_for_work():
    with fake_control() as control, open_call() as call:
        control.hold()
        futures = [call.submit(results_of(i), None, NESTED) for i in range(50)]
        assert not any(future.done() for future in futures)


# ---- failures


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tier", ["fake", "threads", "inline"])
def test_after_a_failure_every_other_future_raises_it(tier, form):
    with open_call(tier, form=form) as call:
        first = call.submit(fails, None, NESTED)
        with pytest.raises(KeyError, match="the task"):
            call.retrieve(first, LONG)
        later = [call.submit(results_of(i), None, NESTED) for i in range(3)]
        for future in [first, *later]:
            with pytest.raises(KeyError, match="the task"):
                call.retrieve(future, LONG)


def test_a_batch_that_cannot_travel_after_a_failure_ends_with_that_failure():
    with fake_control(), open_call() as call:
        first = call.submit(fails, None, NESTED)
        with pytest.raises(KeyError, match="the task"):
            call.retrieve(first, LONG)
        late = call.submit(BatchedCalls([(abs, ((i for i in []),), {})], NESTED), None, NESTED)
        with pytest.raises(KeyError, match="the task"):
            call.retrieve(late, LONG)


def test_waiting_for_one_future_raises_the_failure_of_another():
    with open_call("test-manual") as call:
        slow, bad = (call.submit(function, None, NESTED) for function in (results_of(0), fails))
        answer(*ManualTier.pending[1])
        with pytest.raises(KeyError, match="the task"):
            call.retrieve(slow, LONG)
        assert bad.done()


def test_a_lost_batch_runs_again():
    with fake_control() as control, open_call() as call:
        control.hold()
        control.lose_next()
        futures = [call.submit(results_of(i), None, NESTED) for i in range(4)]
        control.release()
        assert [call.retrieve(future, LONG) for future in futures] == [[i] for i in range(4)]
        report = call.end()
    assert (report.lost_workers, report.retries) == (1, 1)
    assert len(control.submitted) == 5


def test_a_batch_that_is_lost_more_often_than_retries_ends_the_call_when_all_others_are_done():
    with fake_control() as control, open_call() as call:
        control.hold()
        for _ in range(3):
            control.lose_next()
        futures = [call.submit(results_of(0), None, NESTED)]
        control.release()
        with pytest.raises(WorkerLostError, match=r"copy, task 0 \(0\), died: .* tried 3 times \(retries=2\)"):
            call.retrieve(futures[0], LONG)


@pytest.mark.parametrize("form", FORMS)
def test_a_tier_that_refuses_a_batch_fails_the_call_and_not_submit(form):
    with open_call("test-refusing", form=form) as call:
        future = call.submit(results_of(0), None, NESTED)
        with pytest.raises(WorkerLostError, match=r"copy, task 0 \(0\), died: it was lost"):
            call.retrieve(future, LONG)


def test_a_batch_that_cannot_travel_fails_the_call_and_not_submit():
    lock = threading.Lock()
    with open_call("fake") as call:
        future = call.submit(results_of(lock), None, NESTED)
        with pytest.raises(TaskPicklingError, match="cannot be pickled"):
            call.retrieve(future, LONG)


@pytest.mark.parametrize("form", FORMS)
def test_a_callback_that_raises_fails_the_other_batches(form):
    def callback(_):
        raise LookupError("in the callback")

    with open_call("test-manual", form=form) as call:
        first, second = (call.submit(results_of(i), callback, NESTED) for i in range(2))
        answer(*ManualTier.pending[0])
        assert call.retrieve(first, LONG) == [0]
        with pytest.raises(LookupError, match="in the callback"):
            call.retrieve(second, LONG)


def test_only_the_unordered_form_calls_back_for_a_failure():
    """There joblib takes failures from its callback; in the other forms from the caller, and counts only successes."""
    for form, n_calls in zip(FORMS, (0, 0, 1), strict=True):
        with open_call("fake", form=form) as call:
            callbacks = Callbacks(call)
            futures = [callbacks.submit(fails) for _ in range(3)]
            with pytest.raises(KeyError):
                call.retrieve(futures[0], LONG)
            assert eventually(lambda seen=callbacks.seen, n=n_calls: len(seen) == n)


def test_a_second_failure_changes_nothing():
    with open_call("test-manual") as call:
        futures = [call.submit(function, None, NESTED) for function in (fails, lambda: 1 / 0)]
        for item in ManualTier.pending:
            answer(*item)
        for future in futures:
            with pytest.raises(KeyError):
                call.retrieve(future, LONG)


# ---- the end


@pytest.mark.parametrize("form", FORMS)
def test_abort_ends_every_future(form):
    with open_call("test-manual", form=form) as call:
        futures = [call.submit(results_of(i), None, NESTED) for i in range(5)]
        call.abort()
        for future in futures:
            with pytest.raises(CancelledError):
                call.retrieve(future, LONG)
        assert all(tier_future.cancelled() for _, tier_future in ManualTier.pending)


def test_abort_wakes_a_caller_who_waits():
    with open_call("test-manual") as call:
        future = call.submit(results_of(0), None, NESTED)
        timer = threading.Timer(0.1, call.abort)
        timer.start()
        with pytest.raises(CancelledError):
            call.retrieve(future, LONG)
        timer.join()


def test_a_result_that_comes_after_the_abort_is_dropped():
    with open_call("test-manual", n_jobs=1) as call:
        callbacks = Callbacks(call)
        future = callbacks.submit(results_of(0))
        work, tier_future = ManualTier.pending[0]
        tier_future.set_running_or_notify_cancel()
        call.abort()
        answer(work, tier_future)
        with pytest.raises(CancelledError):
            call.retrieve(future, LONG)
        assert callbacks.seen == []


@pytest.mark.parametrize("ended_by", ["abort", "end"])
def test_a_batch_submitted_late_never_reaches_the_tier(ended_by):
    with open_call("test-manual", n_jobs=1) as call:
        call.submit(results_of(0), None, NESTED)
        getattr(call, ended_by)()
        call.submit(results_of(1), None, NESTED)
        assert len(ManualTier.pending) == 1


def test_the_results_stay_when_the_completer_takes_them_away(monkeypatch):
    """Race: the caller sees ``ready``, and then the completer sets the result and clears it."""
    with open_call("threads", form="generator") as call:
        future = call.submit(results_of(7), None, NESTED)
        assert eventually(future.done)
        reads = iter([[7], None, None])
        monkeypatch.setattr(type(future), "ready", property(lambda _: next(reads)), raising=False)
        monkeypatch.setattr(call, "_wait_until", lambda *_: True)
        assert call.retrieve(future, LONG) == [7]


def test_end_may_be_called_twice_and_reports_the_same_work():
    with open_call("fake") as call:
        future = call.submit(results_of(0), None, NESTED)
        call.retrieve(future, LONG)
        assert (call.end().batches, call.end().batches) == (1, 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_call_without_batches_ends(form):
    with open_call(form=form) as call:
        report = call.end()
    assert (report.tasks, report.tier, report.reason) == (0, "none", "there were no tasks")


def test_a_call_says_where_it_is():
    with open_call("test-manual", n_jobs=1) as call:
        call.submit(results_of(0), None, NESTED)
        call.submit(results_of(1), None, NESTED)
        assert repr(call) == "<Call open, 1/1 in flight, 1 waiting>"
        call.abort()
        assert repr(call).startswith("<Call failed")
        call.end()
        assert repr(call).startswith("<Call ended")


def test_an_outcome_without_results_is_an_empty_batch():
    with open_call("test-manual", n_jobs=1) as call:
        future = call.submit(results_of(0), None, NESTED)
        ManualTier.pending[0][1].set_result(Outcome(None, None))
        assert call.retrieve(future, LONG) == []


class Undecided(Pilot):
    """Says where batches go as the test does."""

    def __init__(self, tier):
        super().__init__(Facts(tier, n_jobs=2), Config())

    def send_to(self, tier):
        self.plan = Plan(tier, "the test")

    @property
    def adapts(self):
        return True

    def replan(self, n_pending, *, more_to_come, running=(0.0, 0, 0.0), in_caller=None):
        return True


@contextlib.contextmanager
def undecided_call(tier="test-manual"):
    scope = ResidentScope(default_store(), outlives_calls=True)
    pilot = Undecided(tier)
    call = Call(Config(), 2, pilot, scope, {})
    try:
        yield call, pilot
    finally:
        call.abort()
        call.end()
        ManualTier.pending = ()


def test_a_caller_that_waits_is_woken_for_a_batch_that_is_left_to_it():
    """A thread that stands in for the caller may send work back to it; nobody else would ever run it."""
    ran, waits, opened = threading.Event(), threading.Event(), []

    def caller():
        with undecided_call() as (call, pilot):
            future = call.submit(results_of(0), None, NESTED)
            opened.append((call, pilot))
            waits.set()
            with contextlib.suppress(CancelledError):
                call.retrieve(future, LONG)

    thread = threading.Thread(target=caller)
    thread.start()
    assert waits.wait(LONG)
    call, pilot = opened[0]
    assert eventually(lambda: len(ManualTier.pending) == 1)
    pilot.send_to("inline")
    call.submit(BatchedCalls([(ran.set, (), {})], NESTED), None, NESTED)
    assert ran.wait(LONG)
    call.abort()
    thread.join(LONG)
    assert not thread.is_alive()


def test_who_stands_in_for_the_caller_leaves_it_what_wakes_it():
    with undecided_call() as (call, _):
        call._completer.wake()
        call._help_out(True)
        assert call._completer._done.get_nowait() is None


def test_who_completes_a_batch_for_the_caller_wakes_it():
    """The caller may be back, and wait for just that batch."""
    with undecided_call() as (call, _):
        future = call.submit(results_of(0), None, NESTED)
        call._release()
        answer(*ManualTier.pending[0])
        call._help_out(True)
        assert future.done()
        assert call._completer._done.get_nowait() is None
