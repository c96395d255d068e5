"""What runs on the other side: load a task, keep to the thread limits, run it, pack what came out.

A worker never raises for what a task did: success and failure are both an outcome, so an executor below sees
exceptions only when it fails itself. Each task is loaded right before it runs and dropped right after, so a
worker holds the data of one task at a time.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

import cloudpickle
from joblib import parallel_config

from .budget import Share, keep_limits, keep_thread_limits, limited, using
from .data.codec import Wire, describe, load
from .errors import BatchDataLostError, DataLostError, RemoteTraceback, ResultPicklingError, TaskLoadError
from .hearing import Heard, hearing, is_hearing_process
from .messages import Said
from .timeline.phases import Phase, gathered

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "Outcome",
    "PackedOutcome",
    "Spent",
    "Worker",
    "is_packing_results",
    "peak_nbytes_of_process",
    "run_here",
    "run_payload",
    "this_worker",
    "unpack",
]


class Worker(NamedTuple):
    """Who ran a batch."""

    host: str
    pid: int
    #: The thread, by the number that Python has for it.
    thread: int


class Spent(NamedTuple):
    """Seconds of a batch where it ran, without queueing and transfer."""

    wall: float = 0.0
    #: CPU time, of the thread, or of the process where that is the worker's own.
    cpu: float = 0.0
    #: Ready to run, and kept from it by a busy machine; 0 where the system does not tell.
    delay: float = 0.0
    #: When it began, on the ``time.perf_counter`` of the worker.
    started: float = 0.0
    #: The parts of ``wall`` that went into unpickling the tasks, and into pickling the results.
    load: float = 0.0
    pack: float = 0.0
    #: The largest size that the worker's own process has had until then; 0 where it is not asked, or not told.
    peak_nbytes: int = 0
    worker: Worker | None = None
    #: What the tasks noted of themselves.
    phases: Sequence[Phase] = ()


_NOTHING: Final = Spent()


@dataclass(frozen=True)
class Outcome:
    """What became of a batch: its results, or the exception of the first task that failed."""

    results: list[Any] | None
    error: BaseException | None
    spent: Spent = _NOTHING
    #: What the tasks said, where nobody could hear them.
    said: tuple[Said, ...] = ()
    #: Bytes in which the results came; 0 where memory is shared.
    nbytes: int = 0


#: An outcome on its way back: whether it succeeded, the pickle of results or exception, what it took, what was said.
PackedOutcome = tuple[bool, bytes, Spent, tuple[Said, ...]]


#: A batch that is shorter is not worth the 12 µs that it takes to ask the system how long its thread was kept waiting.
_TOO_SHORT_S: Final = 1e-3


#: Delays count if they were last asked for at most so many lengths of the batch ago: earlier ones are not the batch's.
_RECENT: Final = 1.2


class Stopwatch:
    """Measures what the calling thread spends."""

    def __init__(self, *, of_process: bool = False) -> None:
        self._of_process = of_process
        self._cpu_clock = time.process_time if of_process else time.thread_time
        self._schedstat = _Schedstat.of_this_thread()
        #: Seconds of unpickling and pickling, added by who does it.
        self.load = self.pack = 0.0
        self._cpu_before = self._cpu_clock()
        self._started = time.perf_counter()

    def spent(self, phases: Sequence[Phase] = ()) -> Spent:
        """Return what was spent since this object was made, in the same thread."""
        wall = time.perf_counter() - self._started
        cpu = self._cpu_clock() - self._cpu_before
        is_long = wall > _TOO_SHORT_S
        delay = self._schedstat.new_delay(wall) if is_long else 0.0
        peak_nbytes = peak_nbytes_of_process() if is_long and self._of_process else 0
        worker = self._schedstat.worker
        return Spent(wall, cpu, delay, self._started, self.load, self.pack, peak_nbytes, worker, phases)


class _Peak:
    """The largest size of this process, asked for seldom: that takes 20 µs."""

    EVERY_S: ClassVar[float] = 0.1
    asked: ClassVar[float] = -math.inf
    nbytes: ClassVar[int] = 0


def peak_nbytes_of_process(*, by_now: bool = False) -> int:
    """Return the largest size that this process has had in memory, until some 0.1 s ago; 0 where nobody tells."""
    now = time.monotonic()
    if by_now or now - _Peak.asked > _Peak.EVERY_S:
        _Peak.asked, _Peak.nbytes = now, _peak_nbytes()
    return _Peak.nbytes


def _peak_nbytes() -> int:
    # Not getrusage on Linux: what a large parent has had stays with a child that it has started.
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/status", "rb") as file:
        return int(file.read().partition(b"VmHWM:")[2].split()[0]) * 1024
    if resource is None or sys.platform == "linux":
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


class _Schedstat:
    """The file in which Linux tells how long a thread waited for a core; kept open: opening it takes 5 µs more."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.worker = Worker(socket.gethostname(), self.pid, threading.get_ident())
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self._last, self._read_at = self._read(), time.perf_counter()

    def __del__(self) -> None:
        # A child may have closed it, and have another file by that number now.
        if self._descriptor is not None and self.pid == os.getpid():
            os.close(self._descriptor)

    @classmethod
    def of_this_thread(cls) -> _Schedstat:
        schedstat: _Schedstat | None = getattr(_of_thread, "schedstat", None)
        # A forked child has its parent's file, which tells of the parent's thread.
        if schedstat is None or schedstat.pid != os.getpid():
            schedstat = _of_thread.schedstat = cls()
        return schedstat

    def new_delay(self, wall: float) -> float:
        """Return the seconds, of the last ``wall``, that the thread was ready to run and did not.

        0 if it was last asked long before those: then what it was kept waiting for belongs to others.
        """
        now = time.perf_counter()
        is_recent = now - self._read_at < _RECENT * wall
        before, self._last, self._read_at = self._last, self._read(), now
        return max(0.0, self._last - before) if is_recent else 0.0

    def _read(self) -> float:
        if self._descriptor is None:
            return 0.0
        try:
            return int(os.pread(self._descriptor, 96, 0).split()[1]) * 1e-9
        except (OSError, ValueError, IndexError):
            return 0.0


_of_thread = threading.local()


def this_worker() -> Worker:
    """Return who the calling thread is."""
    return _Schedstat.of_this_thread().worker


_is_packing: ContextVar[bool] = ContextVar("is_packing", default=False)


def run_here(function: Callable[[], Any], share: Share, initializer: Callable[[], object] | None) -> Outcome:
    """Run a batch in this thread, which shares the parent's memory.

    A thread that is not ours gets no limits here: it may be in a batch of an outer call, and have those of that.
    """
    watch = Stopwatch()
    with gathered() as phases:
        try:
            if initializer is not None:
                initializer()
            if share.limits:
                keep_thread_limits(share.limits)
            with using(share.cores):
                return Outcome(function(), None, watch.spent(phases))
        except BaseException as error:
            return Outcome(None, error, watch.spent(phases))


def run_payload(wire: Wire, *, owns_process: bool = True, is_alone: bool = True) -> PackedOutcome:
    """Run an encoded batch in this process and return its packed outcome. Called by executors in workers.

    A process that is not a worker's own (a Dask worker thread inside the parent) gets its thread limits back. One that
    is not ``is_alone`` runs tasks of others, too.
    """
    is_worker = owns_process or is_hearing_process()
    with hearing(wire[5], is_worker=is_worker, is_alone=owns_process and is_alone) as heard:
        succeeded, packed, spent = _run_heard(wire, owns_process, heard)
        return succeeded, packed, spent, heard.end()


def _run_heard(wire: Wire, owns_process: bool, heard: Heard) -> tuple[bool, bytes, Spent]:
    watch = Stopwatch(of_process=owns_process)
    cores, limits = wire[3]
    with gathered() as phases:
        try:
            if owns_process:
                keep_limits(limits)
            with limited({} if owns_process else limits), using(cores):
                results = _run_tasks(wire, limits if owns_process else {}, watch, heard)
            began = time.perf_counter()
            packed = _pack_results(results)
            watch.pack = time.perf_counter() - began
        except BaseException as error:
            return False, _pack_error(error), watch.spent(phases)
        return True, packed, watch.spent(phases)


def unpack(outcome: PackedOutcome) -> Outcome:
    """Return the outcome of a batch; called in the parent.

    What a worker could pack and the parent cannot load becomes a :class:`ResultPicklingError`.
    """
    succeeded, packed, spent, said = outcome
    try:
        loaded = pickle.loads(packed)
    except Exception as error:
        failure = ResultPicklingError(
            f"What a task returned or raised cannot be loaded here: {type(error).__name__}: {error}. "
            "Is it an object whose class cannot be rebuilt from its pickle?"
        )
        failure.__cause__ = error
        return Outcome(None, failure, spent, said)
    if succeeded:
        return Outcome(loaded, None, spent, said, len(packed))
    raised, text = loaded
    raised.__cause__ = RemoteTraceback(text)
    return Outcome(None, raised, spent, said)


def _run_tasks(wire: Wire, limits: dict[str, int], watch: Stopwatch, heard: Heard) -> list[Any]:
    function_pickles, task_pickles, nested, _, initializer, _ = wire
    _initialize_once(initializer)
    backend, n_jobs = pickle.loads(nested)
    results: list[Any] = []
    with parallel_config(backend=backend, n_jobs=n_jobs):
        began = time.perf_counter()
        functions = [_load("function", *pickled) for pickled in function_pickles]
        for pickled in task_pickles:
            tasks = _load(f"task {len(results)}", *pickled)
            watch.load += time.perf_counter() - began
            if limits:
                # Loading may have imported a library that was not there when the limits were set; else this is free.
                keep_limits(limits)
            results += [
                (functions[callee] if type(callee) is int else callee)(*args, **kwargs)
                for callee, args, kwargs in heard.each(tasks)
            ]
            del tasks
            began = time.perf_counter()
    return results


def _load(part: str, stream: bytes, refs: Any) -> Any:
    try:
        return load(stream, refs)
    except DataLostError as error:
        raise BatchDataLostError.like(error) from error
    except Exception as error:
        raise TaskLoadError(
            f"A worker could not load the {part} of a batch: {type(error).__name__}: {error}. {_load_hint(error)}"
        ) from error


def _load_hint(error: Exception) -> str:
    if isinstance(error, ImportError):
        name = error.name or "a module"
        return (
            f"The worker cannot import {name}: install it there, or put it on PYTHONPATH. If no task uses it, look "
            "for a filter in warnings.filters whose category is defined there: scikit-learn sends the filters along."
        )
    return "Can the arguments be unpickled in a fresh interpreter?"


_initialized: Final[set[bytes]] = set()
_initializing: Final = threading.Lock()


def _initialize_once(initializer: bytes) -> None:
    """Run the initializer if this process has not; its pickle is its identity.

    Dask workers run several threads in a process: all wait until the first has finished.
    """
    if initializer and initializer not in _initialized:
        with _initializing:
            if initializer not in _initialized:
                function, args = pickle.loads(initializer)
                function(*args)
                _initialized.add(initializer)


def is_packing_results() -> bool:
    """Return whether what is being pickled in this thread goes back to the parent."""
    return _is_packing.get()


def _pack_results(results: list[Any]) -> bytes:
    token = _is_packing.set(True)
    try:
        return _pickle_results(results)
    finally:
        _is_packing.reset(token)


def _pickle_results(results: list[Any]) -> bytes:
    try:
        return bytes(cloudpickle.dumps(results, protocol=5))
    except Exception as error:
        for index, result in enumerate(results):
            problem = _pickling_problem(result)
            if problem is not None:
                raise ResultPicklingError(
                    f"The result of the task {index} of a batch, a {type(result).__name__}, cannot be pickled: "
                    f"{problem}. Return what it is made from, or run on threads with prefer='threads'."
                ) from error
        raise ResultPicklingError(f"The results of a batch cannot be pickled: {error}.") from error


def _pickling_problem(result: Any) -> Exception | None:
    try:
        cloudpickle.dumps(result, protocol=5)
    except Exception as error:
        return error
    return None


def _pack_error(error: BaseException) -> bytes:
    """Return the exception and its formatted traceback as bytes.

    An exception that cannot make the way there and back is replaced by one that says so, with its text: loky would
    lose the worker over it.
    """
    text = "".join(traceback.format_exception(error))
    try:
        packed = bytes(cloudpickle.dumps((error, text), protocol=5))
        pickle.loads(packed)
    except Exception as problem:
        name = f"{type(error).__module__}.{type(error).__qualname__}"
        replacement = ResultPicklingError(
            f"A task raised {name}: {_text_of(error)}. The exception itself cannot be pickled ({problem}): its class "
            "should pass all arguments of __init__ on to super().__init__()."
        )
        return bytes(cloudpickle.dumps((replacement, text), protocol=5))
    return packed


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the user's own __str__; to fail here would lose the error that the user must see
        return "<its text cannot be made>"


def task_names(function: Any) -> str:
    """Return what a batch runs, for reports and messages."""
    items = getattr(function, "items", None)
    return describe(items[0][0]) if items else describe(function)
