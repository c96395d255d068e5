"""The processes of a large cluster on one machine, for ``cluster_size.py``: a scheduler, and hundreds of workers.

::

    this file as a script:  scheduler ──tcp── workers (all in one event loop, each with a thread of its own for tasks)

Each prints one line when it is ready, and ends when its standard input does: with who started it, however that ends.

Workers in one loop are as light as those of distributed's own tests, and for the same reason some of their periodic
work is off: what a worker does every 10 ms (the profiler) or every 500 ms (the monitor of its host) for itself, and
which on a real cluster takes its own core's time, would here take all of ours. What they say to the scheduler, and how
often, is unchanged. What they find out about the machine when a client gives them the package is kept: each asks the
same machine, one after the other, which takes 30 ms. And they have the package as a zip file already, as workers that a
client has given it to.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

#: Seconds within which a process must be ready: 500 workers take 15 s on two cores.
READY_S: Final = 180.0

#: Seconds between two looks at the processes.
_LOOK_EVERY_S: Final = 0.2

_QUIET: Final = {
    "logging.distributed": "error",
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.interval": "60s",
    "distributed.admin.tick.interval": "1s",
    "distributed.scheduler.work-stealing": True,
}

_MIB: Final = 1 << 20


# ---- tasks; workers import them from here


def where(_: int, seconds: float = 0.0) -> tuple[int, float]:
    """Take so many seconds; return the number of the worker, and when it ended."""
    import distributed

    if seconds:
        time.sleep(seconds)
    return distributed.get_worker().name, time.time()


# ---- in the processes of the cluster


async def _schedule() -> None:
    from distributed import Scheduler

    async with Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address=":0") as scheduler:
        print(scheduler.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def _work(address: str, n_workers: int) -> None:
    from distributed import Worker

    for module, name in ((importlib.metadata, "version"), (importlib.util, "find_spec")):
        setattr(module, name, functools.cache(getattr(module, name)))
    workers = [
        Worker(address, nthreads=1, name=name, memory_limit=0, dashboard=False, host="127.0.0.1")
        for name in range(n_workers)
    ]
    # Not all at once: each start is a dozen messages, and the scheduler gives up a handshake after some seconds.
    for start in range(0, n_workers, 25):
        await asyncio.gather(*workers[start : start + 25])
    print(n_workers, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    # Who started us is gone, or has all that it wants: to close 500 workers one by one takes longer than to work.
    os._exit(0)


# ---- in the process that measures


class LargeCluster:
    """A scheduler, and a process of so many workers."""

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self._processes: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> LargeCluster:
        # Here: in the workers it would be another one that they have.
        from joblib_backends.cluster.travel import zipped_package

        zipped = zipped_package()
        path = Path(self._folder.name) / f"{zipped.source}.zip"
        path.write_bytes(zipped.content)
        try:
            self.address = self._start("scheduler")
            self._start("workers", self.address, str(self.n_workers), str(path))
        except BaseException:
            self.__exit__()
            raise
        self.pids = {name: process.pid for name, process in zip(("scheduler", "workers"), self._processes, strict=True)}
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.communicate()
        self._folder.cleanup()

    def _start(self, *arguments: str) -> str:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._processes.append(process)
        given_up = threading.Timer(READY_S, process.kill)
        given_up.start()
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        given_up.cancel()
        if not line:
            raise RuntimeError(f"The {arguments[0]} did not start within {READY_S:g} s; its messages are above.")
        return line


class Gauge:
    """CPU time and memory of a process from now on."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.start_bytes = self.peak_bytes = self._process.memory_info().rss
        self._start_cpu_s = self._cpu_now()

    def look(self) -> int:
        """Return the resident bytes, and keep the most."""
        resident: int = self._process.memory_info().rss
        self.peak_bytes = max(self.peak_bytes, resident)
        return resident

    @property
    def cpu_s(self) -> float:
        """CPU seconds since the start."""
        return self._cpu_now() - self._start_cpu_s

    def _cpu_now(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def figures(self, n_tasks: int) -> dict[str, float]:
        """Return what is kept of it."""
        return {
            "cpu_ms_per_task": self.cpu_s / n_tasks * 1e3,
            "start_mib": self.start_bytes / _MIB,
            "peak_mib": self.peak_bytes / _MIB,
            "grown_bytes_per_task": (self.look() - self.start_bytes) / n_tasks,
        }


@contextlib.contextmanager
def watched(gauges: dict[str, Gauge]) -> Iterator[None]:
    """Have the gauges look again and again within the block."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_EVERY_S):
            for gauge in gauges.values():
                gauge.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def bytes_over_loopback() -> int:
    """Return the bytes that this machine has sent to itself over TCP."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


def main(arguments: list[str]) -> None:
    """Run a process of the cluster."""
    import dask

    dask.config.set(_QUIET)
    # A worker has a port, connections to and from the scheduler, and one to its own HTTP server.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.path[1:1] = arguments[3:]
    body: Any = _schedule() if arguments[0] == "scheduler" else _work(arguments[1], int(arguments[2]))
    asyncio.run(body)


if __name__ == "__main__":
    main(sys.argv[1:])
