"""What a Dask task of ours runs on its worker: one batch."""

from __future__ import annotations

import pickle
from typing import Any

import distributed

from ..remote import run_remotely
from .outer_task import inside_batch
from .outlet import relaying

__all__ = ["run_batch"]


def run_batch(
    *,
    wire: bytes,
    n_slots: int,
    watched: str | None,
    remote_objects: Any,
    origin: str,
    place: str,
    topic: str,
    relay_topic: str | None,
) -> Any:
    """Run a batch; say first that it starts, if its time is limited.

    Parameters
    ----------
    wire : bytes
        The pickle of the encoded batch.
    n_slots : int
        Slots of the cluster that calls in it may use.
    watched : str or None
        The key under which to say that it starts.
    remote_objects, origin, place
        See :func:`joblib_backends.remote.run_remotely`.
    topic, relay_topic : str
        Where the client hears that it starts, and what scikit-learn's callbacks say.
    """
    worker = distributed.get_worker()
    if watched is not None:
        worker.log_event(topic, (watched, worker.address))
    with relaying(worker, relay_topic), inside_batch(worker, n_slots):
        return run_remotely(pickle.loads(wire), remote_objects, origin, place, worker.address)
