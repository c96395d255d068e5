"""What is recorded of a call while it runs, and how a timeline is made of it afterwards.

A batch costs one tuple, put into a list when its outcome is there; nothing is computed before somebody looks.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from ..worker import Spent, Worker, this_worker
from .clocks import Exchange, seconds_ahead
from .model import Kind, Mark, Row, Span, Timeline
from .phases import Phase

__all__ = ["MOST_RECORDED", "BatchRecord", "Recorder"]

#: Batches that are recorded of a call; each takes about 0.5 kB. Further ones are counted only.
MOST_RECORDED: Final = 200_000

#: The row of the thread that called joblib, and of all that the driver does for batches.
_CALLER: Final = "caller"

#: What tells in a function's name what its tasks do.
_TOLD_BY_WORD: Final[dict[str, Kind]] = {"fit": "fit", "build": "fit", "score": "score", "predict": "score"}


class BatchRecord(NamedTuple):
    """A batch that ended, or was lost."""

    tier: str
    #: What it ran, and which of the tasks, as people call them.
    name: str
    detail: str
    #: The position of its first task in the call, and their number.
    task: int
    n_tasks: int
    #: On the clock of the driver: a tier got it, its outcome came.
    sent: float
    received: float
    spent: Spent
    #: When it was encoded, and the seconds that this took; both 0 where memory is shared.
    encoded: tuple[float, float] = (0.0, 0.0)
    #: Seconds to decode its results.
    decode_s: float = 0.0
    #: For each task of a search, the seconds of its fit and of its score.
    times: tuple[tuple[float, float], ...] = ()
    #: How it was lost; empty if it was not.
    loss: str = ""


class Recorder:
    """What one call does, as it happens. Thread-safe: each entry is one ``append``, and a few too many do no harm."""

    def __init__(self) -> None:
        self._caller = this_worker()
        # Plain tuples of numbers and texts, which the garbage collector does not look at any more. Kept as they come,
        # the records of 2,000 batches made it look at everything there is, 20 µs for each batch (M).
        self._entries: list[tuple[Any, ...]] = []
        # Who ran them, by number.
        self._numbers: dict[Worker | None, int] = {}
        self._lock = threading.Lock()
        self._marks: list[tuple[str, float, str]] = []
        self.n_omitted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, record: BatchRecord) -> None:
        """Record a batch."""
        if len(self._entries) >= MOST_RECORDED:
            with self._lock:
                self.n_omitted += 1
            return
        tier, name, detail, task, n_tasks, sent, received, spent, encoded, decode_s, times, loss = record
        wall, _, _, started, load, pack, _, worker, phases = spent
        number = self._numbers.get(worker)
        if number is None:
            with self._lock:
                number = self._numbers.setdefault(worker, len(self._numbers))
        more = (times, tuple(map(tuple, phases))) if times or phases else None
        self._entries.append(
            (
                *(tier, name, detail, task, n_tasks, sent, received),
                *(wall, started, load, pack, number, *encoded, decode_s, loss, more),
            )
        )

    def _records(self) -> Iterator[BatchRecord]:
        """Yield the batches as they were recorded."""
        entries, workers = list(self._entries), list(self._numbers)
        for entry in entries:
            wall, started, load, pack, number, began_encoding, encode_s, decode_s, loss, more = entry[7:]
            times, phases = more or ((), ())
            parts = [Phase(*phase) for phase in phases]
            spent = Spent(wall, 0.0, 0.0, started, load, pack, 0, workers[number], parts)
            yield BatchRecord._make((*entry[:7], spent, (began_encoding, encode_s), decode_s, times, loss))

    def mark(self, name: str, detail: str = "") -> None:
        """Record what happens now."""
        if len(self._marks) < MOST_RECORDED:
            self._marks.append((name, time.perf_counter(), detail))

    def timeline(self, started: float) -> Timeline:
        """Return all of it on one clock.

        Parameters
        ----------
        started : float
            When the call began, on the clock of the driver.
        """
        rows, records = _Rows(self._caller), list(self._records())
        ahead = _clocks(records)
        spans = [span for record in records for span in _spans_of(record, rows, started, ahead)]
        marks = [Mark(0, name, at - started, detail) for name, at, detail in self._marks]
        return Timeline(rows.named(), spans, marks, self.n_omitted)


def _clocks(records: Iterable[BatchRecord]) -> dict[Worker, float]:
    """Return for each worker by how much its clock is ahead of the driver's; those of one process have one clock."""
    exchanges: dict[tuple[str, int], list[Exchange]] = defaultdict(list)
    workers = set()
    for one in records:
        worker, spent = one.spent.worker, one.spent
        if worker is not None:
            workers.add(worker)
            exchange = Exchange(one.sent, spent.started, spent.started + spent.wall, one.received)
            exchanges[worker.host, worker.pid].append(exchange)
    of_processes = {process: seconds_ahead(known) for process, known in exchanges.items()}
    return {worker: of_processes[worker.host, worker.pid] for worker in workers}


class _Rows:
    """The rows of a timeline, in the order in which they are first met; the caller's is the first."""

    def __init__(self, caller: Worker) -> None:
        self._caller = caller
        self._positions: dict[tuple[str, Worker | None], int] = {(_CALLER, caller): 0}

    def of(self, tier: str, worker: Worker | None) -> int:
        """Return the position of a worker's row; of None, that of batches that were lost with theirs."""
        key = (_CALLER, worker) if worker == self._caller else (tier, worker)
        return self._positions.setdefault(key, len(self._positions))

    def named(self) -> list[Row]:
        """Return the rows, with names that tell them apart."""
        workers = [worker for _, worker in self._positions if worker is not None]
        hosts = {worker.host for worker in workers}
        n_threads: dict[tuple[str, int], int] = defaultdict(int)
        n_of_process: dict[tuple[str, int], int] = defaultdict(int)
        for worker in workers:
            n_threads[worker.host, worker.pid] += 1
        rows = []
        for tier, one in self._positions:
            if one is None:
                rows.append(Row(f"{tier}, lost"))
                continue
            process = (one.host, one.pid)
            n_of_process[process] += 1
            name = self._name(tier, one, n_of_process[process], n_threads[process])
            rows.append(Row(name, one.host if len(hosts) > 1 else ""))
        return rows

    def _name(self, tier: str, worker: Worker, number: int, n_threads: int) -> str:
        if worker == self._caller:
            return _CALLER
        if worker.pid == self._caller.pid and worker.host == self._caller.host:
            # The caller is the first of its process.
            return f"{'dask ' if tier == 'dask' else ''}thread {number - 1}"
        kind = "process" if tier == "processes" else tier
        return f"{kind} {worker.pid}" + (f", thread {number}" if n_threads > 1 else "")


def _spans_of(record: BatchRecord, rows: _Rows, started: float, ahead: dict[Worker, float]) -> Iterator[Span]:
    worker, spent = record.spent.worker, record.spent
    began_encoding, encode_s = record.encoded
    if encode_s:
        yield Span(0, "transfer", "encode", began_encoding - started, encode_s, detail=record.name)
    if record.loss:
        row = rows.of(record.tier, None)
        seconds = record.received - record.sent
        start = record.sent - started
        yield Span(row, "retry", record.name, start, seconds, record.task, record.n_tasks, record.loss)
        return
    row = rows.of(record.tier, worker)
    zero = started + (ahead[worker] if worker is not None else 0.0)
    start = (spent.started or record.received - spent.wall) - zero
    kind = _kind_of(record.name)
    yield Span(row, kind, record.name, start, spent.wall, record.task, record.n_tasks, record.detail)
    yield from _phases_of(record, row, start, zero)
    if record.decode_s and record.tier not in ("inline", "threads"):
        yield Span(0, "transfer", "decode", record.received - started, record.decode_s, detail=record.name)


def _phases_of(record: BatchRecord, row: int, start: float, zero: float) -> Iterator[Span]:
    spent = record.spent
    if spent.load:
        # With several tasks, each is loaded right before it runs; drawn as one, at the beginning.
        yield Span(row, "transfer", "load", start, spent.load)
    at, end = start + spent.load, start + spent.wall - spent.pack
    for fit_s, score_s in record.times:
        if at + fit_s + score_s > end:
            # A fit that was shared: its time is that of whoever ran it.
            break
        yield Span(row, "fit", "fit", at, fit_s)
        yield Span(row, "score", "score", at + fit_s, score_s)
        at += fit_s + score_s
    for phase in spent.phases:
        yield Span(row, phase.kind, phase.name, phase.started - zero, phase.seconds)
    if spent.pack:
        yield Span(row, "transfer", "pack", start + spent.wall - spent.pack, spent.pack)


@functools.lru_cache(maxsize=256)
def _kind_of(name: str) -> Kind:
    """Return what a function does, by the words of its name; one that does several things does a task."""
    words = re.split(r"[\W\d_]+", name.partition("-")[0].lower())
    kinds = {_TOLD_BY_WORD[word] for word in words if word in _TOLD_BY_WORD}
    return kinds.pop() if len(kinds) == 1 else "task"
