"""Files of the user's, by which memmaps travel: whether what a worker finds by a name is the file that was meant."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from ..errors import DataLostError

__all__ = ["Fingerprint", "check_file", "comparing_files"]

_compares: ContextVar[bool] = ContextVar("compares", default=False)


class Fingerprint(NamedTuple):
    """What a file has in common with itself, seen from another host.

    A file that tasks write to has its number in the file system for that, which differs from host to host on a few
    network file systems; any other has the time of its last change.
    """

    nbytes: int
    is_written: bool
    mark: int

    @classmethod
    def of(cls, path: str, *, is_written: bool) -> Fingerprint:
        """Return the fingerprint of a file."""
        status = os.stat(path)
        return cls(status.st_size, is_written, status.st_ino if is_written else status.st_mtime_ns)


@contextmanager
def comparing_files() -> Iterator[None]:
    """Have files compared in this thread and this block: it runs what another host has sent."""
    token = _compares.set(True)
    try:
        yield
    finally:
        _compares.reset(token)


def check_file(path: str, expected: Fingerprint) -> None:
    """Refuse a file that is not the one that was sent by its name.

    Raises
    ------
    DataLostError
        If there is none, or another one; its content can be sent instead.
    OSError
        The same, if tasks write to it.
    """
    if not _compares.get():
        return  # the same machine: whoever changes the file there means it
    problem = ""
    try:
        if Fingerprint.of(path, is_written=expected.is_written) != tuple(expected):
            problem = "is another one on this host"
    except OSError:
        problem = "is not on this host"
    if problem and expected.is_written:
        # Its content alone would be no use: what tasks write must come to the caller's file.
        what = f"The file of a memmap that tasks may write to {problem}; give the workers its folder"
        raise OSError(errno.ESTALE, what, path)
    if problem:
        raise DataLostError(errno.ESTALE, f"The file of a memmap {problem}", path)
