"""A process that has imported what tasks need and does nothing but fork workers, so that a worker starts in 10 ms.

::

    parent                                   server (a fresh interpreter)            worker
    ForkServer.start ── modules, path ─────> import them, one thread each
    ForkServer.fork ─── "fork" + sockets ──> fork ─────────────────────────────────> run_worker(socket)
          pid, then the exit code <───────── status pipe, one per worker
    ForkServer.kill ─── "kill" + pid ──────> SIGKILL: its own child, so never a pid that was used again
    ForkServer.retire ─ "retire" ──────────> ends when its last worker has

Who runs where: :class:`ForkServer` in the parent, in whichever thread starts or kills a worker; ``forking.py`` in
the server. Each request is one ``sendmsg`` of a fixed length, which the kernel keeps whole: no lock is needed.

The server never runs the user's code and imports none of it, so no ``__main__`` guard is needed. It is not
``multiprocessing.forkserver``, whose server loses itself over an import that raises more than ImportError, cannot be
given an environment, forks whatever threads it has, and changes its private protocol between Python 3.11 and 3.14.

Invariants: a server with more than one thread forks nothing (a lock that such a thread holds would stay locked for
ever in the child); when the parent is gone, however it ended, the server kills its workers and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing import resource_tracker, spawn, util
from typing import Any, ClassVar, Final

from .forking import FORK, KILL, LENGTH, REQUEST, RETIRE, STATUS
from .preload import expensive, modules_to_preload, search_path
from .preparation import environment_of_server, thread_variables

__all__ = ["ForkServer", "ServerError"]

#: Seconds until a server must have forked: its imports are cold on a network disk, but it must not hang for ever.
_FORK_TIMEOUT_S: Final = 120.0

#: Seconds that a retired server without workers has to end; it has nothing left to do.
_END_TIMEOUT_S: Final = 5.0


class ServerError(Exception):
    """The server cannot fork a worker; it must be started in another way."""


class ForkServer:
    """The parent's side of a server. Thread-safe.

    The lock is held while a server is started, not while it imports; a fork waits for that outside of it.
    """

    #: Whether servers may be used at all. Elsewhere fork is missing, or system libraries do not survive it (macOS).
    #: A frozen program has no interpreter to start one with.
    enabled: ClassVar[bool] = sys.platform == "linux" and not getattr(sys, "frozen", False)

    _current: ClassVar[ForkServer | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _all: ClassVar[set[ForkServer]] = set()
    #: Packages that start threads when they are imported; workers import those themselves.
    _unsafe: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def get(cls, packages: frozenset[str]) -> ForkServer:
        """Return a running server that has imported ``packages``, as far as that pays, for one ``fork``."""
        with cls._lock:
            current, packages = cls._current, packages - cls._unsafe
            if current is None or not current._serves(packages):
                if current is not None:
                    packages |= current._packages - cls._unsafe
                    current._retire()
                current = cls._current = cls(packages)
            # Counted before it exists, or another thread could retire the server in between.
            current._n_workers += 1
            return current

    @classmethod
    def give_up(cls, server: ForkServer) -> bool:
        """Stop using a server that could not fork; return whether another with fewer modules is worth a try."""
        with cls._lock:
            if cls._current is server:
                cls._current = None
            if not server._is_interrupted:
                cls._unsafe |= server._packages
                # A server with nothing but our own needs will not do better the next time.
                cls.enabled = cls.enabled and bool(server._packages)
            server._n_workers -= 1
            server._retire()
            return cls.enabled

    @classmethod
    def forget_in_child(cls) -> None:
        """Leave the servers to the parent. Runs in a forked child, alone."""
        for server in list(cls._all):
            server._control.close()
            server._process.returncode = 0  # not this process's child: it must not be waited for
        cls._current, cls._lock, cls._all = None, threading.Lock(), set()

    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages
        self._variables = thread_variables()
        self._n_workers = 0
        self._is_retired = self._is_interrupted = self._has_forked = False
        self._control, theirs = socket.socketpair()
        with theirs:
            program = f"from joblib_backends.workers.forking import serve; serve({theirs.fileno()})"
            self._process = subprocess.Popen(
                [spawn.get_executable(), *util._args_from_interpreter_flags(), "-c", _with_path(program)],  # type: ignore[attr-defined]
                env=environment_of_server(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._all.add(self)
        setup = json.dumps([search_path(), modules_to_preload(packages), os.getpid()]).encode()
        with contextlib.suppress(OSError):  # a server that has died already is noticed at the first fork
            self._control.settimeout(_END_TIMEOUT_S)
            self._control.sendall(LENGTH.pack(len(setup)) + setup)

    def __repr__(self) -> str:
        return f"<ForkServer {self._process.pid}, {self._n_workers} workers, {sorted(self._packages)}>"

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def fork(self, sock: socket.socket) -> tuple[int, int]:
        """Have a worker forked for this end of a socket pair; return its pid and the pipe with its exit code.

        Raises
        ------
        ServerError
            If the server is gone, hangs, or has threads.
        """
        status, theirs = os.pipe()
        try:
            try:
                streams = [fd for fd in (1, 2) if _is_open(fd)]
                fds: list[Any] = [sock.fileno(), theirs, resource_tracker.getfd(), *streams]
                socket.send_fds(self._control, [REQUEST.pack(FORK, sum(streams))], fds)
            finally:
                os.close(theirs)
            answer = _read_number(status, _FORK_TIMEOUT_S)
            if answer is None or answer <= 0:
                raise ServerError("it ended or hangs" if answer is None else f"it has {-answer} threads")
        except OSError as error:
            os.close(status)
            raise ServerError(str(error)) from error
        except BaseException:
            os.close(status)
            raise
        self._has_forked = True
        return answer, status

    def kill(self, pid: int) -> None:
        """Kill a worker."""
        try:
            self._control.send(REQUEST.pack(KILL, pid))
        except OSError:
            # The server is gone, and with it what could make the number mean another process soon.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def release(self) -> None:
        """Note that a worker has ended; a server that nobody needs any more is waited for."""
        with self._lock:
            self._n_workers -= 1
            if self._is_retired and not self._n_workers:
                self._wait()

    @classmethod
    def interrupt(cls) -> None:
        """Kill servers that have not forked yet: they import, which nobody wants to wait for any more."""
        for server in list(cls._all):
            if not server._has_forked:
                server._is_interrupted = True
                server._process.kill()

    @classmethod
    def stop_idle(cls) -> None:
        """End the current server if it has no worker."""
        with cls._lock:
            current = cls._current
            if current is not None and not current._n_workers:
                cls._current = None
                current._retire()

    def _serves(self, packages: frozenset[str]) -> bool:
        if self._process.poll() is not None:
            return False
        return self._variables == thread_variables() and not expensive(packages - self._packages)

    def _retire(self) -> None:
        """Have the server end with its last worker. Under the lock."""
        self._is_retired = True
        with contextlib.suppress(OSError):
            self._control.send(REQUEST.pack(RETIRE, 0))
        if not self._n_workers:
            self._wait()

    def _wait(self) -> None:
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._control.close()
        self._all.discard(self)


def _with_path(program: str) -> str:
    # -c puts "" first on the path: a file of the user's named like a module must not be imported in its place.
    return f"import sys; sys.path[:] = {search_path()!r}; {program}"


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _read_number(fd: int, timeout_s: float) -> int | None:
    poll = select.poll()  # not select.select, which fails for descriptors above 1023
    poll.register(fd, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return None
    data = os.read(fd, STATUS.size)
    return int(STATUS.unpack(data)[0]) if len(data) == STATUS.size else None
