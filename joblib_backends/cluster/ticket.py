"""A batch on its way to a Dask cluster and back, as both threads of an exchange hold it."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

from ..data.codec import Payload, Wire
from ..worker import PackedOutcome
from .outer_task import OuterTask

__all__ = ["Cancel", "Ticket"]


#: Characters of what a key says of tasks.
_TASKS_SHOWN: Final = 120


class Ticket(Future[PackedOutcome]):
    """A batch on its way: done when its outcome is here.

    Parameters
    ----------
    name : str
        What it runs, for messages.
    label : tuple of str
        What it is called on Dask's dashboard: function and estimator, and which tasks of the call.
    wire : tuple
        What travels.
    payload : Payload
        What keeps alive what it refers to.
    timeout_s : float, optional
        Seconds that it may run on a worker.
    n_slots : int, default=1
        Slots of the cluster that calls in it may use.
    outer_task : OuterTask, optional
        The Dask task whose call it belongs to.
    """

    def __init__(
        self,
        name: str,
        label: tuple[str, str],
        wire: Wire,
        payload: Payload,
        timeout_s: float | None = None,
        n_slots: int = 1,
        outer_task: OuterTask | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.wire = wire
        self.payload = payload
        self.timeout_s = timeout_s
        self.n_slots = n_slots
        self.outer_task = outer_task
        self.n_resent = 0
        self.dask_future: Any = None
        #: Where it may run; None for everywhere.
        self.workers: frozenset[str] | None = None
        #: Whether it is on the cluster, and does not wait for its data to be there.
        self.is_sent = False
        #: When a worker was seen to start it, and which.
        self.started: tuple[float, str] | None = None
        # Dask groups tasks by all words up to the first that are letters only: by function and estimator.
        function, tasks = label
        shown = tasks[:_TASKS_SHOWN].encode(errors="replace").decode()
        self._key = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', function)}-{shown}-{uuid.uuid4().hex}"

    @property
    def key(self) -> str:
        """The key of the task on the cluster; another one each time that it is sent."""
        return f"{self._key}-{self.n_resent}" if self.n_resent else self._key

    def is_overdue(self, now: float) -> bool:
        """Return whether it has been running for too long."""
        return self.started is not None and self.timeout_s is not None and self.started[0] + self.timeout_s <= now

    def reset(self) -> None:
        """Make it ready to be sent once more."""
        self.n_resent += 1
        self.dask_future, self.started, self.is_sent = None, None, False

    def end(self, outcome: PackedOutcome | None, error: BaseException | None = None) -> None:
        """Complete the future, unless the call was aborted meanwhile."""
        self.dask_future = None
        with contextlib.suppress(Exception):  # InvalidStateError: cancelled
            if error is not None:
                self.set_exception(error)
            elif outcome is not None:
                self.set_result(outcome)


class Cancel(NamedTuple):
    """Asks the sender to cancel Dask tasks: those of an aborted call, and others by their futures."""

    tickets: list[Ticket]
    futures: Sequence[Any] = ()
