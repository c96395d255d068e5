"""What runs on the other side: load a task, keep to the thread limits, run it, pack what came out.

A worker never raises for what a task did: success and failure are both an outcome, so an executor below sees
exceptions only when it fails itself. Each task is loaded right before it runs and dropped right after, so a
worker holds the data of one task at a time.
"""

from __future__ import annotations

import pickle
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import cloudpickle
from joblib import parallel_config

from .budget import keep_limits, keep_thread_limits, limited
from .data.codec import Wire, describe, load
from .errors import RemoteTraceback, ResultPicklingError, TaskLoadError

__all__ = ["Outcome", "PackedOutcome", "run_here", "run_payload", "unpack"]


@dataclass(frozen=True)
class Outcome:
    """What became of a batch: its results, or the exception of the first task that failed."""

    results: list[Any] | None
    error: BaseException | None
    #: Seconds that the batch ran, without queueing and transfer.
    seconds: float


#: An outcome on its way back: whether it succeeded, the pickle of results or exception, seconds.
PackedOutcome = tuple[bool, bytes, float]


def run_here(function: Callable[[], Any], limits: dict[str, int], initializer: Callable[[], object] | None) -> Outcome:
    """Run a batch in this thread, which shares the parent's memory."""
    started = time.perf_counter()
    try:
        if initializer is not None:
            initializer()
        keep_thread_limits(limits)
        return Outcome(function(), None, time.perf_counter() - started)
    except BaseException as error:
        return Outcome(None, error, time.perf_counter() - started)


def run_payload(wire: Wire, *, owns_process: bool = True) -> PackedOutcome:
    """Run an encoded batch in this process and return its packed outcome. Called by executors in workers.

    A process that is not a worker's own (a Dask worker thread inside the parent) gets its thread limits back.
    """
    started = time.perf_counter()
    try:
        if owns_process:
            keep_limits(wire[3])
        with limited({} if owns_process else wire[3]):
            results = _run_tasks(wire, wire[3] if owns_process else {})
        packed = _pack_results(results)
    except BaseException as error:
        return False, _pack_error(error), time.perf_counter() - started
    return True, packed, time.perf_counter() - started


def unpack(outcome: PackedOutcome) -> Outcome:
    """Return the outcome of a batch; called in the parent.

    What a worker could pack and the parent cannot load becomes a :class:`ResultPicklingError`.
    """
    succeeded, packed, seconds = outcome
    try:
        loaded = pickle.loads(packed)
    except Exception as error:
        failure = ResultPicklingError(
            f"What a task returned or raised cannot be loaded here: {type(error).__name__}: {error}. "
            "Is it an object whose class cannot be rebuilt from its pickle?"
        )
        failure.__cause__ = error
        return Outcome(None, failure, seconds)
    if succeeded:
        return Outcome(loaded, None, seconds)
    raised, text = loaded
    raised.__cause__ = RemoteTraceback(text)
    return Outcome(None, raised, seconds)


def _run_tasks(wire: Wire, limits: dict[str, int]) -> list[Any]:
    function_pickles, task_pickles, nested, _, initializer = wire
    _initialize_once(initializer)
    backend, n_jobs = pickle.loads(nested)
    results: list[Any] = []
    with parallel_config(backend=backend, n_jobs=n_jobs):
        functions = [_load("function", *pickled) for pickled in function_pickles]
        for pickled in task_pickles:
            tasks = _load(f"task {len(results)}", *pickled)
            if limits:
                # Loading may have imported a library that was not there when the limits were set; else this is free.
                keep_limits(limits)
            results += [
                (functions[callee] if type(callee) is int else callee)(*args, **kwargs)
                for callee, args, kwargs in tasks
            ]
            del tasks
    return results


def _load(part: str, stream: bytes, refs: Any) -> Any:
    try:
        return load(stream, refs)
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


def _pack_results(results: list[Any]) -> bytes:
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
