"""Records the tasks of real code, one after the other, for ``scaling.py``: what each takes alone, and what it holds up.

The GIL: two copies on two threads take longer than one if a task holds it for more than half of its time; a smaller
share does not show that way. So beside the task another thread does nothing but hold the GIL when it can get it: what
it did not get, the task had. That counts too much for a task that often lets go, because each handing over takes its
time: of the two numbers the lesser counts. Time in which a thread was ready to run and the machine was busy is left
out. That is too much where both wait at once, and too little where the one that has the GIL does: of several rounds the
median counts.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from statistics import median
from time import perf_counter
from typing import Any, Final, NamedTuple

import numpy as np
from joblib import Parallel, delayed, parallel_config
from joblib._parallel_backends import ParallelBackendBase
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits
from workloads.arrays import total
from workloads.data import blobs, digits
from workloads.tasks import collatz
from workloads.text import documents, tfidf
from workloads.waiting import fetch

from joblib_backends.kinds import kind_of
from joblib_backends.thread_safety import may_run_on_threads
from joblib_backends.worker import Spent, Stopwatch

#: How often what cannot be read off one run is measured.
_ROUNDS: Final = 3

#: Seconds that are run for the share of the GIL, at least.
_SAMPLE_S: Final = 0.06

#: A task that lets go of the GIL waits for so long each time; a thread that waits looks up as often, which costs it
#: some 20 µs that are not the task's.
_SWITCH_INTERVAL_S: Final = 2e-3

Items = list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]


class Source(NamedTuple):
    """Code whose tasks are recorded."""

    about: str
    run: Callable[[], object]
    #: Tasks measured together, where one is shorter than a look at the clocks.
    together: int = 1
    #: Whether a task has threads of its own.
    has_threads: bool = False


def _requests() -> object:
    return Parallel(n_jobs=2)(delayed(fetch)(0.05, i) for i in range(100))


def _square_roots() -> object:
    return Parallel(n_jobs=2)(delayed(sqrt)(i**2) for i in range(5_000))


def _one_row() -> object:
    rows, labels = blobs(1_000)
    return RandomForestClassifier(100, random_state=0, n_jobs=2).fit(rows, labels).predict_proba(rows[:1])


def _search() -> object:
    parameters = {"C": [1, 10, 100], "gamma": [1e-4, 1e-3]}
    return GridSearchCV(SVC(), parameters, cv=5, n_jobs=2, refit=False).fit(*digits())


def _texts() -> object:
    texts, _ = documents(3_600)
    return Parallel(n_jobs=2)(delayed(tfidf)(texts[i : i + 150]) for i in range(0, len(texts), 150))


def _boosting() -> object:
    return cross_val_score(HistGradientBoostingClassifier(max_iter=40, random_state=0), *blobs(3_000), cv=5, n_jobs=2)


def _importance() -> object:
    rows, labels = blobs(800)
    forest = RandomForestClassifier(20, random_state=0).fit(rows, labels)
    return permutation_importance(forest, rows, labels, n_repeats=4, random_state=0, n_jobs=2)


def _mixed() -> object:
    sizes = [400] * 60 + [40_000] + [400] * 39
    return Parallel(n_jobs=2)(delayed(collatz)(5_000, size) for size in sizes)


def _sums() -> object:
    data = np.random.default_rng(0).integers(-1_000, 1_000, 10_000_000).astype(float)
    return Parallel(n_jobs=2)(delayed(total)(data, power) for power in range(24))


SOURCES: Final = {
    "square roots": Source("5,000 of `math.sqrt`, user's code", _square_roots, together=100),
    "forest, one row": Source("100 trees of a forest predict one row", _one_row, together=10),
    "svc search": Source("30 fits of SVC on digits, `GridSearchCV`", _search),
    "tf-idf": Source("24 texts, `TfidfVectorizer` in the user's function", _texts),
    "boosting": Source("5 folds of HistGradientBoosting, OpenMP inside", _boosting, has_threads=True),
    "importance": Source("20 features, `permutation_importance` of a forest", _importance),
    "requests": Source("100 waits of 50 ms, user's code", _requests),
    "mixed lengths": Source("100 loops in pure Python, one 100 times the others", _mixed),
    "array sums": Source("24 sums over one array of 80 MB, user's code", _sums),
}


class Recorder(ParallelBackendBase):  # type: ignore[misc]
    """joblib backend that runs each batch when its result is wanted, and keeps what it spent.

    Of a run it takes the ``Parallel`` calls for more than one job: what came before, such as fitting what is to
    predict, is dropped with each new call.
    """

    supports_sharedmem = True

    def __init__(self, together: int) -> None:
        super().__init__(nesting_level=0)
        self._together = together
        self.items: Items = []
        self.is_trusted = True
        self.spent: list[tuple[int, Spent]] = []
        self.require: str | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return two for whoever asks for several: one would pass this backend by."""
        return 1 if n_jobs in (None, 1) else 2

    def configure(self, n_jobs: int = 1, parallel: Any = None, require: str | None = None, **options: Any) -> int:
        """Note the call's demands."""
        if self.effective_n_jobs(n_jobs) > 1:
            self.items, self.spent, self.require, self.is_trusted = [], [], require, True
        self.parallel = parallel
        return self.effective_n_jobs(n_jobs)

    def compute_batch_size(self) -> int:
        """Return how many tasks are measured together."""
        return self._together

    def submit(self, func: Any, callback: Any = None) -> Any:
        """Take a batch."""
        return func, callback

    def retrieve_result(self, out: Any, timeout: float | None = None) -> list[Any]:
        """Run a batch without joblib's part in it, measure it, and let joblib send the next."""
        batch, callback = out
        # Asked before it runs, as the pilot does: what a task leaves in its arguments is not known to be safe.
        self.is_trusted = self.is_trusted and may_run_on_threads(batch.items)
        watch = Stopwatch()
        results = [function(*args, **kwargs) for function, args, kwargs in batch.items]
        self.spent.append((len(batch.items), watch.spent()))
        self.items.extend(batch.items)
        callback(out)
        return results


def record(source: Source) -> dict[str, Any]:
    """Run the code and return what its tasks are and took."""
    recorder = Recorder(source.together)
    with threadpool_limits(1), parallel_config(backend=recorder):
        for _ in range(2):  # the first is slower, and its calls are dropped
            source.run()
    sample = recorder.items[: source.together]
    with threadpool_limits(1):
        two_copies, gil_share = _gil_share(sample)
    return {
        "about": source.about,
        # Tasks that were measured together: how many, seconds, seconds of CPU time, each of one.
        "tasks": [_line(n_tasks, spent) for n_tasks, spent in recorder.spent],
        "trusted_on_threads": recorder.is_trusted,
        "require": recorder.require,
        "nbytes": kind_of(_Batch(sample), 2).nbytes,
        "two_copies": round(two_copies, 3),
        "gil_share": round(gil_share, 3),
        "parallel_fraction": round(_parallel_fraction(sample), 3) if source.has_threads else 0.0,
    }


@dataclass(frozen=True)
class _Batch:
    """What ``kind_of`` looks at."""

    items: Items

    def __call__(self) -> object:
        """Do nothing: it is only looked at."""
        return None


def _line(n_tasks: int, spent: Spent) -> list[float]:
    wall_s = _seconds(spent)
    return [n_tasks, round(wall_s / n_tasks, 9), round(min(spent.cpu, wall_s) / n_tasks, 9)]


def _seconds(spent: Spent) -> float:
    """Return the time without that in which the machine was busy with others."""
    return max(spent.wall - spent.delay, min(spent.cpu, spent.wall))


def _run(items: Items, times: int = 1) -> Spent:
    """Run tasks and return what they spent."""
    watch = Stopwatch()
    for _ in range(times):
        for function, args, kwargs in items:
            function(*args, **kwargs)
    return watch.spent()


def _copy(items: Items) -> Items:
    """Return tasks that share nothing with the first; those of a shared-memory call may share all they have."""
    try:
        return pickle.loads(pickle.dumps(items))  # type: ignore[no-any-return]
    except TypeError:
        return items


def _gil_share(items: Items) -> tuple[float, float]:
    """Return how much longer two copies on two threads take than one, and the part of its time one holds the GIL."""
    times = max(1, int(_SAMPLE_S / _seconds(_run(items))))
    runs = [_run(items, times) for _ in range(_ROUNDS)]
    alone = min(runs, key=_seconds)
    alone_s, cpu_s = _seconds(alone), alone.cpu
    copies = [items, _copy(items)]
    with _short_turns():
        kept_s = median(_kept(copies, times) for _ in range(_ROUNDS)) - (alone_s - cpu_s)
        held = median(_held(items, times) for _ in range(_ROUNDS)) * cpu_s / alone_s
    two_copies = 1.0 + max(0.0, kept_s) / alone_s
    return two_copies, min(1.0, max(held, 0.0), max(0.5, two_copies / 2))


def _waited(spent: Spent) -> float:
    """Return the seconds in which a thread neither ran nor waited for a core: for the GIL, or for what it asked for."""
    return spent.wall - spent.delay - spent.cpu


def _kept(copies: list[Items], times: int) -> float:
    """Return the seconds for which the slower of two copies on two threads waited for anything but a core."""
    seconds: list[float] = []
    ready = threading.Barrier(len(copies))

    def run(core: int) -> None:
        _stay_on(core)
        with threadpool_limits(1):  # OpenMP's holds for a thread
            ready.wait()
            seconds.append(_waited(_run(copies[core], times)))

    _in_threads([partial(run, core) for core in range(len(copies))])
    return max(seconds)


def _in_threads(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _stay_on(core: int) -> None:
    """Keep this thread to a core: one that waits for the core of the thread that has the GIL looks as if it did not."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})


def _held(items: Items, times: int) -> float:
    """Return the part of their CPU time for which tasks held the GIL: that a thread which always wants it misses."""
    ready, stop = threading.Barrier(2), threading.Event()
    missed: list[float] = []
    spent: list[Spent] = []

    def spin() -> None:
        _stay_on(1)
        ready.wait()
        watch = Stopwatch()
        while not stop.is_set():
            pass
        missed.append(_waited(watch.spent()))

    def run() -> None:
        _stay_on(0)
        with threadpool_limits(1):
            ready.wait()
            spent.append(_run(items, times))
            stop.set()

    _in_threads([spin, run])
    return missed[0] / spent[0].cpu


@contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _parallel_fraction(items: Items) -> float:
    """Return the part of a task that two threads of its own divide, by Amdahl."""
    seconds = {}
    for n_threads in (1, 2):
        with threadpool_limits(n_threads):
            seconds[n_threads] = min(_elapsed(items) for _ in range(_ROUNDS))
    return min(1.0, max(0.0, 2.0 * (1.0 - seconds[2] / seconds[1])))


def _elapsed(items: Items) -> float:
    start = perf_counter()
    for function, args, kwargs in items:
        function(*args, **kwargs)
    return perf_counter() - start
