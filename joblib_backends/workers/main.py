"""The loop of a worker: a batch in, its outcome out, until the parent is gone.

The main thread runs it, and with it every task: libraries and users expect signals and thread limits to work there.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from typing import Final

import cloudpickle

from . import frames
from .preparation import prepare

__all__ = ["run_spawned_worker", "run_worker"]

#: Seconds that a worker has for its exit functions: a thread that a task left running must not keep it for ever.
_END_TIMEOUT_S: Final = 5.0

#: Seconds between two looks for the parent.
_PARENT_LOOK_S: Final = 2.0

#: Added to the thousandths of memory by which Linux chooses what to kill.
_OOM_SCORE: Final = 500


def run_worker(sock: socket.socket, n_threads: int = 0) -> None:
    """Serve batches on a socket until its other end closes. The body of a worker process.

    Parameters
    ----------
    sock : socket
        The connection to the parent. The first frame says how the parent is now.
    n_threads : int
        Threads that this process had when it started, for the tests.
    """
    # Ctrl-C reaches the whole group of a terminal. The parent decides, and kills the workers of the call.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _offer_to_oom_killer()
    sock.setblocking(True)
    try:
        _serve(sock, n_threads)
    except ConnectionError:
        pass  # the parent went away while a result was on its way
    finally:
        sock.close()
        limit = threading.Timer(_END_TIMEOUT_S, os._exit, (0,))
        limit.daemon = True
        limit.start()


def run_spawned_worker(sock: socket.socket) -> None:
    """Serve batches in a process that no server kills when the parent dies: it looks for itself, in a long task too."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="joblib_backends-watch", daemon=True).start()
    run_worker(sock)


def _offer_to_oom_killer() -> None:
    """Have the kernel rather kill this process than the parent, when memory is out: a batch can run again."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
        score = max(int(file.read()), _OOM_SCORE)
        file.seek(0)
        file.write(str(score))


def _serve(sock: socket.socket, n_threads: int) -> None:
    is_known, own_pid = False, os.getpid()
    while (frame := frames.receive(sock)) is not None:
        kind, body = frame
        del frame
        if kind == frames.PREPARE:
            prepare(body)
            if not is_known:
                frames.send(sock, frames.HELLO, pickle.dumps((os.getpid(), n_threads)))
                is_known = True
            continue
        kind, answer = _run(body)
        if os.getpid() != own_pid:
            os._exit(0)  # a task forked and came back twice: one process answers, the parent's worker
        # A worker that waits must hold no data of the last batch, and of a large result only one copy while it travels.
        del body
        frames.send(sock, kind, answer)
        del answer


def _run(body: bytes | bytearray) -> tuple[bytes, bytes]:
    try:
        function, args = pickle.loads(body)
        result = function(*args)
        del args
        return frames.RESULT, pickle.dumps(result, protocol=5)
    except BaseException as error:
        return frames.ERROR, _pack_error(error)


def _pack_error(error: BaseException) -> bytes:
    """Return an exception with its traceback's text; one that cannot travel is replaced by its text."""
    text = "".join(traceback.format_exception(error))
    try:
        packed: bytes = cloudpickle.dumps((error, text), protocol=5)
        pickle.loads(packed)
    except Exception:
        return pickle.dumps((RuntimeError(f"{type(error).__name__}, which cannot be pickled"), text))
    return packed
