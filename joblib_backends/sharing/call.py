"""The tasks of one search in the calling thread: what each has in common with others."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import shutil
import socket
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..config import Config
from ..data.content import NoContentError, content_of
from ..data.shelf import Shelf
from ..data.store import default_store
from ..errors import StoreError
from ..memory import memory_nbytes
from ..thread_safety import innermost
from . import sklearn_inside
from .ledger import Held, Ledger, Prefixes
from .steps import Step, TaskSteps, all_steps, derived, steps_of
from .task import Counted, Counts, Hint, Place, SharedCall, SharedFit

__all__ = ["SharedFits"]

_log = logging.getLogger(__name__)

#: Share of the machine's memory that may be held for others.
_MEMORY_FRACTION: Final = 0.1

#: And share of what is free in its place.
_FREE_FRACTION: Final = 0.5

#: Arguments of which a fold is made.
_OF_FOLD: Final = ("X", "y", "train", "test", "fit_params")


class SharedFits:
    """The prefixes that the tasks of one call share.

    Thread-safe: what is noted here is noted in whichever thread joblib dispatches from, one at a time, and the ledger
    has a lock of its own.

    Parameters
    ----------
    config : Config
        ``temp_folder``, and the limit ``share_fits_nbytes``.

    Raises
    ------
    StoreError
        If there is no place for a shelf.
    """

    def __init__(self, config: Config) -> None:
        self.counts = Counts()
        folders = tuple(default_store().make_folders(config.temp_folder))
        limit = config.share_fits_nbytes
        if limit is None:
            # A search inside of a task has its part of the cores, and of this.
            part = config.cores / (os.cpu_count() or 1) if config.cores else 1.0
            free = shutil.disk_usage(folders[0]).free
            limit = int(min(memory_nbytes() * _MEMORY_FRACTION * min(1.0, part), free * _FREE_FRACTION))
        self.ledger = Ledger(limit)
        self._call = SharedCall(uuid.uuid4().hex, folders, limit, socket.gethostname())
        self._shelf = Shelf(folders)
        self._contents = _Contents()
        self._candidates: dict[bytes, tuple[Step, ...]] = {}

    def __repr__(self) -> str:
        return f"<SharedFits {len(self._candidates)} candidates, {self.ledger!r}>"

    @classmethod
    def of_call(cls, config: Config, function: Callable[[], Any]) -> SharedFits | None:
        """Return what the tasks of a call share, or None if the first batch shows that they share nothing."""
        items = getattr(function, "items", None)
        if not config.share_fits or not items or not sklearn_inside.is_fit_and_score(items[0][0]):
            return None
        try:
            given = sklearn_inside.arguments_of(*items[0])
            if not sklearn_inside.is_plain_pipeline(given["estimator"]):
                return None
            shared = cls(config)
            _log.debug("Steps that candidates have in common are fitted once for all of them")
            return shared
        except (StoreError, OSError, TypeError):
            # Nowhere to put anything, or arguments that the function will refuse.
            return None

    # ---- before a batch

    def add(self, function: Callable[[], Any]) -> list[TaskSteps | None]:
        """Note the tasks of a batch; return what each has that others may have too."""
        items: Sequence[Any] = getattr(function, "items", None) or []
        added = [self._steps_of_task(*item) for item in items]
        for steps in added:
            if steps is not None:
                self.ledger.add(steps.prefixes)
        return added

    def all_are_known(self) -> None:
        """Note that every task of the call was added."""
        self.ledger.is_complete = True

    def _steps_of_task(self, callee: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TaskSteps | None:
        if not sklearn_inside.is_fit_and_score(callee):
            return None
        try:
            given = sklearn_inside.arguments_of(callee, args, kwargs)
            has_metadata = bool(given["fit_params"])
            steps = self._steps_of_candidate(given["estimator"], given["parameters"], has_metadata)
            return TaskSteps.of(self._fold(callee, given), steps) if steps else None
        except Exception as error:
            # In code of the user, a set_params or a get_params: it will fail again where it is expected to.
            _log.debug("A task shares nothing, because its steps cannot be told: %s", error)
            return None

    def _steps_of_candidate(
        self, estimator: Any, parameters: Mapping[str, Any] | None, has_metadata: bool
    ) -> tuple[Step, ...]:
        """Return the transformers of an estimator with its parameters set, looked for once for all folds."""
        if not sklearn_inside.is_plain_pipeline(estimator):
            return ()
        try:
            candidate = content_of((estimator, parameters, has_metadata))
        except NoContentError:
            # One step without an identity does not keep the others from having one.
            return steps_of(sklearn_inside.with_parameters(estimator, parameters), by_place=has_metadata)
        known = self._candidates.get(candidate)
        if known is None:
            known = steps_of(sklearn_inside.with_parameters(estimator, parameters), by_place=has_metadata)
            self._candidates[candidate] = known
        return known

    def _fold(self, callee: Any, given: Mapping[str, Any]) -> str:
        """Return the identity of the data of a task: what is cut out of what, and what goes to ``fit`` with it."""
        configuration = content_of(sklearn_inside.configuration_of(callee))
        return derived("fold", configuration, *(self._contents.of(given[name]) for name in _OF_FOLD))

    def prefixes_of(self, added: Sequence[TaskSteps | None]) -> Prefixes:
        """Return the prefixes of a batch."""
        return tuple(prefix for steps in added if steps is not None for prefix in steps.prefixes)

    def wrap(self, function: Any, added: Sequence[TaskSteps | None]) -> Any:
        """Return the batch with tasks that share what they have in common; the given one stays as it is."""
        hints = [None if steps is None else self._hint(steps) for steps in added]
        if not any(hints):
            return function
        wrapped = copy.copy(function)
        wrapped.items = [
            item if hint is None else (self._sharing(item[0], hint), *item[1:])
            for item, hint in zip(function.items, hints, strict=True)
        ]
        return wrapped

    def _hint(self, steps: TaskSteps) -> Hint | None:
        # Of a search that is not known to its end, every prefix may come again.
        at_least = 1 if self.ledger.is_complete else 2
        uses = {prefix: max(at_least, self.ledger.n_tasks(prefix)) for prefix in steps.prefixes}
        worth = steps.worth_keeping(uses)
        if not worth:
            return None
        placed = {
            step.path: Place(step.token, step.columns, steps.by_path.get(step.path)) for step in all_steps(steps.steps)
        }
        return Hint(steps.fold, placed, {prefix: max(2, uses[prefix]) for prefix in (*worth, steps.fold)})

    def _sharing(self, callee: Any, hint: Hint) -> Any:
        return sklearn_inside.calling_instead(callee, SharedFit(innermost(callee), hint, self._call))

    # ---- after a batch

    def finish(self, prefixes: Prefixes, results: Sequence[Any]) -> list[Any]:
        """Return the results of a batch as scikit-learn made them; delete what no task needs any more."""
        counted = [result if isinstance(result, Counted) else Counted(result) for result in results]
        held: list[Held] = []
        for one in counted:
            self.counts.add(one.counts)
            held += one.held
        self._shelf.remove(self.ledger.finish(prefixes, held))
        return [one.result for one in counted]

    def give_up(self, prefixes: Prefixes) -> None:
        """Note that a task will never be done; delete what no other needs any more."""
        self._shelf.remove(self.ledger.finish(prefixes, []))

    def figures(self) -> dict[str, Any]:
        """Return what is to be reported, by the names of the report."""
        return {**dataclasses.asdict(self.counts), "nbytes_shared": self.ledger.peak_nbytes}

    def close(self) -> None:
        """Delete everything; idempotent."""
        self._shelf.close()


class _Contents:
    """Identities by object, for objects that many tasks of a call have: each is hashed once."""

    #: How many are remembered: indices of folds, and X and y, which are held as long.
    _MAX_SMALL: Final = 512
    _MAX_LARGE: Final = 8
    _LARGE_NBYTES: Final = 10_000_000

    def __init__(self) -> None:
        # Held, or another object could have the address of one that is gone.
        self._small: OrderedDict[int, tuple[Any, bytes]] = OrderedDict()
        self._large: OrderedDict[int, tuple[Any, bytes]] = OrderedDict()

    def of(self, value: Any) -> bytes:
        is_large = getattr(value, "nbytes", self._LARGE_NBYTES) >= self._LARGE_NBYTES
        known, n_kept = (self._large, self._MAX_LARGE) if is_large else (self._small, self._MAX_SMALL)
        if id(value) not in known:
            known[id(value)] = (value, _content_or_identity(value))
            if len(known) > n_kept:
                known.popitem(last=False)
        known.move_to_end(id(value))
        return known[id(value)][1]


def _content_or_identity(value: Any) -> bytes:
    try:
        return content_of(value)
    except NoContentError:
        # The object itself, which is what it is while the call holds it.
        return f"object {id(value)}".encode()
