"""What runs in Dask workers to have a copy of a buffer on their host. Called by ``spread.py``, in the client.

::

    from the client:  open_copy ── write_part, write_part, ... ── (one worker; each part came by ``Client.scatter``)
    from a worker:    fetch_copy: reads the file on another worker's host, part by part, over the workers' connection

A copy is a file of the store of one worker process, where all workers of its host can map it. It lives as long as the
Dask task that made it is in that worker's memory, which is as long as the client wants it: if the client dies, Dask
itself forgets the task. What the task returns is only where the file is, so it costs the worker's memory nothing, and
it does no harm if Dask writes it to disk.
"""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Hashable
from typing import Any, Final, NamedTuple

import distributed

from ..data.store import Arriving, default_store
from .keeper import KeepCopies

__all__ = ["PART_NBYTES", "Copy", "fetch_copy", "open_copy", "write_part"]

#: Bytes that travel at a time: few enough to be no matter in the memory of a worker or of the scheduler, enough to make
#: the round trip no matter for the time. At 50 ms and 10 Gbit/s a part takes 50 ms to ask for and 13 ms to come.
PART_NBYTES: Final = 1 << 24

#: What the names of folders of a store begin with (``data/store.py``).
_FOLDER_PREFIX: Final = "joblib_backends-"

#: Seconds in which a part must have come from another worker; then that worker, or the way to it, is taken for lost.
_PART_S: Final = 30.0


class Copy(NamedTuple):
    """Where a copy is: in the file ``path``, which the worker at ``address`` keeps."""

    address: str
    path: str


def open_copy(nbytes: int) -> Copy:
    """Make room for a copy of so many bytes. The task whose end is that of the copy."""
    worker = distributed.get_worker()
    arriving = _kept_by(worker)[worker.get_current_task()] = default_store().start(nbytes)
    return Copy(worker.address, arriving.path)


def write_part(key: str, part: Any) -> None:
    """Add bytes to a copy of this worker, by the key of the task that opened it."""
    _kept_by(distributed.get_worker())[key].write(memoryview(part))


def fetch_copy(nbytes: int, address: str, path: str) -> Copy:
    """Make a copy of a file that another worker can read. The task whose end is that of the copy.

    Its arguments are builtins: the scheduler reads them, and has nothing of ours.
    """
    worker = distributed.get_worker()
    arriving = default_store().start(nbytes)
    try:
        for offset in range(0, nbytes, PART_NBYTES):
            arriving.write(
                memoryview(_ask_for_part(worker, Copy(address, path), offset, min(PART_NBYTES, nbytes - offset)))
            )
    except BaseException:
        # Not with the frames of the error, which Dask may keep.
        arriving.drop()
        raise
    _kept_by(worker)[worker.get_current_task()] = arriving
    return Copy(worker.address, arriving.path)


def _kept_by(worker: Any) -> dict[Hashable, Arriving]:
    """Return what is kept for the tasks of a worker (``keeper.py``)."""
    keeper = worker.plugins[KeepCopies.name]
    kept: dict[Hashable, Arriving] = keeper.kept
    return kept


def _ask_for_part(worker: Any, source: Copy, offset: int, nbytes: int) -> Any:
    # The workers' own connections, with their certificates. Not data of Dask's: each process of a host would have it.
    request = {"function": pickle.dumps(_read_part), "args": pickle.dumps((source.path, offset, nbytes))}

    async def ask() -> Any:
        return await worker.rpc(source.address).run(**request)

    answer = distributed.utils.sync(worker.loop, ask, callback_timeout=_PART_S)
    if answer["status"] != "OK":
        raise OSError(f"The worker {source.address} has no such part of {source.path}: {answer['exception']}")
    return answer["result"]


def _read_part(path: str, offset: int, nbytes: int) -> bytes:
    """Return bytes of a file; runs in the event loop of the worker that has it, so it reads and does not map.

    Only of a file of some store, whatever the client takes for one: to open a pipe would hold up the worker for ever.
    """
    if not os.path.basename(os.path.dirname(path)).startswith(_FOLDER_PREFIX):
        raise ValueError(f"{path} is in no folder of a store")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is no file")
        part = os.pread(descriptor, nbytes, offset)
    finally:
        os.close(descriptor)
    if len(part) != nbytes:
        raise EOFError(f"{path} has fewer than {offset + nbytes} bytes")
    return part
