"""The process of a local cluster: ``local.py`` starts it, and it ends when standard input does.

Its parent may be killed at any moment. Then the other end of standard input closes, too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from typing import Any, Final

import dask.config
import distributed
import psutil

from ..data.store import default_store, sweep_places

__all__ = ["main"]

#: Seconds for workers to end by themselves; it takes half of one when they are idle.
_GRACE_S: Final = 2.0

#: Seconds until this process ends, whatever has become of the rest; workers of a process that is gone end at once.
_END_S: Final = 15.0


def main(order: dict[str, Any]) -> None:
    """Start a cluster, tell the parent its address, and end it when the parent lets go of it, or is gone."""
    is_over = threading.Event()
    threading.Thread(target=_wait_for_end, args=(is_over,), name="joblib_backends-lifeline", daemon=True).start()
    with os.fdopen(order["reply"], "w") as reply:
        try:
            cluster = _start(order["n_workers"])
        except Exception as error:
            reply.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            return
        reply.write(json.dumps({"address": cluster.scheduler_address}) + "\n")
    is_over.wait()
    _close(cluster)


def _wait_for_end(is_over: threading.Event) -> None:
    """Wait for the end of standard input. The body of a thread: the cluster may still be starting, or never start."""
    sys.stdin.read()
    is_over.set()
    time.sleep(_END_S)
    os._exit(1)


def _close(cluster: Any) -> None:
    """End the cluster, delete all files, and end this process."""
    with contextlib.suppress(Exception):
        cluster.close(timeout=_GRACE_S)
    # A worker waits for the tasks that it runs; nobody else does any more.
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_END_S)
    default_store().close()
    # What workers had, and a parent that was killed: nobody else would, before the next one starts.
    sweep_places()
    # Dask's own hook would wait ten seconds for what was killed.
    os._exit(0)


def _start(n_workers: int) -> Any:
    # Forks of a server that has imported distributed: a second for each worker less. What scheduler and workers write
    # goes to a folder of ours, which is swept also if this process is killed.
    folder = default_store().make_folders()[-1]
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver", "temporary-directory": folder})
    return distributed.LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=n_workers,
        threads_per_worker=1,
        host="127.0.0.1",
        # What is lost, the parent says. Workers complain of a scheduler that has gone a moment before them.
        silence_logs=logging.CRITICAL,
        dashboard_address=None,
        # Without a dashboard, there is a server for its numbers all the same: at any port, and here only.
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
        # Data is mapped by all of them, and would count for each. This backend watches the memory of the machine.
        memory_limit=0,
    )
