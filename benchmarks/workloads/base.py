"""What a workload of the `auto` suite is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def nothing() -> None:
    """Build no data."""


@dataclass(frozen=True)
class Workload:
    """A piece of code as users write it, run on every row with ``n_jobs=-1`` and on the plain loop with 1.

    Parameters
    ----------
    name : str
        Name on the command line, in the files and in the table.
    about : str
        What the tasks are, in a few words.
    run : callable
        ``run(state, n_jobs)`` returns an answer that does not depend on where the tasks ran: arrays and plain
        values, without timings. It may change nothing in ``state``.
    setup : callable
        Returns ``state``. Not timed.
    repeats : int
        Most warm calls in each process; fewer when they are long (see ``harness.py``).
    calls : int
        ``Parallel`` calls in one run; the allowance of small work counts per call.
    small : bool
        Whether a plain loop is expected to win: one ``Parallel`` call takes it less than 20 ms.
    quick : bool
        Whether the workload belongs to the subset of ``--quick``.
    """

    name: str
    about: str
    run: Callable[[Any, int], Any]
    setup: Callable[[], Any] = nothing
    repeats: int = 5
    calls: int = 1
    small: bool = False
    quick: bool = False

    def prepare(self, row: str) -> Callable[[], Any]:
        """Build the data and return what is to be timed on ``row``."""
        state = self.setup()
        n_jobs = 1 if row == "plain loop" else -1
        return lambda: self.run(state, n_jobs)

    def units(self, row: str) -> int:
        """Return by what the measured seconds are divided: here a number is the time of one run."""
        return 1
