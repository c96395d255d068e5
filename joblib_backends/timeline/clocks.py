"""Clocks of other processes, told by the clock of this one.

Each batch bounds how far a worker's clock is ahead: it began there after it was sent here, and its results came here
after it had ended there. Many batches leave little room between the bounds, and no span is drawn before its cause or
after its effect, which a time server's idea of the hour does not promise. No message is sent for it.

On one machine there is nothing to tell: ``time.perf_counter`` is one clock for all of its processes, so zero lies
between the bounds, and is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Exchange", "seconds_ahead"]


class Exchange(NamedTuple):
    """A batch there and back: two times on the clock of this process, and two on that of the worker."""

    sent: float
    began: float
    ended: float
    received: float


def seconds_ahead(exchanges: Iterable[Exchange]) -> float:
    """Return by how much a worker's clock is ahead of that of this process.

    Parameters
    ----------
    exchanges : iterable of Exchange
        The batches of one process.

    Returns
    -------
    float
        Seconds to take from the worker's times; 0 where the clocks are the same, or nothing is known.

    Notes
    -----
    The middle between the bounds, as in Cristian's algorithm (Probabilistic clock synchronization, Distributed
    Computing 3, 1989), with the tightest bounds of all batches. Clocks that drift apart during a call by more than a
    journey takes leave bounds that contradict each other; then, too, the middle is the best guess.
    """
    known = list(exchanges)
    if not known:
        return 0.0
    at_least = max(one.ended - one.received for one in known)
    at_most = min(one.began - one.sent for one in known)
    return 0.0 if at_least <= 0.0 <= at_most else (at_least + at_most) / 2
