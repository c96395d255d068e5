"""What runs in a server process: import, then fork a worker for each request, and tell how each ended.

The other side, and the picture, are in ``server.py``. The loop has one thread and waits in ``select`` for the parent's
requests and for the ends of its children; when the parent is gone, it kills them and ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import struct
import sys
from multiprocessing import process as mp_process
from multiprocessing import resource_tracker
from typing import Any, Final

__all__ = ["ENDED", "FORK", "KILL", "LENGTH", "REQUEST", "RETIRE", "STATUS", "serve"]

#: A request: what to do, and a pid or which streams come along.
REQUEST: Final = struct.Struct("<cq")
#: A worker's pid; instead of it the negative number of threads that forbid a fork.
STATUS: Final = struct.Struct("<q")
#: A worker's exit code, and the most memory that it had used, in bytes.
ENDED: Final = struct.Struct("<qq")
LENGTH: Final = struct.Struct("<Q")
FORK, KILL, RETIRE = b"F", b"K", b"R"


def serve(control_fd: int) -> None:
    """Import, then fork on request until the parent is gone. The body of the server's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=control_fd) as control:
        length = control.recv(LENGTH.size, socket.MSG_WAITALL)
        if length:
            setup = control.recv(LENGTH.unpack(length)[0], socket.MSG_WAITALL)
            path, modules, parent_pid = json.loads(setup)
            sys.path[:] = path
            # No collection while modules are imported, which make no garbage to speak of (M: 0.1 s of 1.1 s); and none
            # in workers of what was imported, because a collection that touches it copies its pages in each of them.
            gc.disable()
            _import_all(modules)
            gc.freeze()
            gc.enable()
            _Server(control, parent_pid).run()
    os._exit(0)


def _import_all(modules: list[str]) -> None:
    for name in modules:
        with contextlib.suppress(BaseException):  # SystemExit too; the worker that needs it will see it
            __import__(name)


def n_threads() -> int:
    """Return the threads of this process, those of compiled libraries included."""
    return len(os.listdir("/proc/self/task"))


class _Child(mp_process.BaseProcess):
    """What ``multiprocessing.current_process()`` is in a worker."""

    _start_method = None  # the platform's own stays the default for what a task starts


class _Server:
    """The loop of the server: requests on one side, ends of workers on the other."""

    def __init__(self, control: socket.socket, parent_pid: int) -> None:
        self._control = control
        self._parent_pid = parent_pid
        self._children: dict[int, int] = {}
        self._is_retired = False
        self._wakeup, self._signalled = socket.socketpair()
        self._wakeup.setblocking(False)
        self._signalled.setblocking(False)

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, self._take_request)
            selector.register(self._wakeup, selectors.EVENT_READ, self._reap)
            while not self._is_retired or self._children:
                for key, _ in selector.select():
                    if not key.data(selector):
                        return

    def _take_request(self, selector: selectors.BaseSelector) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, REQUEST.size, 5)
        except ConnectionError:
            data, fds = b"", []
        if len(data) < REQUEST.size:
            # The parent is gone: its workers run for nobody, for hours perhaps.
            for pid in self._children:
                os.kill(pid, signal.SIGKILL)
            self._sweep()
            return False
        operation, number = REQUEST.unpack(data)
        if operation == FORK:
            self._fork(fds, number, selector)
        elif operation == KILL and number in self._children:
            os.kill(number, signal.SIGKILL)
        elif operation == RETIRE:
            self._is_retired = True
        return True

    def _sweep(self) -> None:
        """Delete what a parent that was killed has left in shared memory: nobody else would, before the next start."""
        for pid in list(self._children):
            with contextlib.suppress(OSError):
                os.waitpid(pid, 0)
        with contextlib.suppress(Exception):
            from ..data.store import sweep_places

            sweep_places()

    def _fork(self, fds: list[int], streams: int, selector: selectors.BaseSelector) -> None:
        status, threads = fds[1], n_threads()
        process = _Child(name="joblib_backends-worker")  # counts, so that each has an identity
        pid = os.fork() if threads == 1 else -threads
        if pid == 0:
            # Race: a signal between the fork and these lines is only written to the server's wake-up pipe.
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            selector.close()
            for sock in (self._control, self._wakeup, self._signalled):
                sock.close()
            # A sibling's pipe held here would hide from the parent that the server is gone.
            for fd in (status, *self._children.values()):
                os.close(fd)
            _become_worker(process, self._parent_pid, fds, streams)
        with contextlib.suppress(BrokenPipeError):
            os.write(status, STATUS.pack(pid))
        if pid > 0:
            self._children[pid] = status
        else:
            os.close(status)
        for fd in (fds[0], *fds[2:]):
            os.close(fd)

    def _reap(self, _: selectors.BaseSelector) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)
        while self._children:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if not pid:
                break
            with contextlib.suppress(OSError):
                os.write(self._children[pid], ENDED.pack(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024))
            os.close(self._children.pop(pid))
        return True


# ---- in the worker, right after the fork


def _become_worker(process: Any, parent_pid: int, fds: list[int], streams: int) -> None:
    """Run a worker as a child of the parent, as multiprocessing sees it, and end this process."""
    code = 1
    try:
        sock_fd, _, tracker, *outputs = fds
        # The parent's own standard output at this time, which may not be what it was when the server started.
        for target, fd in zip(_streams(streams), outputs, strict=True):
            os.dup2(fd, target)
            os.close(fd)
        # One tracker for all: a worker's own would remove the parent's shared memory when the worker ends.
        resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]
        _reseed()
        # Its other end stays open here: a worker does not outlive its parent, so it never has to see its end.
        sentinel, _ = os.pipe()
        process._parent_pid, process._parent_name = parent_pid, "MainProcess"
        process._target, process._args = _run, (sock_fd,)
        code = process._bootstrap(sentinel)
        atexit._run_exitfuncs()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
    finally:
        os._exit(code)


def _streams(streams: int) -> list[int]:
    return {0: [], 1: [1], 2: [2], 3: [1, 2]}[streams]


def _run(sock_fd: int) -> None:
    from .main import run_worker

    run_worker(socket.socket(fileno=sock_fd), n_threads())


def _reseed() -> None:
    """Give this worker random numbers of its own; the module random does that itself, NumPy does not."""
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()
