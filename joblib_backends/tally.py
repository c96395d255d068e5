"""What a call has done so far: counted while it runs, and its report when it ends."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Final

from .report import CallReport, Message
from .timeline.recorder import Recorder
from .worker import Outcome, peak_nbytes_of_process

__all__ = ["Tally"]

_log = logging.getLogger(__name__)

#: Messages of tasks that a report keeps, of those that differ.
_MOST_MESSAGES: Final = 20


@dataclass
class Tally:
    """What a call has done so far. Thread-safe.

    Parameters
    ----------
    n_jobs : int
        Batches that may run at once.
    cores : int
        Cores that the call may use.
    recorder : Recorder, optional
        What records each batch for the timeline; None records nothing.
    """

    n_jobs: int
    cores: int = 0
    recorder: Recorder | None = None
    function: str = ""
    #: The reason for each tier that was used, in the order of use.
    reasons: dict[str, str] = field(default_factory=dict)
    tasks: int = 0
    batches: int = 0
    busy_seconds: float = 0.0
    cpu_seconds: float = 0.0
    delay_seconds: float = 0.0
    active_seconds: float = 0.0
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    load_seconds: float = 0.0
    pack_seconds: float = 0.0
    longest_seconds: float = 0.0
    longest_task: int = -1
    peak_nbytes: int = 0
    nbytes_moved: int = 0
    nbytes_pickled: int = 0
    nbytes_saved: int = 0
    nbytes_results: int = 0
    retries: int = 0
    lost_workers: int = 0
    tasks_restored: int = 0
    messages: dict[tuple[str, str], Message] = field(default_factory=dict)
    #: Names of the argument that took most of the time to encode.
    costly_argument: str = ""
    started: float = field(default_factory=time.perf_counter)
    started_at: float = field(default_factory=lambda: round(time.time(), 6))
    _residents: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_start(self, tier: str, function: str, reason: str) -> None:
        """Count a batch that goes to ``tier``; the first reason for each tier is kept."""
        with self._lock:
            self.function = self.function or function
            if tier in self.reasons:
                return
            self.reasons[tier] = reason
        _log.debug("%s goes to %s, n_jobs=%d: %s", self.function, tier, self.n_jobs, reason)
        if self.recorder is not None:
            self.recorder.mark(f"goes to {tier}", reason)

    def add_payload(
        self, nbytes_moved: int, nbytes_pickled: int, nbytes_saved: int, seconds: float = 0.0, paths: Iterable[str] = ()
    ) -> None:
        """Count the bytes of a batch that was encoded, what that took, and the files that it refers to."""
        with self._lock:
            self.nbytes_moved += nbytes_moved
            self.nbytes_pickled += nbytes_pickled
            self.nbytes_saved += nbytes_saved
            self.encode_seconds += seconds
            self._residents.update(paths)

    def add_end(self, n_tasks: int, outcome: Outcome, task: int = -1) -> None:
        """Count a batch that ended, with the position of its first task in the call."""
        spent = outcome.spent
        with self._lock:
            self.busy_seconds += spent.wall
            self.cpu_seconds += spent.cpu
            self.delay_seconds += spent.delay
            self.load_seconds += spent.load
            self.pack_seconds += spent.pack
            self.nbytes_results += outcome.nbytes
            if spent.peak_nbytes > self.peak_nbytes:
                self.peak_nbytes = spent.peak_nbytes
            if spent.wall > self.longest_seconds:
                self.longest_seconds, self.longest_task = spent.wall, task
            if outcome.error is None:
                self.tasks += n_tasks
                self.batches += 1

    def add_way(self, queue_s: float, decode_s: float) -> None:
        """Count how long a batch was underway without running, and what it took to read its results."""
        with self._lock:
            self.queue_seconds += queue_s
            self.decode_seconds += decode_s

    def add_fault(self, *, retries: int = 0, lost_workers: int = 0) -> None:
        """Count what was lost and is run again."""
        with self._lock:
            self.retries += retries
            self.lost_workers += lost_workers
        if self.recorder is not None and lost_workers:
            self.recorder.mark("worker lost")

    def add_restored(self, n_tasks: int, function: str) -> None:
        """Count tasks that need not run, because their results are in the checkpoint."""
        with self._lock:
            self.function = self.function or function
            self.tasks += n_tasks
            self.tasks_restored += n_tasks

    def add_messages(self, messages: Iterable[tuple[str, str, str]]) -> None:
        """Count messages, given by kind, text and task."""
        with self._lock:
            for kind, text, task in messages:
                key = (kind, text.strip().partition("\n")[0])
                if key in self.messages or len(self.messages) < _MOST_MESSAGES:
                    first = self.messages.get(key, Message(*key, 0, task))
                    self.messages[key] = first._replace(count=first.count + 1)

    def explain(self, reasons: dict[str, str]) -> None:
        """Put better reasons in the place of those of tiers that were used."""
        with self._lock:
            self.reasons |= {tier: reason for tier, reason in reasons.items() if tier in self.reasons}

    def report(self, *, failed: bool, predicted_seconds: float | None, planning_seconds: float) -> CallReport:
        """Return the report of the call, which ends now."""
        recorder = self.recorder
        with self._lock:
            # Helpers of a call that was given up may still be counting.
            reasons, messages = dict(self.reasons), tuple(self.messages.values())
        texts = [f"{tier}: {reason}" for tier, reason in reasons.items()] if len(reasons) > 1 else reasons.values()
        shares_memory = bool(reasons.keys() & {"inline", "threads"})
        counted = {name: getattr(self, name) for name in _COUNTED}
        counted["peak_nbytes"] = max(self.peak_nbytes, peak_nbytes_of_process(by_now=True) if shares_memory else 0)
        report = CallReport(
            tier=" + ".join(reasons) or "none",
            reason="; ".join(texts) or ("all were in the checkpoint" if self.tasks_restored else "there were no tasks"),
            seconds=time.perf_counter() - self.started,
            failed=failed,
            predicted_seconds=predicted_seconds,
            planning_seconds=planning_seconds,
            residents=len(self._residents),
            messages=messages,
            **counted,
        )
        if recorder is not None:
            report.put_timeline(functools.partial(recorder.timeline, self.started), len(recorder))
        return report


#: What a report has as it was counted.
_COUNTED: Final = frozenset(
    {one.name for one in fields(CallReport)} & {one.name for one in fields(Tally)} - {"messages"}
)
