"""Tasks for workers that have nothing but Dask, joblib and numpy: nothing here imports anything else."""

import os
import sys
import time
import uuid
from pathlib import Path

#: A wait that ends a task that hangs; reaching it means a deadlock.
LONG = 60.0


def note(folder, name):
    (Path(folder) / f"{name}@{os.getpid()}-{uuid.uuid4().hex[:8]}").touch()


def noted(folder):
    """Return who has left a note: pairs of a name and a process."""
    split = [path.name.split("@") for path in Path(folder).glob("*@*")]
    return [(name, int(process.partition("-")[0])) for name, process in split]


def square(i, folder):
    note(folder, i)
    return i * i


def squares(indices, folder):
    """Make a call of its own."""
    from joblib import Parallel, delayed

    return Parallel(n_jobs=2)(delayed(square)(i, folder) for i in indices)


def total(data, i):
    return float(data.sum()) + i


def square_with_company(i, folder, n_processes):
    """End when tasks of so many workers have started."""
    note(folder, i)
    end = time.monotonic() + LONG
    while len({process for _, process in noted(folder)}) < n_processes:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return i * i


def endless_at(i, bad):
    if i == bad:
        time.sleep(LONG)
    return i * i


def where_from(_):
    """Return the file of our package, and which modules are here that a worker need not have."""
    import joblib_backends

    return joblib_backends.__file__, sorted({"xxhash", "loky", "threadpoolctl"} & set(sys.modules))
