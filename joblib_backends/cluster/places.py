"""Which workers of a cluster find the same files, and which batches can go where.

A place is where files of ours are: a ``/dev/shm`` that some processes share, on one host or in one container. What this
process has placed, workers in its own place map; in every other place there must be a copy first (``spread.py``).

Thread-safe: the sender asks, threads of the crew report what has arrived.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

from ..data.store import Resident
from ..errors import ClusterLostError
from ..remote import Missing, note_copies, place_of_this_process
from .accounting import CountOwnMemory, CountOwnMemoryOfWorker
from .client import register_plugin, run_on_workers
from .keeper import KeepCopies
from .spread import Spread
from .travel import made_from_source

__all__ = ["Places"]

_log = logging.getLogger(__name__)

#: Seconds within which workers must answer; one that does not may be leaving, or be busy with something that holds it.
_ASK_S: Final = 5.0

#: Seconds for which one that has not answered gets no batch with data, and no question.
_SILENT_S: Final = 10.0


class Places:
    """Where the workers of a cluster find files, and what has been brought there.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    changed : callable
        Called when a batch may go where it could not before, or can go nowhere.
    """

    def __init__(self, client: Any, changed: Callable[[], object]) -> None:
        self._client = client
        self._changed = changed
        self._own = place_of_this_process()
        self._lock = threading.Lock()
        self._place_of: dict[str, str] = {}
        self._alive: frozenset[str] = frozenset()
        # Workers that have not answered, until when they are not asked again: each time would hold up all batches.
        self._silent_until: dict[str, float] = {}
        self._spreads: weakref.WeakKeyDictionary[Resident, Spread] = weakref.WeakKeyDictionary()
        self._is_prepared = False

    def __repr__(self) -> str:
        return f"<Places of {len(self._place_of)} workers: {len(set(self._place_of.values()))}>"

    def look(self, workers: frozenset[str]) -> None:
        """Note which workers there are, and ask those that are new where they find files."""
        self._prepare_workers()
        now = time.monotonic()
        with self._lock:
            self._alive = workers
            self._place_of = {worker: place for worker, place in self._place_of.items() if worker in workers}
            self._silent_until = {w: end for w, end in self._silent_until.items() if w in workers and end > now}
            new = workers - self._place_of.keys() - self._silent_until.keys()
        if not new:
            return
        answers = self._ask(place_of_this_process, new)
        for worker, place in answers.items():
            self._tell_of_copies(worker, place)
        with self._lock:
            self._place_of |= answers
            self._silent_until |= dict.fromkeys(new - answers.keys(), time.monotonic() + _SILENT_S)

    def start_anew(self) -> None:
        """Forget all that was said and done: another scheduler, with other workers, may have come."""
        with self._lock:
            self._is_prepared = False
            self._place_of, self._silent_until = {}, {}
            self._spreads = weakref.WeakKeyDictionary()

    def workers_for(self, residents: Iterable[Resident]) -> frozenset[str] | None:
        """Return the workers that have all of some buffers, None if all do; have them brought to the others.

        Raises
        ------
        ClusterLostError
            If no worker has them, or can get them.
        """
        lacking: set[str] = set()
        unreachable: set[str] = set()
        problem: BaseException | None = None
        places = self._places()
        for resident in residents:
            spread = self._spreads.get(resident)
            for place in places - self._places_of(resident, spread):
                lacking.add(place)
                if resident.shared:
                    unreachable.add(place)
                    continue
                spread = spread or self._spread_of(resident)
                spread.want(place)
                if not spread.can_reach(place):
                    unreachable.add(place)
                    problem = spread.problem
        if not lacking and not self._silent_until:
            return None
        if places and unreachable >= places:
            raise ClusterLostError(
                f"The data of a batch could not be brought to any Dask worker: {problem or _NOT_SHARED}. Give the "
                "workers more shared memory, or start them on this machine."
            )
        return frozenset(worker for worker in self._alive if self._place_of.get(worker) in places - lacking)

    def refute(self, missing: Missing, residents: Iterable[Resident]) -> None:
        """Take note of what a worker does not have."""
        self.look(self._alive | {missing.worker})
        place = self._place_of.get(missing.worker)
        if place is None:
            return
        for resident in residents:
            if resident.path not in missing.paths:
                continue
            spread = self._spread_of(resident)
            copy = spread.copies.get(place)
            if copy is None:
                spread.is_needed_here |= place == self._own
            elif missing.paths[resident.path] is None:
                self._ask(note_copies, [missing.worker], {resident.path: copy.path})
            else:
                spread.lose(place, copy.path)

    def _places(self) -> set[str]:
        with self._lock:
            return {self._place_of[worker] for worker in self._alive if worker in self._place_of}

    def _places_of(self, resident: Resident, spread: Spread | None) -> set[str]:
        if spread is None:
            return {self._own}
        own = set() if spread.is_needed_here else {self._own}
        return {*own, *spread.copies}

    def _spread_of(self, resident: Resident) -> Spread:
        with self._lock:
            spread = self._spreads.get(resident)
            if spread is None:
                spread = Spread(self._client, resident, self._workers_in, self._note_arrival, self._changed, self._own)
                self._spreads[resident] = spread
            return spread

    def _workers_in(self, place: str) -> list[str]:
        with self._lock:
            return sorted(worker for worker in self._alive if self._place_of.get(worker) == place)

    def _note_arrival(self, place: str, path: str, path_there: str) -> None:
        self._ask(note_copies, self._workers_in(place), {path: path_there})

    def _tell_of_copies(self, worker: str, place: str) -> None:
        """Tell a worker that has joined of the copies in its place."""
        with self._lock:
            spreads = list(self._spreads.items())
        copies = {resident.path: spread.copies[place].path for resident, spread in spreads if place in spread.copies}
        if copies:
            self._ask(note_copies, [worker], copies)

    def _prepare_workers(self) -> None:
        """Have the workers, and those that join later, do what the files need; once."""
        if not self._is_prepared:
            for kind in (KeepCopies, CountOwnMemory, CountOwnMemoryOfWorker):
                register_plugin(self._client, made_from_source(kind), _ASK_S)
            self._is_prepared = True

    def _ask(self, function: Callable[..., Any], workers: Collection[str], *args: Any) -> dict[str, Any]:
        """Return what a function returns on each of some workers; on one that does not answer in time, nothing."""
        answers = run_on_workers(self._client, function, workers, *args, timeout_s=_ASK_S)
        if len(answers) < len(workers):
            _log.debug("%s was answered by %d of %d workers", function.__name__, len(answers), len(workers))
        return answers


_NOT_SHARED: Final = "tasks write to it in common (mmap_mode), which they can on this machine only"
