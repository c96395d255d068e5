"""What Dask says of tasks that failed, in our words; and the end of a worker whose task runs too long."""

from __future__ import annotations

import logging
import time
from concurrent.futures import CancelledError
from typing import Any, Final

import distributed

from ..errors import TaskLoadError, WorkerLostError
from . import abroad
from .travel import FromSource

__all__ = ["failure_of", "replace_worker"]

_log = logging.getLogger(__name__)

#: Seconds that the restart of a worker may take whose task ran too long.
_RESTART_S: Final = 30.0

#: Looks for a cancelled task, and seconds between two of them.
_LOOKS: Final = 500
_LOOK_S: Final = 0.01


def replace_worker(client: Any, future: Any, address: str, n_stuck: int) -> None:
    """Cancel a task and restart the worker that runs it, which nothing else can end.

    Without a nanny nobody restarts it: it is left alone until such tasks have all its threads. Then it is taken out of
    the cluster, or what is queued there would wait for ever.
    """
    try:
        # First, or the scheduler would run it anew elsewhere, unwatched.
        client.cancel([future])
        _wait_until_cancelled(client, future.key, address)
        # Not scheduler_info(), which answers with what the last of several questions was about.
        worker = client.sync(client.scheduler.identity)["workers"][address]
        if worker.get("nanny"):
            client.restart_workers([address], timeout=_RESTART_S, raise_for_error=False)
        elif n_stuck >= worker["nthreads"]:
            client.run_on_scheduler(FromSource(abroad.remove_worker), address=address)
    except Exception as error:  # the cluster or the worker is gone meanwhile
        _log.debug("The worker %s with a task that ran too long was not restarted: %s", address, error)


def _wait_until_cancelled(client: Any, key: str, address: str) -> None:
    """Return when the scheduler has taken a task from its worker, or after some seconds.

    What is done to the worker goes another way than the cancellation, and overtakes it.
    """
    for _ in range(_LOOKS):
        if key not in client.processing(workers=[address]).get(address, ()):
            return
        time.sleep(_LOOK_S)


def failure_of(future: Any) -> BaseException | None:
    """Return our error for a Dask task that failed, or None if it did not."""
    if future.status != "error":
        return None
    error = future.exception()
    failure: BaseException = error
    if isinstance(error, distributed.KilledWorker):
        n_deaths = int(getattr(error, "allowed_failures", 0)) + 1
        failure = WorkerLostError(
            f"Dask workers died while they had the batch {future.key}: the last of {n_deaths} was "
            f"{getattr(error.last_worker, 'address', error.last_worker)}. Did they run out of memory?",
            n_deaths=n_deaths,
            how=f"Dask lost {n_deaths} workers over it",
        )
    elif not isinstance(error, CancelledError):
        # Our function packs what tasks raise, so this came from Dask: mostly a worker that cannot import our package.
        failure = TaskLoadError(
            f"A Dask worker could not run the batch {future.key}: {type(error).__name__}: {error}. "
            "If it is an import that fails: has the worker Python 3.11 or newer, with joblib and numpy as here?"
        )
    failure.__cause__ = error
    return failure
