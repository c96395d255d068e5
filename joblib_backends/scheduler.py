"""One call of ``Parallel``: batches in, results out.

::

    submit ──> route ──> waiting ──(at most n_jobs, plus look-ahead)──> Tier.submit
      ^                                                                      |
      |  any thread                                          future done: one put into a queue
      |                                                                      v
    joblib's callback <── future set <── Tier.outcome <── completion thread (one per call)

Who runs where: ``submit`` runs in the user's thread and, from joblib's callback, in the completion thread. Tiers
complete futures wherever they like and only put them in a queue; everything of joblib and of the user that follows
(unpickling, callbacks, advancing the user's generator) runs in the completion thread. So a generator that is slow,
or uses the same backend itself, never blocks loky's manager thread or Dask's event loop.

Invariants, each tested:

- Every future that joblib holds ends exactly once: with its result, or with the failure of the call.
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
from dataclasses import dataclass, field
from typing import Any

from .config import Config
from .data.codec import Encoder, Payload
from .data.scope import ResidentScope
from .errors import BatchTimeoutError
from .planner import Plan
from .report import CallReport
from .tiers import Tier, Work, load_tier
from .worker import Outcome, task_names

__all__ = ["BatchFuture", "Call"]

#: Seconds that a finished result may wait for joblib's callback of its batch. Waiting lets joblib see the batch as
#: completed, and saves its 10 ms poll; a user's generator that takes longer to yield must not delay the result.
_CALLBACK_GRACE_S = 0.010

Callback = Callable[["BatchFuture"], object]

#: A batch that a tier is done with, and how to get its outcome.
_Finished = tuple["BatchFuture", Callable[[], Outcome]]


class BatchFuture(Future[list[Any]]):
    """What joblib holds for a batch."""

    def __init__(self, callback: Callback | None, size: int) -> None:
        super().__init__()
        self.callback = callback
        self.size = size
        # Set when joblib's callback has returned, or will not be called.
        self.settled = threading.Event()
        # The batch, while it waits to be run by the thread that asks for its result.
        self.for_caller: _Batch | None = None


@dataclass
class _Tally:
    """What a call did so far; changed under the call's lock."""

    function: str = ""
    plans: dict[str, Plan] = field(default_factory=dict)
    tasks: int = 0
    batches: int = 0
    busy_seconds: float = 0.0
    nbytes_moved: int = 0
    nbytes_saved: int = 0


@dataclass
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
    calls_back_on_failure : bool
        Whether joblib learns of a failure from its callback (``generator_unordered``) and not from :meth:`retrieve`.

    Notes
    -----
    Thread-safe. The lock guards the waiting batches, the counts and the first failure.
    """

    def __init__(
        self,
        config: Config,
        n_jobs: int,
        route: Callable[[Callable[[], Any]], Plan],
        scope: ResidentScope,
        warm: dict[str, object],
        *,
        calls_back_on_failure: bool,
    ) -> None:
        self._config = config
        self._n_jobs = n_jobs
        self._route = route
        self._scope = scope
        self._warm = warm
        self._calls_back_on_failure = calls_back_on_failure
        self._lock = threading.Lock()
        self._waiting: deque[_Batch] = deque()
        self._unfinished: set[BatchFuture] = set()
        self._n_in_flight = 0
        self._failure: BaseException | None = None
        self._tiers: dict[str, Tier] = {}
        self._encoder: Encoder | None = None
        self._completions: queue.SimpleQueue[_Finished | None] = queue.SimpleQueue()
        self._completer: threading.Thread | None = None
        self._tally = _Tally()
        self._started = time.perf_counter()
        self._ended = False

    def __repr__(self) -> str:
        state = "ended" if self._ended else "failed" if self._failure else "open"
        return f"<Call {state}, {self._n_in_flight}/{self._n_jobs} in flight, {len(self._waiting)} waiting>"

    # ---- called in the user's thread, or in the completion thread by joblib's callback

    def submit(
        self, function: Callable[[], Any], callback: Callback | None, nested: tuple[Any, int | None]
    ) -> BatchFuture:
        """Start a batch or let it wait for its turn; a batch that cannot travel fails the call, not this method."""
        future = BatchFuture(callback, len(function) if hasattr(function, "__len__") else 1)
        with self._lock:
            self._unfinished.add(future)
        try:
            batch = self._prepare(future, function, nested)
        except BaseException as error:
            self._finish_later(future, functools.partial(Outcome, None, error, 0.0))
            return future
        if batch.tier.runs_in_caller:
            self._leave_to_caller(batch)
        else:
            with self._lock:
                self._waiting.append(batch)
            self._start_waiting()
        with self._lock:
            # The call may have failed meanwhile. Only who takes a future out of the unfinished may end it.
            failure = self._failure if future in self._unfinished else None
            if failure is not None:
                self._unfinished.discard(future)
        if failure is not None:
            _end_with(future, failure)
        return future

    def _prepare(self, future: BatchFuture, function: Callable[[], Any], nested: tuple[Any, int | None]) -> _Batch:
        plan = self._route(function)
        tier = self._open_tier(plan)
        limits = tier.task_limits(self._config, self._n_jobs)
        payload = None if tier.shares_memory else self._encode(tier, function, nested, limits)
        name = task_names(function)
        with self._lock:
            self._tally.function = self._tally.function or name
            self._tally.plans.setdefault(plan.tier, plan)
        return _Batch(future, tier, Work(function, name, limits, payload))

    def _leave_to_caller(self, batch: _Batch) -> None:
        if self._calls_back_on_failure:
            # In this form joblib asks for no result before it is there: the completion thread is the caller.
            self._finish_later(batch.future, functools.partial(_run_now, batch))
        else:
            batch.future.for_caller = batch

    def _open_tier(self, plan: Plan) -> Tier:
        # Two threads may come here at once for the first batches; one opens, the other waits.
        with self._lock:
            if plan.tier not in self._tiers:
                tier = load_tier(plan.tier)(self._config, self._n_jobs)
                self._tiers[plan.tier] = tier
                if tier.warm is not None:
                    self._warm[plan.tier] = tier.warm
            return self._tiers[plan.tier]

    def _encode(
        self, tier: Tier, function: Callable[[], Any], nested: tuple[Any, int | None], limits: dict[str, int]
    ) -> Payload:
        if self._encoder is None:
            self._encoder = Encoder(self._config, self._scope)
            self._scatter(tier, self._encoder)
        payload = self._encoder.encode(function, nested, limits)
        with self._lock:
            self._tally.nbytes_moved += payload.nbytes_inband + payload.nbytes_placed
            self._tally.nbytes_saved += payload.nbytes_saved
        return payload

    def _scatter(self, tier: Tier, encoder: Encoder) -> None:
        key = f"scattered for {tier.name}"
        if self._config.scatter and key not in self._warm:
            moved = tier.scatter(self._config.scatter, encoder)
            self._warm[key] = True
            with self._lock:
                self._tally.nbytes_moved += moved

    def retrieve(self, future: BatchFuture | None, timeout: float | None) -> list[Any]:
        """Return the results of a batch, or raise what it, or the first batch that failed, raised.

        Raises
        ------
        TimeoutError
            If that takes longer than ``timeout`` seconds.
        """
        if future is None:
            # joblib registered a batch whose submit never returned; the call ends with what made it fail.
            raise self._failure or CancelledError()
        batch, future.for_caller = future.for_caller, None
        if batch is not None and not future.done():
            outcome = _run_now(batch)
            self._finish_later(future, lambda: outcome)
        results = self._wait(future, timeout)
        future.settled.wait(_CALLBACK_GRACE_S)
        return results

    def _wait(self, future: BatchFuture, timeout: float | None) -> list[Any]:
        try:
            return future.result(timeout)
        except TimeoutError as error:
            if future.done():
                return future.result()  # the task's own TimeoutError, or a result in the last moment
            raise BatchTimeoutError(
                f"A batch of {self._tally.function} had no result after timeout={timeout} seconds of waiting for it. "
                "Give Parallel a larger timeout, or smaller tasks."
            ) from error

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
            self._join_completer()
            for tier in self._open_tiers():
                tier.close()
            self._scope.end_call()
        return self._report()

    def _open_tiers(self) -> list[Tier]:
        with self._lock:
            return list(self._tiers.values())

    def _join_completer(self) -> None:
        # After success it is idle. After a failure it may be inside the user's generator, for which nobody waits.
        completer = self._completer
        if completer is not None and completer is not threading.current_thread() and self._failure is None:
            completer.join(timeout=1.0)

    def _report(self) -> CallReport:
        tally = self._tally
        return CallReport(
            function=tally.function,
            tier=" + ".join(tally.plans) or "none",
            reason="; ".join(plan.reason for plan in tally.plans.values()) or "there were no tasks",
            n_jobs=self._n_jobs,
            tasks=tally.tasks,
            batches=tally.batches,
            seconds=time.perf_counter() - self._started,
            busy_seconds=tally.busy_seconds,
            nbytes_moved=tally.nbytes_moved,
            nbytes_saved=tally.nbytes_saved,
            failed=self._failure is not None,
        )

    # ---- called in any thread

    def _start_waiting(self) -> None:
        """Hand batches to their tiers while the limit allows it."""
        while True:
            with self._lock:
                if not self._waiting or self._n_in_flight >= self._limit(self._waiting[0].tier):
                    return
                batch = self._waiting.popleft()
                self._n_in_flight += 1
                self._start_completer()
            self._start(batch)

    def _limit(self, tier: Tier) -> int:
        return self._n_jobs + tier.look_ahead

    def _start(self, batch: _Batch) -> None:
        try:
            tier_future = batch.tier.submit(batch.work)
        except BaseException as error:
            self._completions.put((batch.future, functools.partial(Outcome, None, error, 0.0)))
            return

        def enqueue(done: Future[Any]) -> None:
            self._completions.put((batch.future, functools.partial(batch.tier.outcome, done)))

        # May run here and now if the batch is done already: a put is all it does, so nothing recurses.
        # It takes the future as its argument: a future in its own callback would be a cycle that keeps the pool.
        tier_future.add_done_callback(enqueue)

    def _finish_later(self, future: BatchFuture, get_outcome: Callable[[], Outcome]) -> None:
        """Let the completion thread finish a batch that no tier holds."""
        with self._lock:
            self._n_in_flight += 1
            self._start_completer()
        self._completions.put((future, get_outcome))

    def _fail(self, error: BaseException, culprit: BatchFuture | None) -> None:
        """End every unfinished future with ``error``, the first failure of the call; later ones change nothing."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            self._waiting.clear()
            unfinished, self._unfinished = self._unfinished, set()
        for future in unfinished:
            _end_with(future, error)
        if culprit is not None and self._calls_back_on_failure:
            self._call_back(culprit)

    # ---- called in the completion thread only

    def _start_completer(self) -> None:
        if self._completer is None:
            name = "joblib_backends-completion"
            self._completer = threading.Thread(target=self._complete_all, name=name, daemon=True)
            self._completer.start()

    def _complete_all(self) -> None:
        while (item := self._completions.get()) is not None:
            self._complete(*item)
            del item

    def _complete(self, future: BatchFuture, get_outcome: Callable[[], Outcome]) -> None:
        try:
            outcome = get_outcome()
        except BaseException as error:
            outcome = Outcome(None, error, 0.0)
        with self._lock:
            self._n_in_flight -= 1
            is_wanted = future in self._unfinished
            self._tally.busy_seconds += outcome.seconds
            if outcome.error is None:
                self._unfinished.discard(future)
                self._tally.tasks += future.size
                self._tally.batches += 1
        if is_wanted and outcome.error is not None:
            self._fail(outcome.error, future)
        elif is_wanted:
            # Workers first: they get their next batch before joblib and the user's generator take their time.
            self._start_waiting()
            future.set_result(outcome.results or [])
            self._call_back(future)

    def _call_back(self, future: BatchFuture) -> None:
        """Tell joblib, which dispatches the next batch from here."""
        callback, future.callback = future.callback, None
        try:
            if callback is not None:
                callback(future)
        except BaseException as error:
            self._fail(error, None)
        finally:
            future.settled.set()


def _end_with(future: BatchFuture, error: BaseException) -> None:
    future.set_exception(error)
    future.settled.set()


def _run_now(batch: _Batch) -> Outcome:
    """Run a batch in this thread, on a tier that does so."""
    return batch.tier.outcome(batch.tier.submit(batch.work))
