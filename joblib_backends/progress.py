"""The progress bar of an outermost call: tqdm draws what the call counts.

Whoever completes batches draws, at most ten times a second: the calling thread, or a thread of the crew. A call that
tells of its progress itself gets no bar: joblib's and scikit-learn's ``verbose`` print lines, which a bar would tear
apart, and scikit-learn's callbacks draw bars of their own.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Final, Literal

from .data.codec import describe
from .errors import MissingDependencyError
from .sharing import sklearn_inside
from .tally import Tally

__all__ = ["Progress"]

#: Seconds between two looks of a bar.
_DRAW_EVERY_S: Final = 0.1

#: The same where lines are not overwritten: in a file, say.
_WRITE_EVERY_S: Final = 10.0

#: What tqdm draws; the bar of a call whose length is not known has no end, and no time left.
_KNOWN: Final = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


class Progress:
    """What a call shows of itself while it runs.

    Parameters
    ----------
    when : {True, "always"}
        Whether to show it on a terminal or in a notebook only, or wherever standard error goes.
    tally : Tally
        What the call has counted so far.
    n_tasks : int, optional
        Tasks of the call, where it has a length.

    Raises
    ------
    MissingDependencyError
        If tqdm is not installed.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, when: Literal[True, "always"], tally: Tally, n_tasks: int | None) -> None:
        self._tally = tally
        self._n_tasks = n_tasks
        self._is_shown = when == "always" or _is_watched()
        self._overwrites = _is_watched()
        self._bar: Any = None
        self._kind = _bar_kind() if self._is_shown else None
        self._looked = 0.0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Progress {self._tally.tasks}/{self._n_tasks}>"

    def meet(self, items: Sequence[Any]) -> None:
        """Begin, with the first tasks of the call: what they are, and for a search how many there will be."""
        if not self._is_shown or not items:
            return
        search = sklearn_inside.search_of(*items[0])
        estimator = sklearn_inside.estimator_of(*items[0])
        if any(map(sklearn_inside.has_callbacks, (estimator, search and search.caller))):
            self._is_shown = False
            return
        name = describe(items[0][0]) if search is None else type(search.caller or estimator).__name__
        if search is not None:
            self._n_tasks = search.n_fits or self._n_tasks
        assert self._kind is not None
        with self._lock:
            self._bar = self._kind(
                desc=name,
                total=self._n_tasks,
                unit="tasks" if search is None else "fits",
                bar_format=None if self._n_tasks is None else _KNOWN,
                file=sys.stderr,
                mininterval=_DRAW_EVERY_S if self._overwrites else _WRITE_EVERY_S,
                dynamic_ncols=True,
            )

    def look(self, n_known: int | None, n_shared: int = 0) -> None:
        """Draw what has been done by now.

        Parameters
        ----------
        n_known : int or None
            Tasks of the call, once its input has come to an end.
        n_shared : int
            Fits that were not necessary, because several tasks had them in common.
        """
        now = time.monotonic()
        if self._bar is None or now - self._looked < _DRAW_EVERY_S:
            return
        self._looked = now
        with self._lock:
            self._draw(n_known, n_shared)

    def end(self, n_known: int | None, n_shared: int = 0) -> None:
        """Draw the last, and leave it there; idempotent."""
        with self._lock:
            if self._bar is not None:
                self._draw(n_known, n_shared)
                self._bar.close()
                self._bar = None

    def _draw(self, n_known: int | None, n_shared: int) -> None:
        bar, tally = self._bar, self._tally
        if bar is None:
            return
        if bar.total is None and n_known is not None:
            bar.total, bar.bar_format = n_known, _KNOWN
        counts = {"again": tally.retries, "lost workers": tally.lost_workers, "fits shared": n_shared}
        places = " + ".join(tally.reasons)
        bar.set_postfix_str(", ".join([places, *(f"{n} {what}" for what, n in counts.items() if n)]), refresh=False)
        bar.update(tally.tasks - bar.n)


def _bar_kind() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            f"progress= needs the package 'tqdm': {error}. Install it, with pip install tqdm, or leave progress= out."
        ) from error

    class Bar(tqdm):  # type: ignore[misc]
        # No thread that looks at bars, for as long as the process lives.
        monitor_interval = 0

    return Bar


def _is_watched() -> bool:
    """Return whether a person looks at standard error: in a terminal, or a notebook."""
    if "ipykernel" in sys.modules:
        return True
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False
