"""Tasks that make calls of their own; Dask workers import them from here."""

import os
import time
import uuid
from pathlib import Path

from clusters import LONG, hold, start, started, wait_until
from joblib import Parallel, delayed, parallel_config


def meet(name, n, folder):
    """Wait until ``n`` tasks have started, which only those at once can do that all run at once."""
    start(folder, name)
    wait_until(lambda: len(started(folder)) >= n, LONG / 2)
    return os.getpid()


def meeting(name, n_tasks, n, folder, n_jobs=-1):
    """Have so many tasks of a call of its own meet with those of others."""
    return Parallel(n_jobs=n_jobs)(delayed(meet)(f"{name}.{i}", n, folder) for i in range(n_tasks))


def meeting_at(depth, name, n, folder):
    """Have the tasks meet that are so many calls deep, of which each makes two."""
    if not depth:
        return [meet(name, n, folder)]
    call = Parallel(n_jobs=-1)
    parts = call(delayed(meeting_at)(depth - 1, f"{name}.{i}", n, folder) for i in range(2))
    return [pid for part in parts for pid in part]


def count_together(i, folder, seconds=0.05):
    """Return how many such tasks there were at once when this one was there."""
    mark = Path(folder) / f"here-{uuid.uuid4().hex}"
    mark.touch()
    counts = []
    # For as long as others need to come, if they may.
    for _ in range(10):
        counts.append(len(list(Path(folder).glob("here-*"))))
        time.sleep(seconds / 10)
    mark.unlink()
    return max(counts)


def crowd(n_tasks, folder, n_jobs):
    """Return the most tasks of a call of its own that ran at once."""
    return max(Parallel(n_jobs=n_jobs, batch_size=1)(delayed(count_together)(i, folder) for i in range(n_tasks)))


def tree(depth, width):
    """Return the number of leaves of calls within calls."""
    if not depth:
        return 1
    return sum(Parallel(n_jobs=-1)(delayed(tree)(depth - 1, width) for _ in range(width)))


def own_pids(n_tasks):
    """Return this process, and those in which a call of its own runs tasks that take a while."""
    call = Parallel(n_jobs=-1, batch_size=1)
    return os.getpid(), set(call(delayed(pid_later)(0.05) for _ in range(n_tasks)))


def pid_later(seconds):
    time.sleep(seconds)
    return os.getpid()


def call_of_own_task(n_tasks, folder):
    """Make a call on the cluster in a Dask task that is none of the backend's. Called on each worker at once."""
    import joblib_backends  # noqa: F401  registers the backend

    meet("task", 2, folder)
    with parallel_config("hybrid", tier="dask", n_jobs=2):
        return Parallel(batch_size=1)(delayed(abs)(-i) for i in range(n_tasks))


def fail_inside(folder):
    """Make a call whose second task fails."""
    return Parallel(n_jobs=-1, batch_size=1)(delayed(fail_at)(i, 1, folder) for i in range(3))


def fail_at(i, bad, folder):
    meet(f"fail.{i}", 3, folder)
    if i == bad:
        raise LookupError(f"task {i}")
    return i


def has_slot_after_a_call_that_failed(folder):
    """Return whether this thread has its slot when a call of its has failed, and after one that has not."""
    from distributed.threadpoolexecutor import thread_state

    has_slot = []
    try:
        fail_inside(folder)
    except LookupError:
        has_slot.append(thread_state.proceed)
    streamed(12, "list")
    return [*has_slot, thread_state.proceed]


class Caller:
    """An actor that makes calls."""

    def call(self, address):
        import joblib_backends  # noqa: F401  registers the backend

        with parallel_config("hybrid", scheduler=address, n_jobs=2, fallback=False):
            return Parallel(batch_size=1)(delayed(abs)(-i) for i in range(5))


def streamed(n_tasks, return_as):
    """Return the results of a call whose results are a generator."""
    call = Parallel(n_jobs=-1, batch_size=1, return_as=return_as)
    return list(call(delayed(value_later)(i, 0.03) for i in range(n_tasks)))


def value_later(value, seconds):
    time.sleep(seconds)
    return value


def hold_or_fail(k, n_tasks, folder):
    """Make a call of tasks that are held; or fail, when some of them have started."""
    if k == 0:
        return Parallel(n_jobs=-1, batch_size=1)(delayed(hold)(i, folder) for i in range(n_tasks))
    wait_until(lambda: len(started(folder)) >= 2)
    raise LookupError("the other task")


def held_inside(n_tasks, folder):
    """Make a call whose tasks are held, and leave files for them and for this one."""
    start(folder, f"outer-{os.getpid()}")
    return Parallel(n_jobs=-1, batch_size=1)(delayed(held)(i, folder) for i in range(n_tasks))


def held(i, folder):
    start(folder, f"inner-{os.getpid()}")
    wait_until((Path(folder) / "go").exists)
    return i


def pids_in_tasks(folder, kind):
    """Return the processes in which such tasks have started."""
    return {int(name.partition("-")[2]) for name in started(folder) if name.startswith(kind)}
