"""Tasks that say what data they got, and where; and what workers and schedulers say of themselves when asked."""

import mmap
import os
import socket
from pathlib import Path

import numpy as np
import xxhash
from clusters import start, wait_until

#: What this process was asked to keep.
_kept = []

# ---- tasks


def where():
    """Return the host and process that this is."""
    return f"{socket.gethostname()}:{os.getpid()}"


def fingerprint(data, i, folder, held_on=""):
    """Return what the data is; on hosts whose names begin so, hold it until the test has made the file "go"."""
    found = content(data)
    start(folder, where())
    if socket.gethostname().startswith(held_on):
        wait_until((Path(folder) / "go").exists)
    return found, i


def content(data):
    """Return a hash of all bytes of an array, or of each one of a list."""
    return [content(one) for one in data] if isinstance(data, list) else xxhash.xxh3_128_hexdigest(data)


def scribble(data, i, folder):
    """Return what the data was, then write to all of it."""
    found = content(data)
    data[...] = i
    start(folder, where())
    return found, float(data.sum()), i


# ---- asked by Client.run, Client.run(nanny=True) and Client.run_on_scheduler


def make_file(path, nbytes=0):
    """Make a file of zeros, in a folder that may have to be made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(nbytes)


def map_file(path, nbytes):
    """Map a file of zeros for as long as this process lives, and read all of it."""
    with open(path, "a+b") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        _kept.append(mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY))
    content(np.frombuffer(_kept[-1], np.uint8))


def keep_bytes(nbytes):
    _kept.append(np.ones(nbytes, np.uint8))


def boot_id():
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def limit_memory(nbytes, dask_worker):
    """Have a worker, or a nanny, believe that it was started with this limit."""
    dask_worker.memory_manager.memory_limit = int(nbytes)


def resident_memory(dask_worker):
    return dask_worker.monitor.proc.memory_info().rss


def n_looks(dask_worker):
    """Return how often a worker has looked at its memory."""
    return dask_worker.monitor.count


def last_heartbeats(dask_scheduler):
    return {address: worker.last_seen for address, worker in dask_scheduler.workers.items()}


def accounts(dask_scheduler):
    """Return (state, memory of the process, of its data) of each worker, as the scheduler knows them."""
    return [(w.status.name, w.memory.process, w.memory.managed) for w in dask_scheduler.workers.values()]
