"""What becomes of a batch that was lost: with its worker, its data, its cluster, or its time.

Rules only: nothing here runs, waits or locks. ::

    a worker died      several tasks      -> each runs by itself, so that the one that kills is found
                       one task           -> again; for the last time when nothing else of the call runs (memory!)
                       more than retries  -> given up
    its data is gone                      -> placed again from the source, and run again
    its cluster is gone                   -> on the local tiers, unless fallback=False
    it took longer than task_timeout      -> given up

Given up means: a search with a numeric ``error_score`` gets that score; any other call ends with an error that names
the task, when everything else of it is done.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, Final, Literal

from .batches import Batch
from .config import Config
from .data.codec import describe
from .errors import (
    ClusterLostError,
    ClusterUnavailableError,
    DataLostError,
    HybridError,
    RecoveryWarning,
    TaskTimeoutError,
    WorkerLostError,
)
from .labels import description_of
from .sharing import sklearn_inside

__all__ = ["FAULTS", "Step", "failed_results", "failure_of", "is_fault", "next_step", "pieces_of", "warn"]

_log = logging.getLogger(__name__)

#: What a tier raises for a batch that was lost, and not for what its tasks did.
FAULTS: Final = (WorkerLostError, TaskTimeoutError, DataLostError, ClusterLostError, ClusterUnavailableError)

Step = Literal["run again", "place again", "leave the cluster", "give up", "fail"]


def is_fault(error: BaseException | None) -> bool:
    """Return whether a batch that ended so was lost, rather than failed by what it does."""
    return isinstance(error, FAULTS)


def next_step(batch: Batch, fault: BaseException, config: Config) -> Step:
    """Return what is to be done about a batch that was lost, and count the loss on it."""
    if isinstance(fault, ClusterLostError | ClusterUnavailableError):
        return "leave the cluster" if config.fallback else "fail"
    if isinstance(fault, DataLostError):
        batch.n_replaced += 1
        return "place again" if batch.n_replaced <= max(1, config.retries) else "fail"
    if isinstance(fault, TaskTimeoutError):
        return "give up"
    batch.n_tried += 1
    n_deaths = fault.n_deaths if isinstance(fault, WorkerLostError) else 1
    if not n_deaths:
        return "fail"
    # A Dask scheduler has let several workers die over it, but it may have been in bad company: it gets a last try.
    batch.n_lost = batch.n_lost + 1 if batch.n_lost >= config.retries else min(batch.n_lost + n_deaths, config.retries)
    # Which of several tasks it was is found by running each by itself, however few tries there are.
    return "run again" if batch.size > 1 or batch.n_lost <= config.retries else "give up"


def pieces_of(batch: Batch, config: Config) -> list[Batch]:
    """Return what is to run in the place of a batch that lost its worker: its tasks one by one, or itself."""
    if batch.size > 1:
        # Not alone, or a large batch would run one by one: the worker that a task kills is now its own.
        return batch.split([[place] for place in range(batch.size)])
    batch.is_alone = batch.n_lost >= config.retries
    return [batch]


def failure_of(batch: Batch, fault: BaseException, config: Config) -> BaseException:
    """Return the error that names the task, for a batch that was given up."""
    items = batch.items
    name = describe(items[0][0]) if items else describe(batch.function)
    what = f"{name}, {description_of(batch)}"
    failure: HybridError
    if isinstance(fault, WorkerLostError) and fault.n_deaths:
        memory = f" It had used {fault.peak_nbytes / 1e6:.0f} MB." if fault.peak_nbytes else ""
        failure = WorkerLostError(
            f"Each worker that ran {what}, died: {fault.how}.{memory} The task itself ends its process, crashes in "
            "compiled code or needs more memory than there is: run it alone to see, or use fewer jobs. It was tried "
            f"{batch.n_tried} times (retries={config.retries}){', the last time alone' if batch.is_alone else ''}.",
            exit_code=fault.exit_code,
            peak_nbytes=fault.peak_nbytes,
            n_deaths=batch.n_lost,
            how=fault.how,
        )
    elif isinstance(fault, TaskTimeoutError):
        is_thread = batch.tier is not None and batch.tier.shares_memory
        end = "its thread was left to itself" if is_thread else "its worker was replaced"
        failure = TaskTimeoutError(
            f"{what}, ran longer than task_timeout={config.task_timeout:g} seconds, and {end}. Give it more time, or "
            "less to do."
        )
    elif isinstance(fault, DataLostError):
        failure = DataLostError.like(fault)
    else:
        return fault
    failure.__cause__ = fault
    return failure


def failed_results(batch: Batch, failure: BaseException) -> list[Any] | None:
    """Return the results of tasks of a search that were given up, with their ``error_score``; None if that raises."""
    results = []
    for callee, args, kwargs in batch.items:
        result = sklearn_inside.failed_result(callee, args, kwargs, failure)
        if result is None:
            return None
        results.append(result)
    return results or None


def warn(message: str, category: type[RecoveryWarning] = RecoveryWarning) -> None:
    """Tell the user what was lost and what is done about it."""
    _log.debug(message)
    warnings.warn(message, category, stacklevel=2)
