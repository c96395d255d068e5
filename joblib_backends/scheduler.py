"""One call of ``Parallel``: batches in, results out.

::

    submit ──> waiting ──(at most n_jobs, plus look-ahead)──> Tier.submit
      ^  any thread    |                                          |
      |                |                           batch done: start the next that waits,
      |        the calling thread runs it,         put the outcome into a queue
      |        where the plan says so                             v
    joblib's callback <── future set <── Tier.outcome <────── completer ──> Pilot: another plan?

Who runs where: ``submit`` runs in the user's thread and, from joblib's callback, in the completer. When a batch is
done, the tier's thread hands the tier the next one and fills the queue: no code of joblib or of the user runs there,
so a generator that is slow, or uses the same backend itself, never blocks a pool's thread or Dask's event loop.
The completer does the rest: unpickle, call joblib back, advance the user's generator, ask the pilot whether another
tier pays. For a list it is the caller itself, who waits anyway: a thread less to wake (benchmarks, rows "two tasks" and
"batch_size=1"). A generator's consumer is away between two results, and its input may wait for what it consumes: there
a thread of the crew is it. Where the caller itself runs batches and one of them takes long, a thread of the crew stands
in (``relief.py``).

Batches start when there is one for each job, or when the caller comes to wait for results: until then it is not known
among how many the cores are to be shared. A search whose candidates have steps in common starts when all of it is
known, or what can be had of it in a moment: then tasks that need the same run one after the other (``sharing/``).

A batch that is lost, with its worker, its data or its cluster, comes back to the queue, whole or task by task
(``recovery.py``); one that is given up ends the call when everything else of it is done. Batches whose results are in
the checkpoint never reach the queue.

Invariants, each tested:

- Every future that joblib holds ends exactly once: with its results, or with the failure of the call.
- ``submit`` never blocks on work.
- joblib's callback is called once per batch that succeeded, never inside ``submit``, never under a lock.
- Once a batch has failed, waiting for any other raises that failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, Final, Literal

from .advice import advice_for
from .allotment import Allotment
from .batches import Batch, BatchFuture, BatchQueue, Callback
from .budget import available_cores
from .completer import LOOK_INTERVAL_S, Completer, GetOutcome
from .config import Config
from .crew import Crew
from .data.scope import ResidentScope
from .errors import BatchDataLostError, BatchTimeoutError
from .labels import label_of, record_of, task_name
from .opening import Opening
from .pilot import Pilot
from .randomness import task_randomness
from .recovery import is_fault
from .relief import Relief
from .report import CallReport
from .rescue import Rescue
from .retelling import retell
from .router import Nested, Router
from .sharing.call import SharedFits
from .tally import Tally
from .tiers import Tier, Work
from .timeline.recorder import Recorder
from .worker import Outcome, task_names

__all__ = ["Call"]

_log = logging.getLogger(__name__)

#: Seconds that the caller waits at a time. Python handles a signal that comes right before a wait begins, Ctrl-C say,
#: only when the wait has ended (M: under load, 1 of 60 was lost in a wait without an end).
_LONGEST_WAIT_S: Final = 0.5

if TYPE_CHECKING:
    # SQLite takes 3 ms to import, which only calls with a checkpoint pay.
    from .checkpoint.call import CallCheckpoint
    from .progress import Progress


class Call:
    """The batches of one ``Parallel`` call.

    Parameters
    ----------
    config : Config
        What the user asked for.
    n_jobs : int
        Batches that may run at once.
    pilot : Pilot
        Says where they run.
    scope : ResidentScope
        What keeps placed buffers.
    warm : dict
        Where the context keeps what its next call should find warm; filled here.
    return_as : {"list", "generator", "generator_unordered"}
        How joblib returns results. In the last form it takes them, and failures, in its callback.
    more_to_come : callable, optional
        Called with whether the caller has come for results; returns whether the user's generator may still yield.
    is_lazy : callable, optional
        Returns whether to take a task from the input runs code of the user, which may draw random numbers.
    take_more : callable, optional
        Takes the next tasks from the input now, and returns whether to go on with that.
    dispatch_next : callable, optional
        The same where the user has fixed how much of the input may exist at a time.
    checkpoint : CallCheckpoint, optional
        Where finished tasks are kept, and looked for before they run.
    progress : callable, optional
        Returns what shows the progress of the call, from what is counted.
    records : bool, default=False
        Whether each batch is recorded for the timeline of the call.

    Notes
    -----
    Thread-safe. The lock guards the unfinished futures, the count of their tasks, which is read without it, the first
    failure; the queue of batches and the completer have their own. Only who takes a future out of the
    unfinished ones may end it.
    """

    def __init__(
        self,
        config: Config,
        n_jobs: int,
        pilot: Pilot,
        scope: ResidentScope,
        warm: dict[str, object],
        *,
        return_as: Literal["list", "generator", "generator_unordered"] = "list",
        more_to_come: Callable[[bool], bool] = lambda came: not came,
        is_lazy: Callable[[], bool] = lambda: True,
        take_more: Callable[[], bool] = lambda: False,
        dispatch_next: Callable[[], bool] = lambda: False,
        checkpoint: CallCheckpoint | None = None,
        progress: Callable[[Tally], Progress] | None = None,
        records: bool = False,
    ) -> None:
        self._config = config
        self._n_jobs = n_jobs
        self._pilot = pilot
        self._more_to_come = more_to_come
        self._is_lazy = is_lazy
        self._take_more = take_more
        self._dispatch_next = dispatch_next
        self._checkpoint = checkpoint
        self._n_submitted_tasks = 0
        self._tally = Tally(n_jobs, available_cores(config), Recorder() if records else None)
        self._shown = None if progress is None else progress(self._tally)
        self._router = Router(config, n_jobs, scope, warm, self._tally)
        self._caller_completes = return_as == "list"
        self._lock = threading.Lock()
        self._feeding = threading.Lock()
        self._joblib_polls = return_as == "generator_unordered"
        self._queue = BatchQueue(n_jobs, as_completed=self._joblib_polls)
        self._allotment = Allotment(config, n_jobs, self._queue, weakref.WeakMethod(self.start_what_waits))
        self._unfinished: set[BatchFuture] = set()
        self._n_pending_tasks = 0
        self._is_met = False
        self._sharing: SharedFits | None = None
        # The batch that the caller runs.
        self._in_caller: Batch | None = None
        self._opening = Opening(n_jobs, is_held=self._caller_completes)
        self._caller_came = False
        self._caller = threading.get_ident()
        self._failure: BaseException | None = None
        crew = warm["crew"] = Crew.shared()
        self._completer = Completer(crew, weakref.WeakMethod(self._complete), is_caller=self._caller_completes)
        self._relief = Relief(crew, self._help_out)
        self._rescue = Rescue(weakref.proxy(self), config, self._queue, self._router, pilot, self._tally)
        self._progress = threading.Event()
        self._ended = False

    def __repr__(self) -> str:
        state = "ended" if self._ended else "failed" if self._failure else "open"
        return f"<Call {state}, {self._queue}>"

    # ---- called in the user's thread, or in the completer by joblib's callback

    def submit(self, function: Callable[[], Any], callback: Callback | None, nested: Nested) -> BatchFuture:
        """Start a batch or let it wait for its turn; a batch that cannot travel fails the call, not this method."""
        future = BatchFuture(callback, len(function) if hasattr(function, "__len__") else 1)
        batch = Batch(future, function, nested, self._n_submitted_tasks)
        with self._lock:
            self._unfinished.add(future)
            self._n_pending_tasks += future.size
            self._n_submitted_tasks += future.size
        if self._shown is not None and not batch.first_task:
            self._shown.meet(batch.items)
        try:
            pieces = self._to_run(batch)
        except BaseException as error:
            self._enqueue(batch, functools.partial(_raise, error))
            pieces = []
        for piece in pieces:
            self._submit_piece(piece)
        self._end_if_call_failed(future)
        return future

    def _to_run(self, batch: Batch) -> list[Batch]:
        """Return what of a batch is to run: all, or what no checkpoint knows; task by task if each has its time."""
        if self._checkpoint is not None:
            batch.keys = self._checkpoint.keys_of(batch.items)
            known = self._checkpoint.recall(batch.keys)
            if known:
                self._tally.add_restored(len(known), task_names(batch.function))
                self._show()
            if len(known) == batch.size:
                results = [known[place] for place in range(batch.size)]
                self._enqueue(batch, functools.partial(_same, Outcome(results, None)))
                return []
            if known:
                left = [place for place in range(batch.size) if place not in known]
                [rest] = batch.split([left])
                assert rest.parts is not None
                rest.parts.put(list(known), list(known.values()))
                with self._lock:
                    self._n_pending_tasks -= len(known)
                batch = rest
        if self._config.task_timeout is not None and batch.size > 1:
            return batch.split([[place] for place in range(batch.size)])
        return [batch]

    def _submit_piece(self, batch: Batch) -> None:
        try:
            self._meet(batch)
            if self._sharing is not None and self._opening.is_held:
                if self._opening.gather(batch, self._n_pending_tasks):
                    self._release(takes_more=False)
                return
            self._share(batch)
            self.place(batch)
        except BaseException as error:
            self._enqueue(batch, functools.partial(_raise, error))
            return
        if self._joblib_polls and batch.tier is not None and batch.tier.runs_in_caller:
            # In this form joblib asks for no result before it is there: the completer is the caller.
            self._enqueue(batch, functools.partial(self._run_if_wanted, batch))
        else:
            self._wait_for_turn(batch)

    def _meet(self, batch: Batch) -> None:
        """Find out what the call is, by its first batch, and what this one has in common with others."""
        self._pilot.meet(batch.function, self._n_pending_tasks)
        if not self._is_met:
            self._is_met = True
            self._sharing = SharedFits.of_call(self._config, batch.function)
            if self._sharing is not None and self._caller_completes and not self._pilot.has_timeout:
                # Where each result is waited for in its turn, batches run in their turn.
                self._queue.ledger = self._sharing.ledger
        if self._sharing is not None:
            batch.steps = self._sharing.add(batch.function)
            batch.prefixes = self._sharing.prefixes_of(batch.steps)

    def _share(self, batch: Batch) -> None:
        if self._sharing is not None:
            if not self._more_to_come(self._caller_came):
                self._sharing.all_are_known()
            batch.runs = self._sharing.wrap(batch.function, batch.steps)

    def _wait_for_turn(self, batch: Batch) -> None:
        self._queue.put(batch)
        if self._opening.is_held:
            if self._opening.is_due(len(self._queue)):
                self._release()
        else:
            self._feed()
            self._tell_caller()

    def _tell_caller(self) -> None:
        """Wake the caller, which waits for results, if another thread left it the batch whose turn it is."""
        if not self._caller_completes or threading.get_ident() == self._caller:
            return
        if self._may_start(in_caller=True):
            self._completer.wake()

    @property
    def runs_in_caller(self) -> bool:
        """Whether batches are now left to the thread that waits for results."""
        return self._caller_completes and self._pilot.runs_in_caller

    def batch_size(self) -> int:
        """Return how many tasks joblib should put into the next batches."""
        return self._pilot.batch_size(self._n_pending_tasks, more_to_come=self._more_to_come(self._caller_came))

    def place(self, batch: Batch) -> None:
        """Send a batch where the plan says, encoded if memory is not shared there."""
        plan = self._pilot.plan_for(batch.function)
        tier = self._router.open(plan.tier)
        payload = batch.payload
        if payload is None and not tier.shares_memory:
            payload = self._router.encode(tier, batch.runs, batch.nested)
        self._queue.place(batch, tier, plan, payload)

    def _release(self, *, takes_more: bool = True) -> None:
        if self._sharing is not None and takes_more:
            is_known = bool(self._pilot.expected_task_s)
            self._opening.take_rest(lambda: self._n_pending_tasks, self._take_more, is_known=is_known)
        for batch in self._sorted(self._opening.release()):
            try:
                self._share(batch)
                self.place(batch)
            except Exception as error:
                self._enqueue(batch, functools.partial(_raise, error))
                continue
            self._queue.put(batch)
            if len(self._queue) >= self._n_jobs:
                self._feed()
        self._feed()

    def _sorted(self, gathered: list[Batch]) -> list[Batch]:
        """Return batches with those side by side that share most."""
        ledger = self._queue.ledger
        return gathered if ledger is None else sorted(gathered, key=lambda batch: ledger.order(batch.prefixes))

    def _end_if_call_failed(self, future: BatchFuture) -> None:
        with self._lock:
            failure = self._failure if future in self._unfinished else None
            if failure is not None:
                self._unfinished.discard(future)
        if failure is not None:
            future.set_exception(failure)

    def retrieve(self, future: BatchFuture | None, timeout: float | None) -> list[Any]:
        """Return the results of a batch, or raise what it, or the first batch that failed, raised.

        Raises
        ------
        BatchTimeoutError
            If that takes longer than ``timeout`` seconds.
        """
        if future is None:
            # joblib registered a batch whose submit never returned; the call ends with what made it fail.
            raise self._failure or CancelledError()
        self._caller_came = True
        if self._opening.is_held:
            self._release()
        self._rescue.end_if_nothing_else_is_left()
        end = None if timeout is None else time.monotonic() + timeout
        wait = self._complete_until if self._caller_completes else self._wait_until
        if wait(future, end):
            # Read once: the completer takes ``ready`` away when it has set the result.
            ready = future.ready
            return future.result() if ready is None else ready
        given_up_for = self._rescue.failure_of(future)
        if given_up_for is not None:
            self.fail(given_up_for, future)
            raise given_up_for
        raise BatchTimeoutError(
            f"A batch of {self._tally.function} had no result after timeout={timeout} seconds of waiting for it. "
            "Give Parallel a larger timeout, or smaller tasks."
        )

    def _complete_until(self, future: BatchFuture, end: float | None) -> bool:
        """Be the completer until ``future`` has ended or the time is ``end``; return whether it has ended."""
        while not future.done():
            if self._completer.finish_next(0.0) or self._run_one_here():
                continue
            self.leave_slot()
            left_s = math.inf if end is None else max(0.0, end - time.monotonic())
            if not self._completer.finish_next(min(left_s, _LONGEST_WAIT_S)) and not left_s:
                return future.done()
        return True

    def _wait_until(self, future: BatchFuture, end: float | None) -> bool:
        """Wait until the crew's completer has ended ``future`` or the time is ``end``; return whether it has."""
        while True:
            self._progress.clear()
            if future.done():
                return True
            if self._run_one_here():
                continue
            self.leave_slot()
            self._progress.wait(LOOK_INTERVAL_S)
            if future.ready is not None:
                return True
            if end is not None and time.monotonic() > end:
                return future.done()

    def leave_slot(self) -> None:
        """Before the calling thread waits: if it is a Dask worker's, let a task run in its place that may be ours."""
        outer_task = self._config.outer_task
        if outer_task is not None and self._router.is_open("dask"):
            outer_task.leave_slot()

    def abort(self) -> None:
        """Give up all that is not finished. Called when joblib wants no further result."""
        self.fail(CancelledError("The call was aborted."), None)
        self._router.abort()

    def end(self) -> CallReport:
        """Give back what the call used and return its report; idempotent."""
        # A batch that joblib's callback submits while the call ends must not reach a tier that is closed.
        self._queue.close()
        failed = self._failure is not None
        if not self._ended:
            try:
                self._relief.end()
                self._completer.wake()
            finally:
                self._router.close()
                if self._sharing is not None:
                    self._sharing.close()
            if self._checkpoint is not None:
                self._checkpoint.end(failed=failed)
            if self._shown is not None:
                n_tasks, n_shared = self._known()
                self._shown.end(n_tasks if failed else self._n_submitted_tasks, n_shared)
            if self._config.outer_task is not None and not failed:
                # Who fails does not wait for tasks that nobody needs any more.
                self._config.outer_task.take_slot()
            # Only now: Ctrl-C before leaves all of it, which may be done twice, to the next ``end``.
            self._ended = True
            self._tally.explain(self._pilot.end(failed=failed))
        self._tally.active_seconds = self._queue.busy_seconds()
        report = self._tally.report(
            failed=failed, predicted_seconds=self._pilot.predicted_s, planning_seconds=self._pilot.planning_s
        )
        figures: dict[str, Any] = {} if self._sharing is None else self._sharing.figures()
        report = report.replaced(**figures) if figures else report
        report = report.replaced(advice=advice_for(report))
        _log.debug("%s", report.headline)
        return report

    # ---- called in the thread that wants a result

    def _run_one_here(self) -> bool:
        """Run the first batch that waits, if the plan leaves it to the caller; return whether there was one."""
        if not self._may_start(in_caller=True) or not self._allotment.has_memory():
            return False
        batch = self._take_next(in_caller=True)
        if batch is None:
            return False
        self._in_caller = batch
        if self._pilot.has_left_caller(batch.function):
            # Race: a helper may have sent others to threads meanwhile, without having seen this one.
            self._in_caller = None
            self._queue.put_back(batch)
            self.place(batch)
            self._feed()
            return True
        outcome = self._run_here(batch)
        self._in_caller = None
        self._queue.finish(batch)
        if outcome.error is not None:
            # Not when the completer comes to it: until then the next batch would have been started.
            self.fail(outcome.error, batch.future)
        self._feed()
        if self._caller_completes:
            self._complete(batch, functools.partial(_same, outcome))
        else:
            self._enqueue(batch, functools.partial(_same, outcome))
        return True

    def _run_if_wanted(self, batch: Batch) -> Outcome:
        return Outcome(None, self._failure) if self._failure is not None else self._run_here(batch)

    def _run_here(self, batch: Batch) -> Outcome:
        tier = batch.tier
        assert tier is not None
        work = self._work(batch, tier)
        if not self._pilot.adapts:
            return tier.outcome(tier.submit(work))
        guards, size = self._pilot.guards(batch.function), batch.size
        # The user's generator must not draw from the tasks' random numbers: no completer beside such a task at first.
        draws_apart = guards and self._is_lazy() and self._more_to_come(self._caller_came)
        with (
            task_randomness.separate() if guards else contextlib.nullcontext(),
            self._relief.standing_by(size, size * self._pilot.expected_task_s, may_complete=not draws_apart),
        ):
            return tier.outcome(tier.submit(work))

    # ---- called in any thread, a tier's own included

    def _feed(self) -> None:
        """Hand batches to their tiers while the limit allows it.

        One thread feeds at a time. Another that comes meanwhile leaves, because the first looks again after it has
        let go of the lock; and a batch that is done at once comes back here inside ``_start``, and does not recurse.
        """
        has_memory = True
        while has_memory and self._may_start(in_caller=False) and self._feeding.acquire(blocking=False):
            try:
                has_memory = self._start_all()
            finally:
                self._feeding.release()

    def _start_all(self) -> bool:
        """Start what may start on tiers; return whether memory allows it all. If not, it is looked at again later."""
        while self._may_start(in_caller=False):
            if not self._allotment.has_memory():
                return False
            batch = self._take_next(in_caller=False)
            if batch is not None:
                self._start(batch)
        return True

    def _may_start(self, *, in_caller: bool) -> bool:
        # What is handed over cannot be taken back: nothing is, before there is anything to go by.
        looks_ahead = not self._pilot.has_seen_nothing
        return not self._opening.is_held and self._queue.has_next(in_caller=in_caller, looks_ahead=looks_ahead)

    def _take_next(self, *, in_caller: bool) -> Batch | None:
        return self._queue.start_next(in_caller=in_caller, looks_ahead=not self._pilot.has_seen_nothing)

    def _start(self, batch: Batch) -> None:
        tier = batch.tier
        assert tier is not None
        try:
            tier_future = tier.submit(self._work(batch, tier))
        except BaseException as error:
            tier_future = Future()
            tier_future.set_exception(error)
        # It takes the future as its argument: a future in its own callback would be a cycle, which keeps the pool.
        tier_future.add_done_callback(functools.partial(self._tier_is_done, batch, tier))

    def _work(self, batch: Batch, tier: Tier) -> Work:
        """Return what the tier gets, with its share of the cores as things are now."""
        name = task_names(batch.function)
        if batch.plan is not None:
            self._tally.add_start(batch.plan.tier, name, batch.plan.reason)
        more = self._more_to_come(self._caller_came)
        share = self._allotment.share_for(batch, tier, self._pilot.task_s, more_to_come=more)
        return Work(batch.runs, name, share, batch.payload, functools.partial(label_of, batch))

    def _tier_is_done(self, batch: Batch, tier: Tier, tier_future: Future[Any]) -> None:
        """Feed the tier and leave the rest to the completer. Called in whichever thread ended the tier's future.

        Until then this callback holds the batch, and with it the files of its residents: the worker opens them when
        it comes to a task, and their owners may be gone by then.
        """
        self._queue.finish(batch)
        if not tier_future.cancelled() and tier_future.exception() is None:
            self._feed()
        self._enqueue(batch, functools.partial(tier.outcome, tier_future))

    def _enqueue(self, batch: Batch, get_outcome: GetOutcome) -> None:
        try:
            self._completer.put(batch, get_outcome)
        except BaseException as error:
            self.fail(error, batch.future)

    def fail(self, error: BaseException, culprit: BatchFuture | None) -> None:
        """End every unfinished future with ``error``, the first failure of the call; later ones change nothing."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            self._queue.close()
            unfinished, self._unfinished = self._unfinished, set()
        for future in unfinished:
            if future is not culprit or not self._joblib_polls:
                # joblib's callback and this future hold each other: a cycle that would keep the context's workers.
                future.callback = None
            future.set_exception(error)
        self._progress.set()
        if self._caller_completes:
            self._completer.wake()
        if culprit is not None and self._joblib_polls:
            self._call_back(culprit)

    # ---- called in the completer: the caller, or a thread of the crew

    def _help_out(self, may_complete: bool) -> None:
        """Do the caller's part while it runs a batch that takes long. Called in a thread of the crew."""
        self._replan()
        if not may_complete:
            return
        has_taken = True
        try:
            has_taken = self._completer.finish_next(LOOK_INTERVAL_S)
        finally:
            if has_taken and not self._relief.is_on_duty:
                # Race: the caller is back, and waits for what this thread just took: its result, or the end of a batch
                # that kept it from running the next. A caller that is still in its batch looks at all that afterwards.
                self._completer.wake()

    def _replan(self) -> None:
        """Let the pilot decide again, and send the batches that wait where it now says."""
        more, batch = self._more_to_come(self._caller_came), self._in_caller
        in_caller = None if batch is None else batch.function
        running = self._relief.running
        if not self._pilot.replan(self._n_pending_tasks, more_to_come=more, running=running, in_caller=in_caller):
            return
        plan = self._pilot.plan
        _log.debug("From here on batches of %s go to %s: %s", self._tally.function, plan.tier, plan.reason)
        self.place_waiting(only_here=False)
        self.start_what_waits()

    def _complete(self, batch: Batch, get_outcome: GetOutcome) -> None:
        fault: BaseException | None
        received = time.perf_counter()
        try:
            outcome = get_outcome()
            decode_s = time.perf_counter() - received
            # Never what a task raised: a call inside it has faults of its own.
            fault = outcome.error if isinstance(outcome.error, BatchDataLostError) else None
            if self._sharing is not None and outcome.results is not None and batch.tier is not None:
                results = self._finish_shared(self._sharing, batch, outcome.results)
                outcome = dataclasses.replace(outcome, results=results)
        except BaseException as error:
            outcome, decode_s = Outcome(None, error), 0.0
            fault = error if is_fault(error) else None
            if fault is not None:
                # It is dealt with here. Its traceback has this frame, which has it: a cycle that would keep the call,
                # and the connection to a cluster that is gone, until the garbage collector comes by.
                fault.__traceback__ = None
        if batch.tier is not None and batch.plan is not None:
            self._note_way(batch, outcome, received, decode_s, fault)
        try:
            if outcome.said and fault is None and not self.has_failed:
                self._tally.add_messages(retell(outcome.said, functools.partial(task_name, batch)))
            self._settle(batch, outcome, fault)
        except BaseException as error:
            # A warning that the user has made an error, say: whoever waits for the batch is told.
            self.fail(error, batch.future)
            if not isinstance(error, Exception) and self.is_in_caller:
                raise

    def _note_way(
        self, batch: Batch, outcome: Outcome, received: float, decode_s: float, fault: BaseException | None
    ) -> None:
        """Count, and record, how a batch that a tier got went there and came back."""
        assert batch.tier is not None
        if not batch.started:
            if not outcome.spent.started:
                return  # it never came to a tier
            # It ran while its outcome was asked for: in the completer, where that is the caller.
            batch.started, received, decode_s = outcome.spent.started, time.perf_counter(), 0.0
        if outcome.error is None and not batch.tier.runs_in_caller:
            self._tally.add_way(max(0.0, received - batch.submitted - outcome.spent.wall), decode_s)
        recorder = self._tally.recorder
        if recorder is None:
            return
        try:
            recorder.add(record_of(batch, self._tally.function, outcome, received, decode_s, fault))
        except Exception as error:
            # The user's own objects have been asked for their names: that is no reason to lose what they made.
            _log.debug("A batch of %s is not in the timeline: %r", self._tally.function, error)

    def _settle(self, batch: Batch, outcome: Outcome, fault: BaseException | None) -> None:
        if fault is not None and batch.future in self._unfinished:
            self._rescue.of(batch, fault)
        elif outcome.error is not None:
            self.note_end(batch, outcome)
            if batch.future in self._unfinished:
                self.fail(outcome.error, batch.future)
        else:
            self.finish(batch, outcome)

    def finish(self, batch: Batch, outcome: Outcome) -> None:
        """Take the results of a batch, and deliver them if nothing else belongs to them."""
        results = outcome.results or []
        if self._checkpoint is not None and batch.keys and batch.tier is not None:
            self._checkpoint.keep(batch.keys, batch.items, results, outcome.spent.wall)
        self.note_end(batch, outcome)
        if batch.parts is not None:
            if not batch.parts.put(batch.positions, results):
                self._replan()
                return
            if batch.parts.has_failed:
                self._rescue.give_up_future(batch.future)
                return
            results = batch.parts.results
        with self._lock:
            is_wanted = batch.future in self._unfinished
            self._unfinished.discard(batch.future)
        if is_wanted:
            self._deliver(batch.future, results)
            self._replan()
            self._rescue.end_if_nothing_else_is_left()

    def note_end(self, batch: Batch, outcome: Outcome) -> None:
        """Count a batch that runs no more, and learn from it if it ran."""
        with self._lock:
            self._n_pending_tasks -= batch.size
        if batch.plan is None:
            return
        succeeded = outcome.error is None
        self._tally.add_end(batch.size, outcome, batch.first_task + batch.positions[0])
        self._show()
        if succeeded and outcome.spent.wall:
            size, busy_s, together = batch.size, self._queue.busy_seconds(), batch.n_together
            self._pilot.observe(batch.plan.tier, size, outcome.spent, busy_s, together, is_mixed=batch.is_mixed)

    def _show(self) -> None:
        if self._shown is not None:
            self._shown.look(*self._known())

    def _known(self) -> tuple[int | None, int]:
        """Return the number of tasks, once the input has ended, and how many fits were not necessary."""
        n_tasks = None if self._more_to_come(self._caller_came) else self._n_submitted_tasks
        return n_tasks, 0 if self._sharing is None else self._sharing.counts.fits_shared

    # ---- called by the rescue, too

    @property
    def unfinished(self) -> set[BatchFuture]:
        """The futures that have not ended."""
        with self._lock:
            return set(self._unfinished)

    @property
    def is_in_caller(self) -> bool:
        """Whether this is the thread that called joblib."""
        return threading.get_ident() == self._caller

    @property
    def has_failed(self) -> bool:
        """Whether the call has failed already."""
        return self._failure is not None

    @property
    def has_dispatched(self) -> bool:
        """Whether the caller has handed over all that it does by itself: it has come for results.

        A caller that polls never comes. If its input is slow, and pre_dispatch="all", it may dispatch still.
        """
        return self._caller_came or self._joblib_polls

    def dispatch_next(self) -> bool:
        """Have joblib dispatch the next tasks; return whether there may be more."""
        with self._apart_from_caller():
            return self._dispatch_next()

    @property
    def n_local_jobs(self) -> int:
        """Batches that may run at once on this machine."""
        return self._allotment.n_local_jobs

    def limit_jobs(self, n_jobs: int) -> None:
        """Run fewer batches at once from now on."""
        self._n_jobs = self._allotment.n_jobs = n_jobs
        self._queue.limit(n_jobs)

    def share_part(self, piece: Batch) -> None:
        """Find out what a part of a batch has in common with others."""
        if self._sharing is not None:
            piece.prefixes = self._sharing.prefixes_of(piece.steps)
            self._share(piece)

    def drop_shares(self, batch: Batch) -> None:
        """Note that a batch will never need what it has in common with others."""
        if self._sharing is not None and batch.tier is not None:
            self._sharing.give_up(batch.prefixes)

    def start_what_waits(self) -> None:
        """Start what may start now, here or in the calling thread."""
        self._feed()
        self._tell_caller()

    def place_waiting(self, *, only_here: bool) -> None:
        """Send batches that wait where the plan now says: all, or those that would run in this process."""
        for batch in self._queue.waiting:
            if self._queue.is_closed:
                return
            if only_here and (batch.tier is None or not batch.tier.shares_memory):
                continue
            try:
                self.place(batch)
            except BaseException as error:
                self.fail(error, batch.future)

    def _finish_shared(self, sharing: SharedFits, batch: Batch, results: list[Any]) -> list[Any]:
        if not self._more_to_come(self._caller_came):
            sharing.all_are_known()
        return sharing.finish(batch.prefixes, results)

    def _deliver(self, future: BatchFuture, results: list[Any]) -> None:
        if self._joblib_polls:
            # joblib takes the results in its callback, and its caller polls.
            future.set_result(results)
            self._call_back(future)
            return
        future.ready = results
        self._call_back(future)
        future.set_result(results)
        future.ready = None
        self._progress.set()

    def _call_back(self, future: BatchFuture) -> None:
        """Tell joblib, which counts the batch and dispatches the next from here."""
        callback, future.callback = future.callback, None
        try:
            if callback is not None:
                with self._apart_from_caller():
                    callback(future)
        except BaseException as error:
            self.fail(error, None)
            if not isinstance(error, Exception) and threading.get_ident() == self._caller:
                # Ctrl-C before joblib noted it: swallowed here, joblib would wait for batches that nobody dispatches.
                raise

    def _apart_from_caller(self) -> contextlib.AbstractContextManager[object]:
        """Return a block in which the user's generator draws no random numbers of a task in the calling thread."""
        # In a helper the caller's task may be going on. A generator that has ended draws nothing.
        in_helper = threading.get_ident() != self._caller and self._more_to_come(self._caller_came)
        is_apart = in_helper and self._pilot.guards_generator
        return task_randomness.outside() if is_apart else contextlib.nullcontext()


def _same(outcome: Outcome) -> Outcome:
    return outcome


def _raise(error: BaseException) -> Outcome:
    raise error
