"""The checkpoint of one call: which of its tasks are done already, and what it adds for the next run.

A task is known by its content (``identity.py``) and by its turn: a function that draws random numbers may be called
twice with the same arguments, and must then give two results. Turns are counted in a context, over calls that were
completed: a call that failed or was interrupted starts with the same turns again, a later ``with`` block, or process,
from the first one. Tasks of a search whose estimators are all seeded have one turn, so one that is enlarged finds them.

The call never fails because of its checkpoint: what cannot be read runs, what cannot be written is not kept, and one
warning says so.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle

from ..data.codec import describe
from ..errors import CheckpointError, CheckpointWarning
from ..sharing import sklearn_inside
from .identity import TaskIdentities
from .journal import Entry, Journal

__all__ = ["CallCheckpoint", "ContextCheckpoint", "TaskKey"]

_log = logging.getLogger(__name__)

#: What a task is known by: its identity and its turn; None for one without an identity.
TaskKey = tuple[bytes, int] | None

Task = tuple[Any, tuple[Any, ...], Mapping[str, Any]]


class ContextCheckpoint:
    """The journal that the calls of a context share, and the turns of their tasks. Thread-safe.

    Parameters
    ----------
    path : str or path
        The file.

    Raises
    ------
    CheckpointError
        If it cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.journal = Journal(os.path.abspath(path), TaskIdentities().versions())
        self.turns: Counter[bytes] = Counter()
        self.lock = threading.Lock()
        #: Whether it could not be written, or read; then it is not tried again, and nobody is told again.
        self.is_broken = self.is_unreadable = False
        weakref.finalize(self, self.journal.close).atexit = False

    def __repr__(self) -> str:
        return f"<ContextCheckpoint {self.journal!r}>"

    @classmethod
    def of(cls, warm: dict[str, object], path: str | os.PathLike[str]) -> ContextCheckpoint | None:
        """Return the checkpoint of a context, opened by its first call; None, with a warning, if it cannot be used."""
        key = f"checkpoint {os.path.abspath(path)}"
        known = warm.get(key)
        if not isinstance(known, cls) and known is None:
            try:
                known = warm[key] = cls(path)
            except CheckpointError as error:
                warm[key] = False
                warnings.warn(f"The call goes on without its checkpoint. {error}", CheckpointWarning, stacklevel=2)
        return known if isinstance(known, cls) else None

    def tell_of_damage(self) -> None:
        """Warn if the journal found its file damaged since it was last asked."""
        with self.lock:
            sentence, self.journal.set_aside = self.journal.set_aside, None
        if sentence is not None:
            warnings.warn(sentence, CheckpointWarning, stacklevel=2)

    def fail(self, error: CheckpointError) -> None:
        """Note that nothing can be written, and say so once."""
        with self.lock:
            is_news, self.is_broken = not self.is_broken, True
        if is_news:
            message = f"Finished tasks are not kept from now on. {error}"
            warnings.warn(message, CheckpointWarning, stacklevel=2)


class CallCheckpoint:
    """What one call takes from the journal, and adds.

    ``recall`` is called in one thread at a time, in the order of the tasks; ``keep`` in another.
    """

    def __init__(self, shared: ContextCheckpoint) -> None:
        self._shared = shared
        self._identities = TaskIdentities()
        self._turns: Counter[bytes] = Counter()
        shared.tell_of_damage()

    def __repr__(self) -> str:
        return f"<CallCheckpoint {self._shared.journal!r}>"

    def keys_of(self, tasks: Sequence[Task]) -> list[TaskKey]:
        """Return what the next tasks of the call are known by."""
        keys: list[TaskKey] = []
        for task in tasks:
            try:
                keys.append(self._key_of(*task))
            except Exception as error:
                # In code of the user, a get_params or a __reduce__: it will fail again where it is expected to.
                _log.debug("A task is not kept, because it cannot be told what it is: %s", error)
                keys.append(None)
        return keys

    def _key_of(self, callee: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TaskKey:
        is_seeded = False
        options: dict[str, Any] = {}
        if sklearn_inside.is_fit_and_score(callee):
            given = sklearn_inside.arguments_of(callee, args, kwargs)
            is_seeded = sklearn_inside.is_seeded(given["estimator"], given["parameters"])
            options = {"arguments": given, "ignored": sklearn_inside.NOT_OF_RESULT, "generators_have_content": True}
        identity = self._identities.of(callee, args, dict(kwargs), **options)
        if identity is None:
            return None
        if is_seeded:
            return identity, 0
        turn = self._shared.turns[identity] + self._turns[identity]
        self._turns[identity] += 1
        return identity, turn

    def recall(self, keys: Sequence[TaskKey]) -> dict[int, Any]:
        """Return the results that the journal has, by the places of their keys."""
        wanted = {key: place for place, key in enumerate(keys) if key is not None}
        if not wanted or self._shared.is_unreadable:
            return {}
        try:
            found = self._shared.journal.find(list(wanted))
        except CheckpointError as error:
            self._shared.is_unreadable = True
            self._shared.fail(error)
            return {}
        self._shared.tell_of_damage()
        known = {}
        for place, key in enumerate(keys):
            if key in found:
                try:
                    known[place] = pickle.loads(found[key])
                except Exception as error:
                    # Of a class that has moved, say. It runs again, and its new result takes the place.
                    _log.debug("A result of the checkpoint cannot be loaded: %s", error)
        return known

    def keep(self, keys: Sequence[TaskKey], tasks: Sequence[Task], results: Sequence[Any], seconds: float) -> None:
        """Add the results of a batch that took so many seconds; they are on the disk when this returns."""
        if self._shared.is_broken:
            return
        entries = []
        for key, task, result in zip(keys, tasks, results, strict=True):
            if key is None:
                continue
            try:
                packed = cloudpickle.dumps(result, protocol=5)
            except Exception as error:
                _log.debug("A result is not kept, because it cannot be pickled: %s", error)
                continue
            entries.append(Entry(*key, describe(task[0]), packed, seconds / len(keys), self._identities.versions()))
        if not entries:
            return
        try:
            self._shared.journal.put(entries)
        except CheckpointError as error:
            self._shared.fail(error)
        self._shared.tell_of_damage()

    def end(self, *, failed: bool) -> None:
        """Note that the call is over; one that failed will be run again, and its tasks have the same turns then."""
        if not failed:
            with self._shared.lock:
                self._shared.turns.update(self._turns)
        self._turns = Counter()
