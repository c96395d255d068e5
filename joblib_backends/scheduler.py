"""One call of ``Parallel``: batches in, results out.

::

    submit ──> route ──> waiting ──(at most n_jobs, plus look-ahead)──> Tier.submit
      ^  any thread                                                          |
      |                                                    batch done: start the next that waits,
      |                                                    put the outcome into a queue
      |                                                                      v
    joblib's callback <── future set <── Tier.outcome <──────────────── completer

Who runs where: ``submit`` runs in the user's thread and, from joblib's callback, in the completer. When a batch is
done, the tier's thread hands the tier the next one and fills the queue: no code of joblib or of the user runs there,
so a generator that is slow, or uses the same backend itself, never blocks loky's manager thread or Dask's event loop.
The completer does the rest: unpickle, call joblib back, advance the user's generator. For a list it is the caller
itself, who waits anyway: a thread less to wake (benchmarks, rows "two tasks" and "batch_size=1"). A generator's
consumer is away between two results, and its input may wait for what it consumes: there a thread of the crew is it.

Invariants, each tested:

- Every future that joblib holds ends exactly once: with its results, or with the failure of the call.
- ``submit`` never blocks on work.
- joblib's callback is called once per batch that succeeded, never inside ``submit``, never under a lock.
- Once a batch has failed, waiting for any other raises that failure.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Final, Literal

from .config import Config
from .crew import Crew
from .data.codec import Encoder, Payload
from .data.scope import ResidentScope
from .errors import BatchTimeoutError
from .planner import Plan
from .report import CallReport, Tally
from .tiers import Tier, Work, load_tier
from .worker import Outcome, task_names

__all__ = ["BatchFuture", "Call"]

#: Seconds after which a waiting consumer of a generator looks for itself. A batch is done when joblib's callback has
#: counted it, which saves joblib's own 10 ms poll; but the callback advances the user's generator too, and one that
#: takes longer to yield, or waits for the very result, must not hold the result back.
_LOOK_INTERVAL_S: Final = 0.010

Callback = Callable[["BatchFuture"], object]
GetOutcome = Callable[[], Outcome]
Nested = tuple[Any, int | None]


class BatchFuture(Future[list[Any]]):
    """What joblib holds for a batch."""

    def __init__(self, callback: Callback | None, size: int) -> None:
        super().__init__()
        self.callback = callback
        self.size = size
        # The batch, while it waits to be run by the thread that asks for its result.
        self.for_caller: _Batch | None = None
        # The results, while joblib's callback of the batch still runs.
        self.ready: list[Any] | None = None


@dataclass(frozen=True)
class _Batch:
    future: BatchFuture
    tier: Tier
    work: Work


class Call:
    """The batches of one ``Parallel`` call.

    Parameters
    ----------
    config : Config
        What the user asked for.
    n_jobs : int
        Batches that may run at once.
    route : callable
        Returns the plan of a batch.
    scope : ResidentScope
        What keeps placed buffers.
    warm : dict
        Where the context keeps what its next call should find warm; filled here.
    return_as : {"list", "generator", "generator_unordered"}
        How joblib returns results. In the last form it takes them, and failures, in its callback.

    Notes
    -----
    Thread-safe. The lock guards the waiting batches, the unfinished futures, the counts and the first failure.
    Only who takes a future out of the unfinished ones may end it.
    """

    def __init__(
        self,
        config: Config,
        n_jobs: int,
        route: Callable[[Callable[[], Any]], Plan],
        scope: ResidentScope,
        warm: dict[str, object],
        *,
        return_as: Literal["list", "generator", "generator_unordered"] = "list",
    ) -> None:
        self._config = config
        self._n_jobs = n_jobs
        self._route = route
        self._scope = scope
        self._warm = warm
        self._caller_completes = return_as == "list"
        self._joblib_polls = return_as == "generator_unordered"
        self._lock = threading.Lock()
        self._feeding = threading.Lock()
        self._waiting: deque[_Batch] = deque()
        self._unfinished: set[BatchFuture] = set()
        self._n_in_flight = 0
        self._failure: BaseException | None = None
        self._tiers: dict[str, Tier] = {}
        self._limits: dict[str, dict[str, int]] = {}
        self._encoder: Encoder | None = None
        self._completions: queue.SimpleQueue[tuple[BatchFuture, GetOutcome] | None] = queue.SimpleQueue()
        self._crew = Crew.shared()
        self._warm["crew"] = self._crew
        self._has_completer = self._caller_completes
        self._progress = threading.Event()
        self._tally = Tally(n_jobs)
        self._ended = False

    def __repr__(self) -> str:
        state = "ended" if self._ended else "failed" if self._failure else "open"
        return f"<Call {state}, {self._n_in_flight}/{self._n_jobs} in flight, {len(self._waiting)} waiting>"

    # ---- called in the user's thread, or in the completer by joblib's callback

    def submit(self, function: Callable[[], Any], callback: Callback | None, nested: Nested) -> BatchFuture:
        """Start a batch or let it wait for its turn; a batch that cannot travel fails the call, not this method."""
        future = BatchFuture(callback, len(function) if hasattr(function, "__len__") else 1)
        with self._lock:
            self._unfinished.add(future)
        try:
            batch = self._prepare(future, function, nested)
        except BaseException as error:
            self._enqueue(future, functools.partial(Outcome, None, error, 0.0))
            return future
        if batch.tier.runs_in_caller:
            self._leave_to_caller(batch)
        else:
            with self._lock:
                self._waiting.append(batch)
            self._feed()
        self._end_if_call_failed(future)
        return future

    def _prepare(self, future: BatchFuture, function: Callable[[], Any], nested: Nested) -> _Batch:
        plan = self._route(function)
        tier = self._open_tier(plan)
        limits = self._limits[plan.tier]
        payload = None if tier.shares_memory else self._encode(tier, function, nested, limits)
        name = task_names(function)
        with self._lock:
            self._tally.function = self._tally.function or name
            self._tally.reasons.setdefault(plan.tier, plan.reason)
        return _Batch(future, tier, Work(function, name, limits, payload))

    def _open_tier(self, plan: Plan) -> Tier:
        # Two threads may come here at once for the first batches; one opens, the other waits.
        with self._lock:
            if plan.tier not in self._tiers:
                tier = load_tier(plan.tier)(self._config, self._n_jobs)
                self._limits[plan.tier] = tier.task_limits(self._config, self._n_jobs)
                self._tiers[plan.tier] = tier
                if tier.warm is not None:
                    self._warm[plan.tier] = tier.warm
            return self._tiers[plan.tier]

    def _encode(
        self, tier: Tier, function: Callable[[], Any], nested: Nested, limits: dict[str, int]
    ) -> Payload:
        if self._encoder is None:
            references = tier.references(self._config.scatter)
            self._encoder = Encoder(self._config, self._scope, references)
            self._scatter(tier, [value for value in self._config.scatter if id(value) not in references])
        payload = self._encoder.encode(function, nested, limits)
        with self._lock:
            self._tally.nbytes_moved += payload.nbytes_placed
            self._tally.nbytes_pickled += payload.nbytes_inband
            self._tally.nbytes_saved += payload.nbytes_saved
        return payload

    def _scatter(self, tier: Tier, values: list[Any]) -> None:
        """Place ``values`` ahead of the first batch, once per context."""
        key = f"scattered for {tier.name}"
        if values and key not in self._warm:
            assert self._encoder is not None
            moved = self._encoder.scatter(values)
            self._warm[key] = True
            with self._lock:
                self._tally.nbytes_moved += moved

    def _leave_to_caller(self, batch: _Batch) -> None:
        if self._joblib_polls:
            # In this form joblib asks for no result before it is there: the completer is the caller.
            self._enqueue(batch.future, functools.partial(_run_now, batch))
        else:
            batch.future.for_caller = batch

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
        batch, future.for_caller = future.for_caller, None
        if batch is not None and not future.done():
            self._enqueue(future, functools.partial(_same, _run_now(batch)))
        end = None if timeout is None else time.monotonic() + timeout
        wait = self._complete_until if self._caller_completes else self._wait_until
        if wait(future, end):
            # Read once: the completer takes ``ready`` away when it has set the result.
            ready = future.ready
            return future.result() if ready is None else ready
        raise BatchTimeoutError(
            f"A batch of {self._tally.function} had no result after timeout={timeout} seconds of waiting for it. "
            "Give Parallel a larger timeout, or smaller tasks."
        )

    def _complete_until(self, future: BatchFuture, end: float | None) -> bool:
        """Be the completer until ``future`` has ended or the time is ``end``; return whether it has ended."""
        while not future.done():
            remaining = None if end is None else max(0.0, end - time.monotonic())
            try:
                item = self._completions.get(timeout=remaining)
            except queue.Empty:
                return future.done()
            if item is not None:
                self._complete(*item)
        return True

    def _wait_until(self, future: BatchFuture, end: float | None) -> bool:
        """Wait until the crew's completer has ended ``future`` or the time is ``end``; return whether it has."""
        while True:
            self._progress.clear()
            if future.done():
                return True
            self._progress.wait(_LOOK_INTERVAL_S)
            if future.ready is not None:
                return True
            if end is not None and time.monotonic() > end:
                return future.done()

    def abort(self) -> None:
        """Give up all that is not finished. Called when joblib wants no further result."""
        self._fail(CancelledError("The call was aborted."), None)
        for tier in self._open_tiers():
            tier.abort()

    def end(self) -> CallReport:
        """Give back what the call used and return its report; idempotent."""
        with self._lock:
            ended, self._ended = self._ended, True
        if not ended:
            self._completions.put(None)
            for tier in self._open_tiers():
                tier.close()
            self._scope.end_call()
        return self._tally.report(failed=self._failure is not None)

    def _open_tiers(self) -> list[Tier]:
        with self._lock:
            return list(self._tiers.values())

    # ---- called in any thread, a tier's own included

    def _feed(self) -> None:
        """Hand batches to their tiers while the limit allows it.

        One thread feeds at a time. Another that comes meanwhile leaves, because the first looks again after it has
        let go of the lock; and a batch that is done at once comes back here inside ``_start``, and does not recurse.
        """
        while self._may_feed() and self._feeding.acquire(blocking=False):
            try:
                while (batch := self._next_to_start()) is not None:
                    self._start(batch)
            finally:
                self._feeding.release()

    def _may_feed(self) -> bool:
        with self._lock:
            return self._has_one_to_start()

    def _next_to_start(self) -> _Batch | None:
        with self._lock:
            if not self._has_one_to_start():
                return None
            self._n_in_flight += 1
            return self._waiting.popleft()

    def _has_one_to_start(self) -> bool:
        # A batch that joblib's callback submits while the call fails or ends must not reach a tier that is closed.
        if not self._waiting or self._failure is not None or self._ended:
            return False
        return self._n_in_flight < self._n_jobs + self._waiting[0].tier.look_ahead

    def _start(self, batch: _Batch) -> None:
        try:
            tier_future = batch.tier.submit(batch.work)
        except BaseException as error:
            tier_future = Future()
            tier_future.set_exception(error)
        # It takes the future as its argument: a future in its own callback would be a cycle, which keeps the pool.
        tier_future.add_done_callback(functools.partial(self._tier_is_done, batch))

    def _tier_is_done(self, batch: _Batch, tier_future: Future[Any]) -> None:
        """Feed the tier and leave the rest to the completer. Called in whichever thread ended the tier's future.

        Until then this callback holds the batch, and with it the files of its residents: the worker opens them when
        it comes to a task, and their owners may be gone by then.
        """
        with self._lock:
            self._n_in_flight -= 1
        if not tier_future.cancelled() and tier_future.exception() is None:
            self._feed()
        self._enqueue(batch.future, functools.partial(batch.tier.outcome, tier_future))

    def _enqueue(self, future: BatchFuture, get_outcome: GetOutcome) -> None:
        if not self._has_completer:
            self._start_completer()
        self._completions.put((future, get_outcome))

    def _start_completer(self) -> None:
        with self._lock:
            starts, self._has_completer = not self._has_completer, True
        if starts:
            self._crew.run(self._complete_all)

    def _fail(self, error: BaseException, culprit: BatchFuture | None) -> None:
        """End every unfinished future with ``error``, the first failure of the call; later ones change nothing."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            self._waiting.clear()
            unfinished, self._unfinished = self._unfinished, set()
        for future in unfinished:
            if future is not culprit or not self._joblib_polls:
                # joblib's callback and this future hold each other: a cycle that would keep the context's workers.
                future.callback = None
            future.set_exception(error)
        self._progress.set()
        if self._caller_completes:
            self._completions.put(None)
        if culprit is not None and self._joblib_polls:
            self._call_back(culprit)

    # ---- called in the completer: the caller, or a thread of the crew

    def _complete_all(self) -> None:
        """Finish batches until the call ends. The body of the crew's completer."""
        while (item := self._completions.get()) is not None:
            self._complete(*item)
            # An idle thread must not keep the last batch's data alive.
            del item

    def _complete(self, future: BatchFuture, get_outcome: GetOutcome) -> None:
        try:
            outcome = get_outcome()
        except BaseException as error:
            outcome = Outcome(None, error, 0.0)
        with self._lock:
            is_wanted = future in self._unfinished
            self._tally.busy_seconds += outcome.seconds
            if outcome.error is None:
                self._unfinished.discard(future)
                self._tally.tasks += future.size
                self._tally.batches += 1
        if is_wanted and outcome.error is not None:
            self._fail(outcome.error, future)
        elif is_wanted:
            self._deliver(future, outcome.results or [])

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
                callback(future)
        except BaseException as error:
            self._fail(error, None)


def _run_now(batch: _Batch) -> Outcome:
    """Run a batch in this thread, on a tier that does so."""
    return batch.tier.outcome(batch.tier.submit(batch.work))


def _same(outcome: Outcome) -> Outcome:
    return outcome
