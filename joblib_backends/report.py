"""What a call did: tier and reason, tasks, seconds, bytes. The only file besides ``__main__`` that prints."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

__all__ = ["CallReport", "Message", "Tally", "announce", "last_report", "record"]

#: Messages of tasks that a report keeps, of those that differ.
_MOST_MESSAGES: Final = 20


class Message(NamedTuple):
    """What tasks on workers said."""

    #: A log level, the name of a warning's class, or "print".
    kind: str
    #: Its first line.
    text: str
    count: int  # type: ignore[assignment]  # of tuple, which nobody counts in
    #: The first task that said it.
    task: str


@dataclass(frozen=True)
class CallReport:
    """What one outermost ``Parallel`` call did.

    Attributes
    ----------
    function : str
        What the tasks run.
    tier : str
        Where they ran; several names joined by " + " if batches differed.
    reason : str
        Why there.
    n_jobs : int
        Batches allowed at once.
    tasks, batches : int
        What was completed.
    seconds : float
        Seconds from start to end of the call, and ``busy_seconds`` the sum over its batches.
    nbytes_moved : int
        Bytes of large buffers that were placed where workers read them; 0 where memory is shared.
    nbytes_pickled : int
        Bytes of the batches themselves, with the small buffers in them.
    nbytes_saved : int
        Bytes that were resident already and did not move again.
    failed : bool
        Whether the call ended with an exception.
    predicted_seconds : float or None
        Seconds that the planner expected the call to take, when it first knew what a task takes; None if it never did,
        or had nothing to decide.
    planning_seconds : float
        Seconds of CPU time spent on deciding all that.
    fits_run, fits_shared : int
        Of the pipeline steps that several tasks of the call have in common: how often one was fitted, and how often
        that was not necessary. 0 where nothing was in common.
    transforms_run, transforms_shared : int
        The same of transforming test data, and training data where it is scored.
    seconds_saved : float
        Seconds that what was shared took when it ran, less what it took to pass it on; those of folds included.
    nbytes_shared : int
        The most bytes that were held for it at a time.
    retries : int
        Batches that were run again, because a worker died, or data or a cluster was gone.
    lost_workers : int
        Workers that died over batches of the call, as far as the tier tells; a Dask scheduler repeats tasks itself
        first.
    tasks_restored : int
        Tasks of ``tasks`` whose results came from the checkpoint and did not run.
    messages : tuple of Message
        What tasks on workers logged, warned of and, in a notebook, printed: the first 20 that differ.
    """

    function: str
    tier: str
    reason: str
    n_jobs: int
    tasks: int
    batches: int
    seconds: float
    busy_seconds: float
    nbytes_moved: int
    nbytes_pickled: int
    nbytes_saved: int
    failed: bool
    predicted_seconds: float | None = None
    planning_seconds: float = 0.0
    fits_run: int = 0
    fits_shared: int = 0
    transforms_run: int = 0
    transforms_shared: int = 0
    seconds_saved: float = 0.0
    nbytes_shared: int = 0
    retries: int = 0
    lost_workers: int = 0
    tasks_restored: int = 0
    messages: tuple[Message, ...] = ()

    def __str__(self) -> str:
        outcome = "failed after" if self.failed else "done in"
        moved, saved = readable_nbytes(self.nbytes_moved), readable_nbytes(self.nbytes_saved)
        text = (
            f"{self.function}: {self.tasks} tasks in {self.batches} batches {outcome} {self.seconds:.3f} s\n"
            f"  tier   {self.tier}, n_jobs={self.n_jobs}\n"
            f"  reason {self.reason}\n"
            f"  bytes  {moved} moved, {saved} not moved again, {readable_nbytes(self.nbytes_pickled)} pickled"
        )
        if self.retries or self.lost_workers:
            text += f"\n  faults {self.lost_workers} workers lost, {self.retries} batches run again"
        if self.tasks_restored:
            text += f"\n  kept   {self.tasks_restored} of {self.tasks} tasks were in the checkpoint"
        if not self.fits_run + self.fits_shared:
            return text
        n_fits, n_transforms = self.fits_run + self.fits_shared, self.transforms_run + self.transforms_shared
        return (
            f"{text}\n"
            f"  shared {self.fits_shared} of {n_fits} fits and {self.transforms_shared} of {n_transforms} transforms "
            f"of common steps, {self.seconds_saved:.3f} s saved, at most {readable_nbytes(self.nbytes_shared)} held"
        )


@dataclass
class Tally:
    """What a call has done so far. Thread-safe."""

    n_jobs: int
    function: str = ""
    #: The reason for each tier that was used, in the order of use.
    reasons: dict[str, str] = field(default_factory=dict)
    tasks: int = 0
    batches: int = 0
    busy_seconds: float = 0.0
    nbytes_moved: int = 0
    nbytes_pickled: int = 0
    nbytes_saved: int = 0
    retries: int = 0
    lost_workers: int = 0
    tasks_restored: int = 0
    messages: dict[tuple[str, str], Message] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_start(self, tier: str, function: str, reason: str) -> None:
        """Count a batch that goes to ``tier``; the first reason for each tier is kept."""
        with self._lock:
            self.function = self.function or function
            self.reasons.setdefault(tier, reason)

    def add_payload(self, nbytes_moved: int, nbytes_pickled: int, nbytes_saved: int) -> None:
        """Count the bytes of a batch that was encoded."""
        with self._lock:
            self.nbytes_moved += nbytes_moved
            self.nbytes_pickled += nbytes_pickled
            self.nbytes_saved += nbytes_saved

    def add_end(self, n_tasks: int, seconds: float, *, succeeded: bool) -> None:
        """Count a batch that ended."""
        with self._lock:
            self.busy_seconds += seconds
            if succeeded:
                self.tasks += n_tasks
                self.batches += 1

    def add_fault(self, *, retries: int = 0, lost_workers: int = 0) -> None:
        """Count what was lost and is run again."""
        with self._lock:
            self.retries += retries
            self.lost_workers += lost_workers

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
        reasons = self.reasons
        texts = [f"{tier}: {reason}" for tier, reason in reasons.items()] if len(reasons) > 1 else reasons.values()
        return CallReport(
            function=self.function,
            tier=" + ".join(reasons) or "none",
            reason="; ".join(texts) or ("all were in the checkpoint" if self.tasks_restored else "there were no tasks"),
            n_jobs=self.n_jobs,
            tasks=self.tasks,
            batches=self.batches,
            seconds=time.perf_counter() - self.started,
            busy_seconds=self.busy_seconds,
            nbytes_moved=self.nbytes_moved,
            nbytes_pickled=self.nbytes_pickled,
            nbytes_saved=self.nbytes_saved,
            failed=failed,
            predicted_seconds=predicted_seconds,
            planning_seconds=planning_seconds,
            retries=self.retries,
            lost_workers=self.lost_workers,
            tasks_restored=self.tasks_restored,
            messages=tuple(self.messages.values()),
        )


class _Last:
    """The report of the last finished call of this process. Set and read as one reference: no lock is needed."""

    report: CallReport | None = None


def record(report: CallReport) -> None:
    """Make ``report`` the last one."""
    _Last.report = report


def last_report() -> CallReport | None:
    """Return the report of the last outermost call that finished in this process, or None before the first.

    Calls with one job run in joblib's sequential loop, which tells no backend of its end; they leave no report.
    """
    return _Last.report


def readable_nbytes(nbytes: int) -> str:
    """Return a number of bytes in a unit that a person reads."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def announce(line: str) -> None:
    """Write one line to stderr, where there is one: services and windowed programs have none, or a closed one."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"joblib_backends: {line}\n")
        sys.stderr.flush()
