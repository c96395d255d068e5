"""What a batch notes of itself where it runs: which of its steps took how long.

Notes belong to the context of the thread that runs the batch. Threads that a task starts have contexts of their own
and note nothing, so phases never overlap but where one lies inside of another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from .model import Kind

__all__ = ["Phase", "gathered", "noted"]


class Phase(NamedTuple):
    """A part of a batch, on the clock of the process that ran it."""

    kind: Kind
    name: str
    started: float
    seconds: float


#: Those of the batch that runs in this context.
_phases: ContextVar[list[Phase] | None] = ContextVar("phases", default=None)


@contextmanager
def gathered() -> Iterator[list[Phase]]:
    """Gather the phases that are noted in this block, for one batch."""
    phases: list[Phase] = []
    token = _phases.set(phases)
    try:
        yield phases
    finally:
        _phases.reset(token)


@contextmanager
def noted(kind: Kind, name: str) -> Iterator[None]:
    """Note the block as a phase of the batch that runs here; without one, nothing is noted."""
    phases = _phases.get()
    if phases is None:
        yield
        return
    started = time.perf_counter()
    try:
        yield
    finally:
        phases.append(Phase(kind, name, started, time.perf_counter() - started))
