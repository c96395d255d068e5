"""The cluster of ``scheduler="local"``: one for this process, in a process of its own, started on request.

::

    LocalCluster ──lifeline (a pipe)──> local_host.py: scheduler, nannies ──> one worker process per core

In a process of its own, because only that can clean up after a driver that was killed: it ends the cluster, and deletes
what the driver left, when its end of the lifeline closes, however that happens. Nor do the scheduler's event loop and
this process's tasks compete for one GIL, and a script needs no ``if __name__ == "__main__"``.

Thread-safe. The watcher thread closes a cluster that is idle; a fork's child knows nothing of its parent's.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, ClassVar, Final

from ..budget import available_cores
from ..config import Config, environment_of_cluster
from ..errors import ClusterUnavailableError, ConfigurationError

__all__ = ["LocalCluster"]

#: What the process runs. Not a script: worker processes would import it as their ``__main__``.
_PROGRAM: Final = (
    "import json, sys; order = json.loads(sys.stdin.readline()); sys.path[:] = order['path']; "
    "from joblib_backends.cluster.local_host import main; main(order)"
)

#: Whether a process can pass on the ends of pipes, and be ended with all that it has started.
_CAN_PASS_PIPES: Final = os.name == "posix"

#: Seconds for the start, which takes two or three on a quiet machine.
_START_S: Final = 60.0

#: Seconds for the end; what is left then is killed.
_END_S: Final = 20.0

#: Seconds in which a start that failed is not tried again: joblib asks several times before a call.
_FAILED_FOR_S: Final = 60.0


class LocalCluster:
    """A Dask cluster with one worker process of one thread for each core, on this machine."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _current: ClassVar[LocalCluster | None] = None
    _failed: ClassVar[tuple[float, str] | None] = None

    @classmethod
    def address_for(cls, config: Config) -> str:
        """Return the address of this process's cluster, which is started if there is none.

        Raises
        ------
        ClusterUnavailableError
            If it does not start.
        ConfigurationError
            If this system does not let a process pass on what the cluster needs: Windows.
        """
        if not _CAN_PASS_PIPES:
            raise ConfigurationError(
                "scheduler is 'local', but must be an address on Windows, where this backend starts no cluster: make "
                "one with client = distributed.Client(), under if __name__ == '__main__', and give client=client."
            )
        with cls._lock:
            if cls._current is not None and not cls._current._is_alive():
                cls._current._close()
            if cls._current is None:
                cls._current = cls._start(config)
            cls._current._use(config)
            return cls._current.address

    @classmethod
    def begin(cls, call: object, client: Any) -> None:
        """Note a call that begins on ``client``: until its end, the cluster is not idle, if it is this one."""
        current = cls._current
        if current is not None and getattr(client.scheduler, "address", None) == current.address:
            with cls._lock:
                current._clients.add(client)
                current._calls.add(call)
                current._expected_until = 0.0

    @classmethod
    def end(cls, call: object) -> None:
        """Note that a call is over; idempotent."""
        current = cls._current
        if current is not None and call in current._calls:
            with cls._lock:
                current._calls.discard(call)
                current._used = time.monotonic()

    @classmethod
    def close_current(cls) -> None:
        """End the cluster, if there is one; the next call starts another."""
        with cls._lock:
            if cls._current is not None:
                cls._current._close()

    @classmethod
    def _start(cls, config: Config) -> LocalCluster:
        if cls._failed is not None and time.monotonic() - cls._failed[0] < _FAILED_FOR_S:
            raise ClusterUnavailableError(cls._failed[1])
        try:
            cluster = cls(available_cores(config), config.idle_worker_timeout)
        except ClusterUnavailableError as error:
            cls._failed = (time.monotonic(), str(error))
            raise
        cls._failed = None
        return cluster

    def __init__(self, n_workers: int, idle_s: float) -> None:
        self._clients: weakref.WeakSet[Any] = weakref.WeakSet()
        self._calls: weakref.WeakSet[object] = weakref.WeakSet()
        self._idle_s = idle_s
        self._used = time.monotonic()
        #: Until when a call may begin that has asked for the address: on a busy machine it takes long to connect.
        self._expected_until = 0.0
        self._over = threading.Event()
        order = {"path": [entry or os.getcwd() for entry in sys.path], "n_workers": n_workers}
        reading, self._lifeline = os.pipe()
        try:
            self._process, reply = _spawn(order, reading, self._lifeline)
        except OSError as error:
            os.close(self._lifeline)
            raise ClusterUnavailableError(f"No process for a local Dask cluster could be started: {error}.") from error
        except BaseException:
            # Ctrl-C, while its workers start: with the lifeline they end.
            os.close(self._lifeline)
            raise
        finally:
            os.close(reading)
        self.address = str(reply.get("address"))
        if "address" not in reply:
            self._end()
            why = reply.get("error", f"its process ended, or took more than {_START_S:g} seconds")
            raise ClusterUnavailableError(
                f"A local Dask cluster of {n_workers} workers did not start: {why}. Is there memory left for so many "
                "processes? What they wrote to standard error may say more."
            )
        threading.Thread(target=self._watch, name="joblib_backends-dask-local", daemon=True).start()

    def __repr__(self) -> str:
        return f"<LocalCluster {self.address} process={self._process.pid}>"

    def _is_alive(self) -> bool:
        return self._process.poll() is None

    def _use(self, config: Config) -> None:
        self._used, self._idle_s = time.monotonic(), config.idle_worker_timeout
        self._expected_until = self._used + config.wait_for_workers

    def _idle_at(self) -> float:
        return max(self._used + self._idle_s, self._expected_until)

    def _watch(self) -> None:
        """Close the cluster when nobody has used it for long."""
        # At most so long: a call that was expected may have begun, and ended.
        while not self._over.wait(max(0.0, min(self._idle_at() - time.monotonic(), self._idle_s))):
            with LocalCluster._lock:
                if self._calls:
                    self._used = time.monotonic()
                # Race: a call may have come while this waited for the lock.
                elif time.monotonic() >= self._idle_at():
                    self._close()

    def _close(self) -> None:
        """End the cluster. The lock is held."""
        if LocalCluster._current is self:
            LocalCluster._current = None
        self._over.set()
        # Before its scheduler goes, or a client would look for it, and complain.
        for client in list(self._clients):
            with contextlib.suppress(Exception):
                client.close()
        self._end()

    def _end(self) -> None:
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own, with all its workers
            self._process.wait()

    def _forget(self) -> None:
        """Let go of the parent's cluster in a forked child, which would keep it alive after the parent."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self._process.returncode = 0  # not ours to wait for
        self._over.set()


def _spawn(order: dict[str, Any], lifeline: int, order_to: int) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """Start the process, and return it with its answer; that is empty if there was none in time."""
    reply, answering = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=lifeline,
            pass_fds=[answering],
            env=environment_of_cluster(),
            start_new_session=True,  # Ctrl-C is for the driver, which decides
        )
    except OSError:
        os.close(reply)
        raise
    finally:
        os.close(answering)
    with open(reply, "rb", buffering=0) as answer:
        # A process that fails at once reads nothing.
        with contextlib.suppress(BrokenPipeError):
            os.write(order_to, json.dumps(order | {"reply": answering}).encode() + b"\n")
        return process, _answer(answer)


def _answer(answer: Any) -> dict[str, Any]:
    received, deadline = b"", time.monotonic() + _START_S
    while not received.endswith(b"\n"):
        readable, _, _ = select.select([answer], [], [], max(0.0, deadline - time.monotonic()))
        part = answer.read(65_536) if readable else b""
        if not part:
            return {}
        received += part
    return dict(json.loads(received))


def _forget_in_child() -> None:
    LocalCluster._lock, LocalCluster._failed = threading.Lock(), None
    current, LocalCluster._current = LocalCluster._current, None
    if current is not None:
        current._forget()


atexit.register(LocalCluster.close_current)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
