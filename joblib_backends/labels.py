"""What batches are called in messages, on Dask's dashboard, and in timelines."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .batches import Batch
from .sharing import sklearn_inside
from .timeline.recorder import BatchRecord
from .worker import Outcome, task_names

__all__ = ["description_of", "label_of", "record_of", "task_name"]

#: Characters of a task's arguments in messages.
_ARGUMENTS_SHOWN: Final = 200


def label_of(batch: Batch) -> tuple[str, str]:
    """Return the name of what a batch runs, with its estimator, and which tasks of the call these are.

    For a search, which candidate and fold. Nothing is shown of other arguments: they may be large, and who looks at
    a cluster need not see them.
    """
    name, items = task_names(batch.function), batch.items
    if not items:
        return name, _places(batch)
    estimator = sklearn_inside.estimator_of(*items[0])
    kind = None if estimator is None else type(estimator).__name__
    of_search = sklearn_inside.description_of(*items[0]) if batch.size == 1 else None
    tasks = _places(batch) if of_search in (None, kind) else f"{_places(batch)}, {of_search}"
    return (name if kind is None else f"{name}-{kind}"), tasks


#: Seconds below which a batch is not told from its neighbours in a timeline: to name it takes longer than to record it.
_WORTH_NAMING_S: Final = 5e-3


def record_of(
    batch: Batch, name: str, outcome: Outcome, received: float, decode_s: float, fault: BaseException | None
) -> BatchRecord:
    """Return what a timeline has of a batch of ``name`` whose outcome came at ``received``.

    A short one has this name, that of the function, and no other.
    """
    spent, payload, plan, detail = outcome.spent, batch.payload, batch.plan, ""
    times: tuple[tuple[float, float], ...] = ()
    loss = "" if fault is None else f"{type(fault).__name__}: {fault}"
    if spent.wall >= _WORTH_NAMING_S or loss:
        name, detail = label_of(batch)
        times = _times_of(outcome.results or ())
    encoded = (0.0, 0.0) if payload is None else payload.encoded
    task, n_tasks, tier = batch.first_task + batch.positions[0], batch.size, "" if plan is None else plan.tier
    return BatchRecord(
        tier, name, detail, task, n_tasks, batch.started, received, spent, encoded, decode_s, times, loss
    )


def _times_of(results: Sequence[Any]) -> tuple[tuple[float, float], ...]:
    found = map(sklearn_inside.times_of, results)
    return tuple(one for one in found if one is not None)


def description_of(batch: Batch) -> str:
    """Return which tasks a batch has, with their arguments if it is a single one, for messages."""
    items = batch.items
    return f"{_places(batch)}{_arguments(*items[0])}" if items and batch.size == 1 else _places(batch)


def task_name(batch: Batch, place: int) -> str:
    """Return what the task at a place in a batch is called, for what it says; all of them for -1."""
    name, items = task_names(batch.function), batch.items
    if not 0 <= place < batch.size:
        return f"{_places(batch)} of {name}"
    of_search = sklearn_inside.description_of(*items[place]) if items else None
    task = f"task {batch.first_task + batch.positions[place]} of {name}"
    return task if of_search is None else f"{task} ({of_search})"


def _places(batch: Batch) -> str:
    first, last = batch.first_task + batch.positions[0], batch.first_task + batch.positions[-1]
    return f"tasks {first} to {last}" if batch.size > 1 else f"task {first}"


def _arguments(callee: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return what tells a task from others of its call."""
    of_search = sklearn_inside.description_of(callee, args, kwargs)
    if of_search is not None:
        return f" ({of_search})"
    shown = [*map(reprlib.repr, args), *(f"{name}={reprlib.repr(value)}" for name, value in kwargs.items())]
    text = ", ".join(shown)
    return f" ({text[:_ARGUMENTS_SHOWN]}{'...' if len(text) > _ARGUMENTS_SHOWN else ''})"
