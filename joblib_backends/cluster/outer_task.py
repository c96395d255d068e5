"""The Dask task in which a call is made: its thread is a worker's, and its worker leads to the rest of the cluster.

A task that waits for other tasks must not hold what they may need. Before its thread waits, it leaves its slot
(Dask's ``secede``), which another task then has; when its call is over it comes back (``rejoin``) as soon as a slot is
free. So no more tasks compute than there are slots, at any depth, but for two: a call that fails does not wait for a
slot to say so, and what the thread does between its results (the loop over a generator) it does without one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

import distributed
from distributed.threadpoolexecutor import thread_state as pool_state

__all__ = ["OuterTask", "inside_batch", "of_this_thread"]

#: States of a task, on its worker, whose result somebody waits for. "resumed": it was given up, and then it was not.
_WANTED: Final = frozenset({"executing", "long-running", "resumed"})

#: States of a worker that starts nothing any more: there, no slot becomes free for who waits for one.
_ENDING: Final = frozenset({distributed.Status.closing, distributed.Status.closed, distributed.Status.failed})


class OuterTask:
    """The Dask task that runs in this thread.

    Parameters
    ----------
    worker : distributed.Worker
        The worker that runs it.
    n_slots : int, optional
        Slots of the cluster that a call in it may use, its own included; None in a task that is none of our batches.

    Notes
    -----
    Any thread may look at it. Only the task's own thread leaves the slot and comes back; in others that does nothing.
    """

    def __init__(self, worker: Any, n_slots: int | None = None) -> None:
        self.n_slots = n_slots
        self._worker = worker
        self._key = worker.get_current_task()
        self._thread = threading.get_ident()

    def __repr__(self) -> str:
        return f"<OuterTask {self._key}, {self.n_slots} slots>"

    @property
    def worker_id(self) -> str:
        """What tells the worker from all others."""
        return str(self._worker.id)

    def make_client(self, timeout_s: float) -> Any:
        """Return a new client of the worker's scheduler.

        Not the one that Dask makes for who asks: it is the default of the whole process from then on, and whoever calls
        joblib in a task of his own would find it.

        Raises
        ------
        OSError, TimeoutError
            If the scheduler does not answer within ``timeout_s`` seconds.
        """
        worker = self._worker
        return distributed.Client(  # type: ignore[no-untyped-call]
            worker.scheduler,
            loop=worker.loop,
            security=worker.security,
            set_as_default=False,
            asynchronous=False,
            direct_to_workers=True,
            timeout=timeout_s,
        )

    def is_wanted(self) -> bool:
        """Return whether the result of the task is still wanted; who has given it up wants nothing of its calls."""
        task = self._worker.state.tasks.get(self._key)
        return task is not None and task.state in _WANTED

    def keep(self, connection: object) -> None:
        """Keep the connection of a call for those of later tasks, until the worker ends."""
        kept = self._worker.plugins.get(_KeepConnection.name)
        if kept is None or kept.connection is not connection:
            plugin = _KeepConnection(connection)
            # In its event loop, which alone may add a plugin.
            self._worker.loop.add_callback(self._worker.plugin_add, plugin=plugin, name=plugin.name)

    def lending(self, n_slots: int) -> contextlib.AbstractContextManager[None]:
        """Let calls of this thread, inside of the block, use fewer slots: others are in use by tasks beside them."""
        return _being_in(OuterTask(self._worker, n_slots))

    def leave_slot(self) -> None:
        """Let another task run in the place of this one, whose thread is going to wait."""
        # Not if the user's code has left before: coming back is its own affair, too.
        if self._is_here() and pool_state.proceed:
            distributed.secede()  # type: ignore[no-untyped-call]
            _of_thread.has_left = True

    def take_slot(self) -> None:
        """Come back: wait until a thread of the worker is done with its task, or leaves its slot in turn."""
        has_left = self._is_here() and getattr(_of_thread, "has_left", False)
        # Who is back already would wait for himself, in a worker of one thread.
        if has_left and not pool_state.proceed and self._worker.status not in _ENDING:
            distributed.rejoin()  # type: ignore[no-untyped-call]
            _of_thread.has_left = False

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread and hasattr(pool_state, "proceed")


class _KeepConnection(distributed.WorkerPlugin):
    """Keeps a connection until the worker ends, and no longer: Dask itself keeps the worker in caches."""

    name = "joblib_backends-connection"

    def __init__(self, connection: object) -> None:
        self.connection: object = connection

    def teardown(self, worker: Any) -> None:
        """Let go of it."""
        self.connection = None


#: Of a worker's thread: the task that it runs, and whether that has left its slot for a call.
_of_thread = threading.local()


def inside_batch(worker: Any, n_slots: int) -> contextlib.AbstractContextManager[None]:
    """Let calls of this thread, inside of the block, know that they are in a batch that may use so many slots."""
    return _being_in(OuterTask(worker, n_slots))


@contextlib.contextmanager
def _being_in(task: OuterTask) -> Iterator[None]:
    outer = getattr(_of_thread, "task", None)
    _of_thread.task = task
    try:
        yield
    finally:
        _of_thread.task = outer


def of_this_thread() -> OuterTask | None:
    """Return the Dask task that runs in this thread, or None."""
    task: OuterTask | None = getattr(_of_thread, "task", None)
    if task is None and hasattr(pool_state, "proceed"):
        # A task of the user's own. A method of an actor is none, and has a thread that no task may need.
        with contextlib.suppress(ValueError, AttributeError):
            worker = distributed.get_worker()
            return OuterTask(worker) if worker.get_current_task() in worker.state.tasks else None
    return task
