"""Batches on their way to a Dask cluster and back.

::

    DaskTier ──put──> outbox ──> sender thread:     Client.map of all that waits, to where its data is
                      flight     what is on the cluster; how each batch ends
    future done <─────────────── collector thread:  fetches all that is done; looks after the rest

Nothing of ours runs on the client's event loop but what puts something into a queue. A batch travels as opaque bytes,
which the scheduler never unpickles. Buffers travel by the path of the resident's file: workers on this machine map it,
and on any other host there is a copy (``places.py``) before a batch that needs it goes there. Until then it goes to
the workers that have the data, or waits.

Invariant: every batch that was put ends its future, whatever becomes of it on the cluster: result, error, cancelled,
lost with its workers, too late, or cut off with the whole cluster.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from typing import Any

from .client import close
from .collector import Collector
from .flight import CHANGED, Flight
from .outfit import Outfit
from .placement import Placement
from .places import Places
from .sender import Sender

__all__ = ["Exchange"]


class Exchange:
    """The two threads of a connection.

    Parameters
    ----------
    client : distributed.Client
        The client.
    outbox : queue
        What is to be sent: tickets, cancellations, None to end.
    remote_objects : dict
        Dask futures of objects that are on the cluster already, by key.
    outfit : Outfit
        What gives the package to workers.
    wait_s : float
        Seconds for which a cluster may be without a worker.
    placement : Placement
        What is asked of the workers.
    owns_client : bool
        Whether the client ends with the exchange.
    """

    def __init__(
        self,
        client: Any,
        outbox: queue.SimpleQueue[Any],
        remote_objects: dict[str, Any],
        outfit: Outfit,
        wait_s: float,
        placement: Placement,
        *,
        owns_client: bool = False,
    ) -> None:
        self._client = client
        self._owns_client = owns_client
        self._flight = Flight(client, outbox, placement, wait_s)
        places = Places(client, functools.partial(outbox.put, CHANGED))
        self._sender = Sender(self._flight, places, outfit, remote_objects, placement.options, self._end)
        self._collector = Collector(self._flight, places, outfit, self._sender)

    def start(self) -> None:
        """Start the threads; they end with the None that is put into the outbox."""
        for name, body in (("sender", self._sender.run), ("collector", self._collector.run)):
            threading.Thread(target=body, name=f"joblib_backends-dask-{name}", daemon=True).start()

    def _end(self) -> None:
        """End what is left. Called at the end of the sender."""
        self._flight.relay.close()
        self._collector.stop()
        if self._owns_client:
            # Here and not in a finalizer, which may run in any thread, the client's own event loop too.
            with contextlib.suppress(Exception):
                close(self._client)
