"""What a call did: tier and reason, tasks, seconds, bytes. The only file besides ``__main__`` that prints."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from .errors import ConfigurationError
from .timeline.model import Timeline
from .timeline.recorder import MOST_RECORDED
from .wording import readable_nbytes, readable_seconds

__all__ = ["CallReport", "Message", "announce", "last_report", "record", "reports"]


class Message(NamedTuple):
    """What tasks on workers said."""

    #: A log level, the name of a warning's class, or "print".
    kind: str
    #: Its first line.
    text: str
    count: int  # type: ignore[assignment]  # of tuple, which nobody counts in
    #: The first task that said it.
    task: str


class _Timelined:
    """Holds what makes the timeline of a report, apart from its figures: those are plain data, which people log."""

    __slots__ = ("_make", "_n")

    def put_timeline(self, make: Callable[[], Timeline] | None, n_recorded: int) -> None:
        """Set what makes the timeline, and how many batches are kept for it."""
        # Reports are frozen.
        object.__setattr__(self, "_make", make)
        object.__setattr__(self, "_n", n_recorded)

    @property
    def _maker(self) -> Callable[[], Timeline] | None:
        make: Callable[[], Timeline] | None = getattr(self, "_make", None)
        return make

    @property
    def _n_recorded(self) -> int:
        return int(getattr(self, "_n", 0))


@dataclass(frozen=True)
class CallReport(_Timelined):
    """What one outermost ``Parallel`` call did.

    ``print`` shows some ten lines of it, notebooks a table. A pickled report has no timeline: :meth:`save` keeps that.

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
    started_at : float
        When the call began, in seconds since 1970 (``time.time``).
    cores : int
        Cores of this machine that the call may use.
    cpu_seconds : float
        CPU time of the batches: of their thread, or of their process where that is a worker's own.
    delay_seconds : float
        Seconds in which batches were ready to run and waited for a core; 0 where the system does not tell.
    active_seconds : float
        Seconds in which any batch ran, or was on its way.
    queue_seconds : float
        Sum over the batches of the seconds from ``Parallel`` handing one over to its outcome, less those that it ran:
        its wait for a worker, its encoding, its way there and back. None where the calling thread runs batches.
    encode_seconds, decode_seconds : float
        Seconds of the driver for making batches ready to travel, and for reading their results.
    load_seconds, pack_seconds : float
        Seconds of the workers, contained in ``busy_seconds``, for reading batches, and for making results ready.
    nbytes_results : int
        Bytes in which the results came; 0 where memory is shared.
    residents : int
        Placed buffers that batches of the call referred to, each counted once.
    longest_seconds : float
        Seconds of the batch that took longest, and ``longest_task`` the position of its first task.
    peak_nbytes : int
        The largest size that any of the processes which ran batches has had in memory until the end of the call, in
        bytes; data that is mapped counts in each. 0 where the system does not tell.
    costly_argument : str
        What most of ``encode_seconds`` went into, where that was looked at and it is the same object in several tasks;
        else empty.
    messages : tuple of Message
        What tasks on workers logged, warned of and, in a notebook, printed: the first 20 that differ.
    advice : tuple of str
        What to change, where something took time that need not be. Empty if all is well.
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
    started_at: float = 0.0
    cores: int = 0
    cpu_seconds: float = 0.0
    delay_seconds: float = 0.0
    active_seconds: float = 0.0
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    load_seconds: float = 0.0
    pack_seconds: float = 0.0
    nbytes_results: int = 0
    residents: int = 0
    longest_seconds: float = 0.0
    longest_task: int = -1
    peak_nbytes: int = 0
    costly_argument: str = ""
    messages: tuple[Message, ...] = ()
    advice: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # A copy elsewhere has the figures; the timeline goes with ``save``.
        return dict(vars(self))

    def __copy__(self) -> CallReport:
        return self.replaced()

    def replaced(self, **figures: Any) -> CallReport:
        """Return a report with other figures, and the same timeline."""
        other = dataclasses.replace(self, **figures)
        other.put_timeline(self._maker, self._n_recorded)
        return other

    @property
    def speed_up(self) -> float:
        """How many times as fast as its tasks one after the other: ``busy_seconds / seconds``."""
        return self.busy_seconds / self.seconds if self.seconds else 0.0

    @property
    def cores_used(self) -> float:
        """Cores that the batches used on average: ``cpu_seconds / seconds``."""
        return self.cpu_seconds / self.seconds if self.seconds else 0.0

    @property
    def timeline(self) -> Timeline | None:
        """Who did what, from when to when; None with ``record=False``, and for calls that were long ago.

        It is made when it is asked for. Of all :func:`reports` together, the batches of the last 200,000 are kept.
        """
        make = self._maker
        return None if make is None else make()

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, but for the timeline, as JSON has it; times are ISO 8601, seconds, and bytes."""
        found = dict(vars(self))
        started = datetime.fromtimestamp(self.started_at).astimezone().isoformat()
        found |= {"speed_up": self.speed_up, "cores_used": self.cores_used, "started_at": started}
        return {**found, "advice": list(self.advice), "messages": [one._asdict() for one in self.messages]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], timeline: Timeline | None = None) -> CallReport:
        """Return the report that :meth:`to_dict` was made of; what other versions may have in it is left out."""
        names = {one.name for one in dataclasses.fields(cls)}
        known = {name: value for name, value in content.items() if name in names}
        known["started_at"] = round(datetime.fromisoformat(known["started_at"]).timestamp(), 6)
        known["advice"] = tuple(known.get("advice", ()))
        known["messages"] = tuple(Message(**one) for one in known.get("messages", ()))
        report = cls(**known)
        if timeline is not None:
            report.put_timeline(lambda: timeline, 0)
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what the call did into a file, with its timeline if that was recorded.

        Parameters
        ----------
        path : str or path
            ``"run.html"`` for a page that needs nothing else, ``"run.json"`` for what https://ui.perfetto.dev and
            ``python -m joblib_backends report`` read. A file of that name is replaced.

        Raises
        ------
        ConfigurationError
            If the name ends otherwise.
        OSError
            If the file cannot be written.
        """
        kind = Path(path).suffix.lower()
        timeline = self.timeline or Timeline()
        if kind in (".html", ".htm"):
            from .timeline.page import page_of

            Path(path).write_text(page_of(self.to_dict(), timeline), encoding="utf-8")
        elif kind == ".json":
            from .timeline.chrome import document_of

            Path(path).write_text(document_of([(self.to_dict(), timeline)]), encoding="utf-8")
        else:
            raise ConfigurationError(
                f"A report cannot be saved as {os.fspath(path)!r}: its name must end with .html, for a page, or with "
                ".json, for a trace."
            )

    @property
    def headline(self) -> str:
        """What ran, how much of it, and how long it took."""
        outcome = "failed after" if self.failed else "done in"
        return f"{self.function}: {self.tasks} tasks in {self.batches} batches {outcome} {self.seconds:.3f} s"

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"  {name:<8} {text}" for name, text in self._lines())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self._lines()
        )
        return f"<table><caption>{html.escape(self.headline)}</caption>{rows}</table>"

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("tier", f"{self.tier}, n_jobs={self.n_jobs}"), ("reason", self.reason)]
        if self.batches:
            lines += [("time", self._time()), ("around", self._around())]
        lines.append(("bytes", self._bytes()))
        if self.peak_nbytes:
            lines.append(("memory", f"{readable_nbytes(self.peak_nbytes)} at most in one process"))
        if self.retries or self.lost_workers:
            lines.append(("faults", f"{self.lost_workers} workers lost, {self.retries} batches run again"))
        if self.tasks_restored:
            lines.append(("kept", f"{self.tasks_restored} of {self.tasks} tasks were in the checkpoint"))
        if self.fits_run + self.fits_shared:
            lines.append(("shared", self._shared()))
        if self.messages:
            lines.append(("said", self._said()))
        return [*lines, *(("advice", sentence) for sentence in self.advice)]

    def _time(self) -> str:
        return (
            f"{readable_seconds(self.busy_seconds)} of tasks, {self.speed_up:.2f} times as fast as one by one; "
            f"{self.cores_used:.1f} of {self.cores} cores used"
        )

    def _around(self) -> str:
        parts = {
            "queue, a batch": self.queue_seconds / self.batches,
            "encode": self.encode_seconds,
            "load": self.load_seconds,
            "pack": self.pack_seconds,
            "decode": self.decode_seconds,
        }
        return ", ".join(f"{name} {readable_seconds(seconds)}" for name, seconds in parts.items() if seconds >= 1e-6)

    def _bytes(self) -> str:
        moved, saved = readable_nbytes(self.nbytes_moved), readable_nbytes(self.nbytes_saved)
        results = f", {readable_nbytes(self.nbytes_results)} of results" if self.nbytes_results else ""
        residents = f" ({self.residents} resident{'s'[: self.residents > 1]})" if self.residents else ""
        pickled = readable_nbytes(self.nbytes_pickled)
        return f"{moved} moved, {saved} not moved again{residents}, {pickled} pickled{results}"

    def _said(self) -> str:
        first, n_all = self.messages[0], sum(one.count for one in self.messages)
        others = "" if n_all == 1 else f"; {n_all} messages in all"
        return f"{first.kind}: {first.text} ({first.task}{others})"

    def _shared(self) -> str:
        n_fits, n_transforms = self.fits_run + self.fits_shared, self.transforms_run + self.transforms_shared
        return (
            f"{self.fits_shared} of {n_fits} fits and {self.transforms_shared} of {n_transforms} transforms "
            f"of common steps, {self.seconds_saved:.3f} s saved, at most {readable_nbytes(self.nbytes_shared)} held"
        )


#: Reports that are kept.
_MOST_REPORTS: Final = 100


class _History:
    """The reports of this process, the latest last. Thread-safe."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _reports: ClassVar[deque[CallReport]] = deque(maxlen=_MOST_REPORTS)

    @classmethod
    def add(cls, report: CallReport) -> None:
        with cls._lock:
            cls._reports.append(report)
            cls._forget_timelines()

    @classmethod
    def _forget_timelines(cls) -> None:
        """Keep the timelines of the latest calls only: they are what takes memory."""
        n_recorded = 0
        for position in range(len(cls._reports) - 1, -1, -1):
            report = cls._reports[position]
            n_recorded += report._n_recorded
            if n_recorded > MOST_RECORDED and report._n_recorded and position < len(cls._reports) - 1:
                report.put_timeline(None, 0)

    @classmethod
    def all(cls) -> list[CallReport]:
        with cls._lock:
            return list(cls._reports)


def _forget_in_child() -> None:
    # Another thread may have been adding one.
    _History._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def record(report: CallReport) -> None:
    """Make ``report`` the last one."""
    _History.add(report)


def reports() -> list[CallReport]:
    """Return the reports of the last 100 outermost calls that finished in this process, the latest last.

    Calls with one job run in joblib's sequential loop, which tells no backend of its end; they leave no report.
    """
    return _History.all()


def last_report() -> CallReport | None:
    """Return the report of the last outermost call that finished in this process, or None before the first.

    Calls with one job run in joblib's sequential loop, which tells no backend of its end; they leave no report.
    """
    found = _History.all()
    return found[-1] if found else None


def announce(line: str) -> None:
    """Write one line to stderr, where there is one: services and windowed programs have none, or a closed one."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"joblib_backends: {line}\n")
        sys.stderr.flush()
