"""One worker process: its start, its connection, its end in words.

Two ways to start one: a fork of the server, in 10 ms, or loky's fresh interpreter, in seconds, where there is no
server. Neither runs the user's main module again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from . import frames
from .forking import ENDED
from .main import run_spawned_worker
from .server import ForkServer, ServerError

__all__ = ["End", "ForkedWorker", "SpawnedWorker", "WorkerProcess", "start_worker"]


class End(NamedTuple):
    """How a worker ended."""

    #: For messages.
    how: str
    #: The exit code, negative for a signal.
    code: int | None = None
    #: The most memory that it had used, in bytes.
    peak_nbytes: int | None = None


def start_worker(
    preparation: bytes, packages: frozenset[str], is_wanted: Callable[[], bool], *, may_fork: bool = True
) -> WorkerProcess:
    """Start a worker in the fastest way that works here; takes 10 ms, or seconds. Thread-safe.

    Parameters
    ----------
    preparation : bytes
        The parent's ``snapshot()``.
    packages : frozenset of str
        What the tasks need; a hint.
    is_wanted : callable
        Whether the worker is still wanted, asked before each attempt.
    may_fork : bool
        Whether a server may be used.

    Raises
    ------
    ServerError
        If the worker is not wanted any more.
    """
    while may_fork and ForkServer.enabled:
        try:
            server = ForkServer.get(packages)
        except OSError:
            break
        try:
            return ForkedWorker(preparation, server)
        except ServerError:
            may_fork = ForkServer.give_up(server) and is_wanted()
    if not is_wanted():
        raise ServerError("the pool was closed")
    return SpawnedWorker(preparation)


class WorkerProcess(ABC):
    """A worker as its parent holds it. ``kill`` may be called from any thread, the rest by its owner.

    Parameters
    ----------
    preparation : bytes
        The parent's ``snapshot()``.
    """

    #: "forked" or "spawned".
    way: str
    pid: int
    #: A descriptor that becomes readable when the process has ended.
    sentinel: int
    #: The connection; it does not block.
    sock: socket.socket

    def __init__(self, preparation: bytes) -> None:
        self.sock, theirs = socket.socketpair()
        try:
            with theirs:
                self._start(theirs)
            # It may block: the worker reads it first of all. A worker that died is noticed by who reads.
            with contextlib.suppress(ConnectionError):
                for piece in frames.pack(frames.PREPARE, preparation):
                    self.sock.sendall(piece)
            self.sock.setblocking(False)
        except BaseException:
            self.sock.close()
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.pid}>"

    @abstractmethod
    def _start(self, theirs: socket.socket) -> None: ...

    @abstractmethod
    def exit_code(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs, or if it can never be known."""

    def has_ended(self) -> bool:
        """Return whether a readable sentinel means the end of this process; it may be that of its server."""
        return True

    @abstractmethod
    def kill(self) -> None:
        """Kill the process; it is gone soon after."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the process used here; it must have ended, or be about to."""

    def forget_in_child(self) -> None:
        """Leave the worker to the parent. Runs in a forked child."""
        self.sock.close()

    def peak_nbytes(self) -> int | None:
        """Return the most memory that the process had used when it ended; None where that is not known."""
        return None

    def how_it_ended(self) -> End:
        """Return how the process ended."""
        code = self.exit_code()
        return End(_in_words(code), code, self.peak_nbytes())


def _in_words(code: int | None) -> str:
    if code is None:
        return "it closed its connection"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"it was killed by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"


class ForkedWorker(WorkerProcess):
    """A fork of a server; raises ServerError if that cannot fork."""

    way = "forked"

    def __init__(self, preparation: bytes, server: ForkServer) -> None:
        self._server = server
        self._code: int | None = None
        self._peak_nbytes: int | None = None
        super().__init__(preparation)

    @property
    def server(self) -> ForkServer:
        """The server that forked it."""
        return self._server

    def _start(self, theirs: socket.socket) -> None:
        self.pid, self.sentinel = self._server.fork(theirs)
        os.set_blocking(self.sentinel, False)

    def exit_code(self) -> int | None:
        """Return the exit code that the server has told."""
        if self._code is None and self.sentinel >= 0:
            with contextlib.suppress(OSError):
                data = os.read(self.sentinel, ENDED.size)
                if len(data) == ENDED.size:
                    self._code, self._peak_nbytes = ENDED.unpack(data)
        return self._code

    def peak_nbytes(self) -> int | None:
        """Return what the server has told."""
        return self._peak_nbytes

    def has_ended(self) -> bool:
        """Return whether the server has told an exit code; its own end closes the pipe, too, and the worker goes on."""
        return self.exit_code() is not None

    def kill(self) -> None:
        """Have the server kill it."""
        self._server.kill(self.pid)

    def close(self) -> None:
        """Close the connection and let the server go, if it waits for its last worker."""
        self.sock.close()
        if self._close_sentinel():
            self._server.release()

    def forget_in_child(self) -> None:
        """Close the child's copies of what the parent uses."""
        super().forget_in_child()
        self._close_sentinel()

    def _close_sentinel(self) -> bool:
        sentinel, self.sentinel = self.sentinel, -1
        if sentinel >= 0:
            os.close(sentinel)
        return sentinel >= 0


#: Held while loky is imported. An import that fails, for want of descriptors, leaves a thread that waited for it with
#: half a module and an ``ImportError`` that does not say why.
_importing = threading.Lock()


def _loky_context() -> Any:
    """Return loky's ways to start processes; those of joblib's own copy on a Dask worker that has no other."""
    with _importing:
        for loky in ("loky", "joblib.externals.loky"):
            with contextlib.suppress(ModuleNotFoundError):
                # What the start of a process imports, too.
                importlib.import_module(f"{loky}.backend.popen_loky_{'win32' if os.name == 'nt' else 'posix'}")
                return importlib.import_module(f"{loky}.backend.context").get_context("loky")
        raise ModuleNotFoundError("No worker process can be started without loky, which joblib brings.", name="loky")


def _forget_in_child() -> None:
    global _importing
    # Another thread of the parent may have held it.
    _importing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


class SpawnedWorker(WorkerProcess):
    """A fresh interpreter, started by loky."""

    way = "spawned"

    def _start(self, theirs: socket.socket) -> None:
        make: Any = _loky_context().Process
        self._process = make(target=run_spawned_worker, args=(theirs,), name="joblib_backends-worker")
        try:
            self._process.start()
        except UnboundLocalError as error:
            # loky 3.5 to 3.7 stumbles over its own cleaning up when it cannot open a pipe, and hides why.
            raise error.__context__ or error from None
        self.pid, self.sentinel = self._process.pid, self._process.sentinel

    def exit_code(self) -> int | None:
        """Return the exit code once the process can be waited for."""
        code = self._process.exitcode
        return None if code is None else int(code)

    def kill(self) -> None:
        """Kill it; it is this process's own child and is not reaped by anybody else."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the connection and reap the process, which its owner has seen to end or has killed."""
        self.sock.close()
        self._process.join()
