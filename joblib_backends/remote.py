"""What runs in a worker that may be on another host: get at the data of a batch, then run it as any worker does.

A payload names the files of its residents. Here they are mapped where they can be read; where not, the worker answers
with what is missing, and the bytes come along with the next try. It knows no cluster software: tiers hand it over.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from .data.arrays import address_of
from .data.codec import Wire, missing_files, moved_files, resolving
from .data.scope import ResidentScope
from .data.store import Resident, default_store
from .worker import PackedOutcome, run_payload

__all__ = ["Missing", "process_identity", "run_remotely"]


class Missing(NamedTuple):
    """A worker's answer when it cannot read some files; the batch did not run."""

    paths: list[str]


def run_remotely(
    wire: Wire, data: Mapping[str, tuple[bytes, Any]], remote_objects: Mapping[str, Any], origin: str
) -> PackedOutcome | Missing:
    """Run a batch in a worker's thread.

    Parameters
    ----------
    wire : tuple
        The encoded batch.
    data : mapping
        The content of files that the worker may not have, by path: (digest, flat array of bytes).
    remote_objects : mapping
        What a :class:`~joblib_backends.data.codec.RemoteReference` of the batch stands for, by key.
    origin : str
        The :func:`process_identity` of the parent: in a worker that is a thread of it, thread limits are put back.
    """
    if data:
        wire = moved_files(wire, {path: _local_resident(*item).ref() for path, item in data.items()})
    missing = missing_files(wire)
    if missing:
        return Missing(missing)
    with resolving(remote_objects, _WorkerScope.get()):
        return run_payload(wire, owns_process=process_identity() != origin)


def process_identity() -> str:
    """Return what tells this process from every other of a cluster."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _local_resident(digest: bytes, content: Any) -> Resident:
    """Return the resident for bytes that came with the batch, written once per process and gone with those bytes."""
    scope = _WorkerScope.get()
    resident = scope.store.find(digest, content.nbytes)
    if resident is None:
        resident = scope.store.put(memoryview(content), digest)
    scope.hold(resident, address_of(content), content)
    return resident


class _WorkerScope:
    """The residents of this worker process, made on first use."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _scope: ClassVar[ResidentScope | None] = None

    @classmethod
    def get(cls) -> ResidentScope:
        """Return the scope. A file goes with the bytes it came from, which the client keeps for as long as it needs."""
        with cls._lock:
            if cls._scope is None:
                cls._scope = ResidentScope(default_store(), outlives_calls=False)
            return cls._scope
