"""Calls of every kind, faults from outside, and scripts that meet them."""

import contextlib
import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import joblib
import numpy as np
import psutil
import pytest
from estimators import Candidate
from sklearn.model_selection import GridSearchCV
from tasks import LONG, inner

from joblib_backends.workers.pool import WorkerPool

HERE = Path(__file__).parent


# ---- calls of every kind


def as_list(task, n, data=None, **options):
    return joblib.Parallel(**options)(joblib.delayed(task)(i, data) for i in range(n))


def as_generator(task, n, data=None, **options):
    return list(joblib.Parallel(return_as="generator", **options)(joblib.delayed(task)(i, data) for i in range(n)))


def as_completed(task, n, data=None, **options):
    options = {"return_as": "generator_unordered", **options}
    return sorted(joblib.Parallel(**options)(joblib.delayed(task)(i, data) for i in range(n)))


def nested(task, n, data=None, **options):
    halves = [range(n // 2), range(n // 2, n)]
    pairs = joblib.Parallel(**options)(joblib.delayed(inner)(task, half, data) for half in halves)
    return [value for pair in pairs for value in pair]


def two_halves(n_columns):
    """Return 100 rows: zeros, then ones, from which an estimator knows its fold."""
    values = np.zeros((100, n_columns))
    values[50:] = 1.0
    return values


def search_of(task, n, **options):
    grid = {"index": list(range(n // 2))}
    cv = [(np.arange(50, 100), np.arange(50)), (np.arange(50), np.arange(50, 100))]
    return GridSearchCV(Candidate(task), grid, cv=cv, refit=False, **options)


def as_search(task, n, data=None, **options):
    """Return the scores of a search as the results of its tasks; the data is that of the search."""
    X = two_halves(10) if data is None else data  # noqa: N806
    found = search_of(task, n, error_score="raise", **options).fit(X, np.zeros(len(X))).cv_results_
    scores = np.stack([found["split0_test_score"], found["split1_test_score"]], axis=1).ravel()
    return list(scores)


KINDS = {
    "list": as_list,
    "generator": as_generator,
    "unordered": as_completed,
    "nested": nested,
    "search": as_search,
}


def open_tier(tier, **options):
    return joblib.parallel_backend("hybrid", n_jobs=options.pop("n_jobs", 2), tier=tier, **options)


# ---- faults from outside


def members():
    return [member for pool in list(WorkerPool._pools.values()) for member in list(pool._roster.members)]


def workers():
    """Return the processes that our pools have now."""
    return [member.process.pid for member in members()]


class Killer(threading.Thread):
    """Kills random workers, each time a random while after the last; seeded. Some are still being started."""

    def __init__(self, seed, most, longest_s, may_begin=lambda: True):
        super().__init__(name="killer")
        self._random, self._most, self._longest_s = random.Random(seed), most, longest_s
        self._may_begin, self._ended = may_begin, threading.Event()
        self.n_killed = 0

    def run(self):
        while not self._may_begin() and not self._ended.wait(0.001):
            pass
        while self.n_killed < self._most and not self._ended.wait(self._random.uniform(0, self._longest_s)):
            with contextlib.suppress(IndexError, psutil.Error):
                victim = psutil.Process(self._random.choice([member.process.pid for member in members()]))
                victim.kill()
                self.n_killed += 1
                victim.wait(1)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self.join(LONG)


@contextlib.contextmanager
def script(code, *args, prefix=(), **options):
    """Run code in a new process that can import what is here; it is killed at the end of the block."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **options.pop("env", {})}
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def finish(process, seconds=LONG):
    """Return what a process prints until it ends by itself, and what it says on stderr."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out.split(), err


def mount_small(place, nbytes):
    """Mount a file system of so many bytes, or skip."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes},mode=700", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")


def unmount(place):
    subprocess.run(["umount", "-l", str(place)], check=True)


def own_server_pids():
    """Return the servers that forked our workers."""
    return {member.process.server.pid for member in members() if member.process.way == "forked"}
