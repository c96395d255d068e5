"""What a batch's future ends with: the result or error that a worker sent, the loss of the worker, or its time."""

from __future__ import annotations

import pickle
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from ..errors import RemoteTraceback, TaskTimeoutError, WorkerLostError
from . import frames
from .calls import Batch
from .process import End

__all__ = ["Completions", "complete", "load", "lost", "overdue"]

#: Futures to complete when no lock is held any more: (future, result, error).
Completions = list[tuple["Future[Any]", Any, "BaseException | None"]]


def complete(completions: Completions) -> None:
    """Complete the futures. Their callbacks run here, and may submit."""
    for future, result, error in completions:
        with suppress(InvalidStateError):
            future.set_result(result) if error is None else future.set_exception(error)


def load(kind: bytes, body: bytes | bytearray) -> tuple[Any, BaseException | None]:
    """Return the result and the error that a frame brings."""
    try:
        loaded = pickle.loads(body)
    except Exception as problem:
        return None, problem
    if kind != frames.ERROR:
        return loaded, None
    error, text = loaded
    error.__cause__ = RemoteTraceback(text)
    return None, error


def lost(batches: list[Batch], end: End, cause: BaseException | None = None, *, n_deaths: int = 0) -> Completions:
    """Return the ends of batches whose worker is gone: ``n_deaths`` died over them, or none could be had."""
    completions: Completions = []
    for batch in batches:
        what = "A worker process died while it ran" if n_deaths else "No worker process could be had for"
        error = WorkerLostError(
            f"{what} a batch of {batch.name}: {end.how}. Was it killed, is memory or the number of processes limited, "
            "or did compiled code crash? Use fewer jobs if memory is short; the next call has new workers.",
            exit_code=end.code,
            peak_nbytes=end.peak_nbytes,
            n_deaths=n_deaths,
            how=end.how,
        )
        error.__cause__ = cause
        completions.append((batch.future, None, error))
    return completions


def overdue(batches: list[Batch]) -> Completions:
    """Return the ends of batches that ran for too long."""
    return [
        (
            batch.future,
            None,
            TaskTimeoutError(
                f"A batch of {batch.name} ran longer than task_timeout={batch.timeout_s:g} seconds, and its worker was "
                "replaced. Give it more time, or less to do."
            ),
        )
        for batch in batches
    ]
