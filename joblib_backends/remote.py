"""What runs in a worker that may be on another host: get at the data of a batch, then run it as any worker does.

A payload names the files of its residents. Here they are mapped where they can be read, or where the parent has said
that this host has copies; else the worker answers with what is missing. It knows no cluster software: tiers hand it
over.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from .data.codec import Wire, files_of, moved_files, resolving
from .data.files import comparing_files
from .data.scope import ResidentScope
from .data.store import default_store
from .worker import PackedOutcome, run_payload

__all__ = ["Missing", "can_read", "note_copies", "place_of_this_process", "process_identity", "run_remotely"]

#: Copies of other hosts' files that a worker process remembers; each is a name.
_MOST_COPIES: Final = 10_000

#: Where this host has the files of other hosts, by their paths there.
_copies: Final[dict[str, str]] = {}


class Missing(NamedTuple):
    """A worker's answer when it cannot read some files; the batch did not run."""

    #: Who answers.
    worker: str
    #: The files, and for each the copy that this host once had.
    paths: dict[str, str | None]


def run_remotely(
    wire: Wire, remote_objects: Mapping[str, Any], origin: str, place: str, worker: str = ""
) -> PackedOutcome | Missing:
    """Run a batch in a worker's thread.

    Parameters
    ----------
    wire : tuple
        The encoded batch.
    remote_objects : mapping
        What a :class:`~joblib_backends.data.codec.RemoteReference` of the batch stands for, by key.
    origin : str
        The :func:`process_identity` of the parent: in a worker that is a thread of it, thread limits are put back.
    place : str
        The :func:`place_of_this_process` of the parent: elsewhere, the user's files may be others.
    worker : str
        What the parent calls this worker.
    """
    files = files_of(wire)
    moved = {path: _copies[path] for path in files if path in _copies}
    missing = {path: moved.get(path) for path in files if not can_read(moved.get(path, path))}
    if missing:
        for path in missing:
            _copies.pop(path, None)
        return Missing(worker, missing)
    is_far = place_of_this_process() != place
    with resolving(remote_objects, _WorkerScope.get()), comparing_files() if is_far else contextlib.nullcontext():
        owns_process = process_identity() != origin
        return run_payload(moved_files(wire, moved), owns_process=owns_process, is_alone=False)


def can_read(path: str) -> bool:
    """Return whether this process may read a file."""
    return os.access(path, os.R_OK)


def note_copies(copies: Mapping[str, str]) -> None:
    """Note where this host has copies of other hosts' files, by their paths there."""
    _copies.update(copies)
    while len(_copies) > _MOST_COPIES:
        # The oldest; if it is used yet, the parent will say again where it is.
        with contextlib.suppress(StopIteration, KeyError, RuntimeError):
            del _copies[next(iter(_copies))]


@functools.lru_cache(maxsize=1)
def place_of_this_process() -> str:
    """Return what names the place of this process' files: the same in all processes that find each other's there.

    That is a mounted file system, which has one number in all containers of a kernel, and a user, who alone may read.
    Processes that see other mounts may share ``/dev/shm`` and still have another ``/tmp``.
    """
    user = str(getattr(os, "getuid", int)())
    return "|".join([_kernel(), _mounts(), user, *map(_file_system, ("/dev/shm", _temp_folder()))])


def _kernel() -> str:
    with contextlib.suppress(OSError):
        # Another number each time that it starts.
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _mounts() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/mnt")
    return ""


def _file_system(folder: str) -> str:
    with contextlib.suppress(OSError):
        status = os.stat(folder)
        return f"{folder}:{status.st_dev}:{status.st_ino}"
    return f"{folder}:none"


def _temp_folder() -> str:
    # Where both have shared memory, it does not matter that each has its own folder for temporary files.
    return "" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def process_identity() -> str:
    """Return what tells this process from every other of a cluster."""
    return f"{socket.gethostname()}:{os.getpid()}"


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
