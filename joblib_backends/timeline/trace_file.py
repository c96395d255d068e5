"""The file of ``trace=``: each outermost call of a process is added to it when it ends.

The first call of a process replaces the trace that is there, unless that is of a process that still runs: workers of
pools of the user's own, and scripts that a script starts, have the same ``JOBLIB_BACKEND_TRACE``. Their traces go
beside it, with host and number of the process in the name. No file is held open, and none is locked.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from .chrome import BETWEEN, END, START, Tracks
from .model import Timeline

__all__ = ["TraceFile"]

#: Bytes at the beginning of a file that tell what it is.
_HEAD_NBYTES: Final = 4_096


class TraceFile:
    """A trace that this process writes. Thread-safe."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _known: ClassVar[dict[tuple[int, Path], TraceFile]] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tracks = Tracks()
        self._is_begun = False

    @classmethod
    def add(cls, path: str | os.PathLike[str], report: Mapping[str, Any], timeline: Timeline) -> Path:
        """Add a call to the trace at ``path``, and return where it was written.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        wanted = Path(path).absolute()
        with cls._lock:
            # A forked child has its parent's table.
            trace = cls._known.get((os.getpid(), wanted))
            if trace is None:
                trace = cls._known[os.getpid(), wanted] = cls(_own_path(wanted))
            trace._write(report, timeline)
            return trace.path

    def _write(self, report: Mapping[str, Any], timeline: Timeline) -> None:
        if self._is_begun and not self._is_still_ours():
            self._tracks, self._is_begun = Tracks(), False
            self.path = _own_path(self.path)
        # What is introduced in this call is so only if the call comes to be in the file.
        tracks = copy.deepcopy(self._tracks)
        lines = BETWEEN.join(tracks.events_of(report, timeline)) + END
        if self._is_begun:
            _append(self.path, lines)
        else:
            _check_may_be_replaced(self.path)
            self.path.write_text(START + _signature() + BETWEEN + lines, encoding="utf-8", newline="\n")
        self._tracks, self._is_begun = tracks, True

    def _is_still_ours(self) -> bool:
        return _writer_of(self.path) == _this_process()


def _own_path(path: Path) -> Path:
    """Return where this process may write: ``path``, or another name if a process that runs is writing there."""
    writer = _writer_of(path)
    if writer is None or writer == _this_process() or not _is_running(writer):
        return path
    return path.with_name(f"{path.stem}-{socket.gethostname()}-{os.getpid()}{path.suffix}")


def _append(path: Path, lines: str) -> None:
    """Put ``lines`` in the place of the end of a trace; if there is no room for them, leave it as it was."""
    with open(path, "r+b") as file:
        at = file.seek(-len(END), os.SEEK_END)
        try:
            file.write((BETWEEN + lines).encode())
            file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                file.seek(at)
                file.truncate()
                file.write(END.encode())
            raise


def _check_may_be_replaced(path: Path) -> None:
    """Raise an OSError where there is something else than a trace: a device, or what may be precious to its owner."""
    if not path.exists():
        return
    if not path.is_file():
        raise OSError(errno.EINVAL, "It is no regular file", str(path))
    head = _head_of(path)
    if head and "joblib calls" not in head and '"written_by"' not in head:
        raise OSError(
            errno.EEXIST, "There is a file that is no trace of joblib_backends; it is left as it is", str(path)
        )


def _head_of(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(_HEAD_NBYTES).decode(errors="replace")


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _signature() -> str:
    host, pid = _this_process()
    return json.dumps({"ph": "M", "name": "written_by", "pid": 0, "tid": 0, "args": {"host": host, "pid": pid}})


def _writer_of(path: Path) -> tuple[str, int] | None:
    """Return host and number of the process that wrote a trace; None of any other file."""
    # A device may have no end, and a pipe no beginning.
    if not path.is_file():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        by = json.loads(_head_of(path).splitlines()[1].rstrip(","))["args"]
        return by["host"], by["pid"]
    return None


def _is_running(process: tuple[str, int]) -> bool:
    host, pid = process
    if host != socket.gethostname() or sys.platform == "win32":
        # A file that hosts have in common: there is no asking. On Windows, signal 0 is Ctrl-C.
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _forget_in_child() -> None:
    # Another thread may have been writing.
    TraceFile._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
