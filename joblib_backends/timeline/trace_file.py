"""The file of ``trace=``: each outermost call of a process is added to it when it ends.

The first call of a process replaces what is there, unless that is the trace of a process that still runs: workers of
pools of the user's own, and scripts that a script starts, have the same ``JOBLIB_BACKEND_TRACE``. Their traces go
beside it, with the number of the process in the name. No file is held open, and none is locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .chrome import BETWEEN, END, START, Tracks
from .model import Timeline

__all__ = ["TraceFile"]


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
        lines = BETWEEN.join(self._tracks.events_of(report, timeline)) + END
        if not self._is_begun:
            self.path.write_text(START + _signature() + BETWEEN + lines, encoding="utf-8")
            self._is_begun = True
            return
        with open(self.path, "r+b") as file:
            file.seek(-len(END), os.SEEK_END)
            file.write((BETWEEN + lines).encode())

    def _is_still_ours(self) -> bool:
        return _writer_of(self.path) == _this_process()


def _own_path(path: Path) -> Path:
    """Return where this process may write: ``path``, or another name if a process that runs is writing there."""
    writer = _writer_of(path)
    if writer is None or writer == _this_process() or not _is_running(writer):
        return path
    return path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _signature() -> str:
    host, pid = _this_process()
    return json.dumps({"ph": "M", "name": "written_by", "pid": 0, "tid": 0, "args": {"host": host, "pid": pid}})


def _writer_of(path: Path) -> tuple[str, int] | None:
    """Return host and number of the process that wrote a trace; None of any other file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(path, encoding="utf-8") as file:
        next(file)
        by = json.loads(next(file, "").rstrip().rstrip(","))["args"]
        return by["host"], by["pid"]
    return None


def _is_running(process: tuple[str, int]) -> bool:
    host, pid = process
    if host != socket.gethostname():
        # A file that hosts have in common: there is no asking.
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True
