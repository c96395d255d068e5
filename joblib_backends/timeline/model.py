"""What is recorded of a call: who did what, from when to when, on the clock of the driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

__all__ = ["KINDS", "Kind", "Mark", "Row", "Span", "Timeline"]

#: What a worker does, as it is coloured; what is left is idle. A "retry" is a batch that was lost, and ran again.
Kind = Literal["task", "fit", "shared fit", "score", "transfer", "retry"]

KINDS: Final[tuple[Kind, ...]] = ("task", "fit", "shared fit", "score", "transfer", "retry")


class Row(NamedTuple):
    """Who does one thing at a time: a thread, a process, or a thread of a Dask worker."""

    #: Such as "caller", "thread 2", "process 4711", "dask tcp://10.0.0.7:40001 2".
    name: str
    #: The host, where there are several; else empty.
    host: str = ""


class Span(NamedTuple):
    """What somebody did for some time.

    A span with tasks is a batch where it ran, from the arrival of its payload to the departure of its results. Spans
    without lie inside of it, on the same row, and say what it did; those of the driver say what that did for a batch.
    """

    #: The position of the row in the timeline.
    row: int
    kind: Kind
    #: What it was: the function with its estimator, a step's class, or "encode", "load", "pack", "decode".
    name: str
    #: Seconds since the call began, on the clock of the driver, and how long it took.
    start: float
    seconds: float
    #: The position of the first task among those of the call, -1 for none; and how many there are.
    task: int = -1
    n_tasks: int = 0
    #: Candidate and fold, or how a batch was lost.
    detail: str = ""


class Mark(NamedTuple):
    """What happened at one moment: a worker was lost, the call went to another tier, a task warned."""

    row: int
    name: str
    at: float
    detail: str = ""


@dataclass
class Timeline:
    """A call as it went."""

    #: The first row is the driver's: encoding, decoding, and the tasks of the calling thread.
    rows: list[Row] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    #: Batches that are not in it, because there were more than are recorded.
    n_omitted: int = 0
