"""Tasks that leave a trace of each run, and the faults that they meet. Workers import this: it imports little."""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import joblib

#: A wait that ends a task that hangs; reaching it means a deadlock.
LONG = 60


# ---- traces


def note(path, what):
    """Add a line to a file; lines of several processes do not mix."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{what}\n".encode())
    finally:
        os.close(fd)


def notes(path):
    """Return the lines of a file that tasks write to."""
    try:
        return Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []


def is_first(path):
    """Return whether nobody has asked this of ``path`` before, in any process."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def wait_for(condition, seconds=LONG):
    """Wait until ``condition()`` is true; in a task, where an exception tells of the deadlock."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# ---- faults, injected inside of a task


class Wrong(Exception):
    """What a task raises."""


def kill(residents):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(residents):
    os._exit(3)


def crash(residents):
    ctypes.string_at(0)


def exit_task(residents):
    sys.exit(4)


def fail(residents):
    raise Wrong("mine")


def remove_files(residents):
    for path in residents:
        Path(path).unlink(missing_ok=True)


def truncate_files(residents):
    """Cut the files short, as a task that reads its data would: the kernel sends SIGBUS."""
    for path in residents:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, 100)


def remove_folders(residents):
    for path in residents:
        shutil.rmtree(Path(path).parent, ignore_errors=True)


# ---- the task of every call


class Task:
    """Returns a number made of its data and its index; the first run of one index meets a fault.

    Parameters
    ----------
    folder : str
        Where runs are noted.
    fault : callable of the residents' paths, or None
    residents : list of str
        The files of the data.
    always : collection of int
        Tasks that meet the fault each time.
    once : int or None
        The task that meets it the first time.
    """

    def __init__(self, folder, fault=None, residents=(), *, once=None, always=(), seconds=0.0):
        self.folder, self.fault, self.residents = str(folder), fault, list(residents)
        self.once, self.always, self.seconds = once, frozenset(always), seconds

    def __call__(self, index, data=None):
        note(f"{self.folder}/started", index)
        if self.seconds:
            time.sleep(self.seconds)
        if index in self.always or (index == self.once and is_first(f"{self.folder}/fault")):
            self.fault(self.residents)
        value = index * 10.0 + (0.0 if data is None else float(data.sum()))
        note(f"{self.folder}/done", index)
        return value

    def expected(self, n, data=None):
        total = 0.0 if data is None else float(data.sum())
        return [index * 10.0 + total for index in range(n)]


def inner(task, indices, data):
    return joblib.Parallel(n_jobs=2)(joblib.delayed(task)(i, data) for i in indices)


def wait_for_go(paths):
    """Wait until somebody makes a file; longer than any test allows a task to run."""
    wait_for(Path(paths[0]).exists)


def total(data, i):
    return float(data.sum()) + i


def use_memory(n_mb, i):
    """Fill memory for a moment, as a task does that works on a copy of its data."""
    values = bytearray(n_mb << 20)
    for place in range(0, len(values), 4096):
        values[place] = 1
    time.sleep(0.2)
    return i
