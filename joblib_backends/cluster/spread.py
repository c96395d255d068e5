"""Brings a buffer of this process to the hosts of a cluster that cannot map its file: once over the wire to each.

::

    this process ──parts──> host A ──parts──> host B          each host that has a copy feeds one other at a time,
                                └───────────> host C, B ──> D  so their number doubles

Who runs where: :meth:`Spread.want` in any thread; the copies are made by one thread of the crew for each buffer, which
ends when there is nothing more to bring. The work is done by tasks of ``copies.py`` on the workers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

from ..crew import Crew
from ..data.store import Resident, map_buffer
from .client import nthreads
from .copies import PART_NBYTES, Copy, fetch_copy, open_copy, write_part
from .travel import by_name

__all__ = ["Spread"]

_log = logging.getLogger(__name__)

#: Tries to bring a buffer to one place, before its workers get no batch that needs it.
_MOST_TRIES: Final = 3

#: Seconds between two looks whether the workers that are to have a copy are still there.
_LOOK_S: Final = 0.5

#: Seconds within which the scheduler must say which workers there are.
_ASK_S: Final = 10.0

#: Before all batches: those that run on the host wait for it.
_PRIORITY: Final = 1_000


class _Transfer(NamedTuple):
    """A copy on its way."""

    place: str
    source: str
    future: Any


class Spread:
    """The copies of one buffer.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    resident : Resident
        The buffer. It is not held: what is on its way, and the copies, go with the resident.
    workers_in : callable
        Returns the workers that a place has now.
    arrived : callable
        Called with a place, the path of the buffer and that of its copy there; makes it known to the workers.
    changed : callable
        Called when another place has a copy, or can have none.
    own_place : str
        The place of this process, whose workers can read the buffer's own file.
    """

    def __init__(
        self,
        client: Any,
        resident: Resident,
        workers_in: Callable[[str], Collection[str]],
        arrived: Callable[[str, str, str], object],
        changed: Callable[[], object],
        own_place: str,
    ) -> None:
        self._client = client
        self._resident = weakref.ref(resident)
        self._ref = resident.ref()
        self._workers_in = workers_in
        self._arrived = arrived
        self._changed = changed
        self._own_place = own_place
        self._lock = threading.Lock()
        self._is_running = False
        self._wanted: list[str] = []
        self._failures: Counter[str] = Counter()
        #: Whether even workers in our own place cannot read the buffer's own file.
        self.is_needed_here = False
        #: Why it could not be brought to some place.
        self.problem: BaseException | None = None
        #: Where it is, by place; and the tasks that keep it there.
        self.copies: dict[str, Copy] = {}
        self._keepers: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<Spread of {self._ref.path}: {len(self.copies)} copies, {len(self._wanted)} wanted>"

    def can_reach(self, place: str) -> bool:
        """Return whether the buffer is in a place or may still come there."""
        return place in self.copies or self._failures[place] < _MOST_TRIES

    def want(self, place: str) -> None:
        """Have a copy made in a place; returns at once."""
        with self._lock:
            if place in self.copies or place in self._wanted or not self.can_reach(place):
                return
            self._wanted.append(place)
            starts, self._is_running = not self._is_running, True
        if starts:
            try:
                Crew.shared().run(self._bring_all)
            except BaseException:  # no thread can be started
                with self._lock:
                    self._is_running, self._wanted = False, []
                raise

    def lose(self, place: str, path: str) -> None:
        """Note that the copy at ``path`` is gone."""
        with self._lock:
            if place in self.copies and self.copies[place].path == path:
                del self.copies[place]
                del self._keepers[place]

    # ---- the crew's thread

    def _bring_all(self) -> None:
        try:
            self._bring_while_wanted()
        except Exception as error:
            # The client was closed, because nobody needs the buffer any more.
            _log.debug("%s is brought nowhere any more: %s", self._ref.path, error)
            with self._lock:
                self._failures.update(dict.fromkeys(self._wanted, _MOST_TRIES))
                self._wanted, self._is_running, self.problem = [], False, error.with_traceback(None)
            self._changed()

    def _bring_while_wanted(self) -> None:
        under_way: dict[str, _Transfer] = {}
        done: queue.SimpleQueue[str] = queue.SimpleQueue()
        while self._has_work(under_way):
            if not under_way and not self._sources():
                self._bring_from_here(self._wanted[0])
                continue
            self._start_transfers(under_way, done)
            with contextlib.suppress(queue.Empty):
                done.get(timeout=_LOOK_S)
            for transfer in list(under_way.values()):
                if transfer.future.done() or not self._workers_in(transfer.place):
                    del under_way[transfer.place]
                    self._finish(transfer.place, transfer.future, transfer.source)

    def _has_work(self, under_way: dict[str, _Transfer]) -> bool:
        with self._lock:
            if self._resident() is None:
                # What is under way goes with its futures.
                self._wanted, self._is_running = [], False
                return False
            self._is_running = bool(self._wanted or under_way)
            return self._is_running

    def _sources(self) -> dict[str, Copy]:
        """Return where the buffer can be had, by place: from copies, and from workers that read the file itself."""
        own = None if self.is_needed_here else next(iter(self._workers_in(self._own_place)), None)
        with self._lock:
            return {**self.copies, **({} if own is None else {self._own_place: Copy(own, self._ref.path)})}

    def _start_transfers(self, under_way: dict[str, _Transfer], done: queue.SimpleQueue[str]) -> None:
        """Have each place that has the buffer, and feeds no other, feed one that wants it."""
        busy = {one.source for one in under_way.values()}
        idle = [(place, copy) for place, copy in self._sources().items() if place not in busy]
        with self._lock:
            waiting = [place for place in self._wanted if place not in under_way]
        for place, (source, copy) in zip(waiting, idle, strict=False):
            workers = list(self._workers_in(place))
            if not workers:
                self._put_off(place)
                continue
            # A worker of the place that is free takes it.
            future = self._submit(fetch_copy, self._ref.nbytes, *copy, workers=workers)
            under_way[place] = _Transfer(place, source, future)
            future.add_done_callback(functools.partial(_note_done, done, place))

    def _submit(self, function: Callable[..., Any], *args: Any, workers: list[str], key: str | None = None) -> Any:
        key = key or f"joblib_backends-copy-{uuid.uuid4().hex}"
        call = by_name(function, *args)
        return self._client.submit(eval, *call, workers=workers, key=key, pure=False, priority=_PRIORITY)

    def _bring_from_here(self, place: str) -> None:
        keeper = None
        try:
            workers = list(self._workers_in(place))
            if not workers:
                self._put_off(place)
                return
            keeper = self._fill(workers)
        except Exception as error:
            self._note_failure(place, error)
        else:
            self._finish(place, keeper)

    def _fill(self, workers: list[str]) -> Any:
        """Return the finished task that keeps a copy, on the worker that was free, after all parts were sent there."""
        keeper = self._submit(open_copy, self._ref.nbytes, workers=workers)
        worker = self._wait_for(keeper, workers).address
        content, writing = map_buffer(self._ref), None
        for start in range(0, self._ref.nbytes, PART_NBYTES):
            self._check_is_needed()
            part = content[start : start + PART_NBYTES]
            # hash=False: no use for a name by content. A list: bytes alone would be taken for a sequence of parts.
            [sent] = self._client.scatter([part], workers=[worker], hash=False)
            if writing is not None:
                self._wait_for(writing, [worker])
            writing = self._submit(write_part, keeper.key, sent, workers=[worker])
        if writing is not None:
            self._wait_for(writing, [worker])
        return keeper

    def _wait_for(self, future: Any, workers: list[str]) -> Any:
        """Return the result of a task; raise what it raised, or that all workers have left that may run it."""
        ended = threading.Event()
        future.add_done_callback(lambda _: ended.set())
        while not ended.wait(_LOOK_S):
            self._check_is_needed()
            if not any(nthreads(self._client, _ASK_S).get(worker) for worker in workers):
                raise LookupError(f"the workers {workers} have left")
        return future.result()

    def _check_is_needed(self) -> None:
        if self._resident() is None:
            raise LookupError("nobody needs it any more")

    def _finish(self, place: str, future: Any, source: str = "") -> None:
        """Have a copy that has arrived used, or note that it has not."""
        try:
            if not future.done():
                self._put_off(place)  # its workers have left
                return
            copy = future.result()
            self._arrived(place, self._ref.path, copy.path)
        except Exception as error:
            copy = self.copies.get(source)
            if copy is not None and copy.address not in self._workers_in(source):
                # Its source is gone, and not this place.
                self.lose(source, copy.path)
            else:
                self._note_failure(place, error)
            return
        with self._lock:
            self.copies[place], self._keepers[place] = copy, future
            self._wanted.remove(place)
        self._changed()

    def _put_off(self, place: str) -> None:
        """Bring nothing to a place without workers; who sees some there will want it again."""
        with self._lock:
            self._wanted.remove(place)
        self._changed()

    def _note_failure(self, place: str, error: BaseException) -> None:
        _log.debug("%s could not be brought to %s: %s", self._ref.path, place, error)
        with self._lock:
            # Without the frames, which hold what was under way.
            self.problem = error.with_traceback(None)
            self._failures[place] += 1
            if self._failures[place] >= _MOST_TRIES:
                self._wanted.remove(place)
        self._changed()


def _note_done(done: queue.SimpleQueue[str], place: str, future: Any) -> None:
    done.put(place)
