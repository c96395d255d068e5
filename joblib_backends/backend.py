"""joblib's ``ParallelBackendBase`` contract, and nothing else. The only file that uses joblib's private names.

One :class:`HybridBackend` may serve several ``Parallel`` objects at once, so nothing of a call lives on it: the
first ``configure`` puts a copy, bound to the one ``Parallel`` object, in its place (joblib's ``FallbackToBackend``
is the door that joblib offers for that), and ``start_call`` makes the :class:`~joblib_backends.scheduler.Call`.

Latency: with ``supports_retrieve_callback = True`` joblib's main thread polls every 10 ms; with False it blocks in
``retrieve_result``, and a warm two-task call takes a fraction of a millisecond (benchmarks, row "two tasks"). Only
``generator_unordered`` needs the former, so each bound copy sets the flag for its ``Parallel``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import queue
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from joblib import parallel as joblib_parallel
from joblib._parallel_backends import FallbackToBackend, ParallelBackendBase, SequentialBackend
from joblib.disk import memstr_to_bytes

from .batches import BatchFuture, Callback
from .budget import available_cores, cores_per_task, is_daemonic, resolve_n_jobs
from .config import Config
from .context import Context
from .errors import ClusterUnavailableError, ConfigurationError, EnvironmentWarning
from .pilot import Pilot
from .profile import Profile
from .recovery import warn
from .report import CallReport, record
from .rules import Facts, choose_tier
from .scheduler import Call
from .tally import Tally
from .tiers import load_tier, tier_names
from .timeline.model import Timeline

if TYPE_CHECKING:
    from .checkpoint.call import CallCheckpoint
    from .progress import Progress

__all__ = ["HybridBackend"]

_log = logging.getLogger(__name__)

#: What joblib passes to every backend and this one has no use for.
_IGNORED_KEYWORDS: Final = ("context", "verbose")

#: joblib's own, which a tier may replace; what a user writes is left alone.
_DEFAULT_PRE_DISPATCH: Final = inspect.signature(joblib_parallel.Parallel).parameters["pre_dispatch"].default

#: Values of ``pre_dispatch``, without blanks, that nobody has chosen: joblib's and scikit-learn's defaults.
_OPEN_PRE_DISPATCH: Final = frozenset({"2*n_jobs", "10*n_jobs"})

#: What ``iter`` makes of containers.
_PLAIN_ITERATORS: Final[tuple[type, ...]] = (type(iter([])), type(iter(())), type(None))

#: Nesting level from which an explicit n_jobs gets no more than its share of cores: there joblib's own backends run
#: everything sequentially, against thread bombs.
_CAPPED_LEVEL: Final = 2

#: Tiers that nested calls inherit. Other tiers leave them the choice within their worker.
_INHERITED_TIERS: Final = ("inline", "threads")


class HybridBackend(ParallelBackendBase):  # type: ignore[misc]
    """joblib backend that runs batches on threads, process workers or a Dask cluster.

    Parameters
    ----------
    tier : str, default="auto"
        Where batches run: "auto", "inline" (the caller's own thread), "threads", "processes", "dask", or the name
        of a registered tier. "auto" takes Dask if a client or address is given or a client is active in this
        process. Otherwise the cheapest of what is allowed: the caller's own thread where it waits for a list;
        threads if the call asks for them or its function and all it works on are scikit-learn's own; processes.
    scatter : list, optional
        Objects to place where workers read them, before the first batch: arrays of any order and dtype, pandas
        and Arrow tables, SciPy sparse matrices, lists, memmaps; on Dask also Dask collections and futures. Any
        buffer of at least `max_nbytes` is placed automatically; `scatter` does it for all sizes and ahead of time.
        Any other object, such as a model or a list of them, is pickled once for a call and not with each task: what
        is changed in it while the call runs is not seen, but for its arrays.
    client : distributed.Client, optional
        The Dask client to use.
    scheduler : str or path, optional
        The Dask scheduler to use: an address such as ``"tcp://host:8786"`` or ``"tls://host:8786"``, the path of a
        scheduler file, or "local" for a cluster on this machine, started on request: one process per core with one
        thread, shared by all calls, gone when it was idle for `idle_worker_timeout` seconds, and with this process.
        Where ``tier="dask"`` names no cluster, the active client is used, then Dask's ``DASK_SCHEDULER_ADDRESS``.
    workers : list of str, optional
        Names, addresses or hosts of the Dask workers that may run tasks. By default all of them.
    resources : dict, optional
        What a task takes of its Dask worker's resources while it runs, such as ``{"GPU": 1}``: only workers that
        were started with as much run tasks, as many at once as there is room for.
    priority : float, default=0
        Which tasks come first on a Dask cluster that several programs use: those with the higher number.
    inner_max_num_threads : int, optional
        Threads of BLAS and OpenMP in each task. By default each task gets its share of the cores.
    initializer : callable, optional
        Called as ``initializer(*initargs)`` once in each worker before its first task.
    initargs : tuple, default=()
        Its arguments.
    wait_for_workers : float, default=10.0
        Seconds to wait for a Dask scheduler and its first worker, and for which a cluster may be without any later.
    security : distributed.Security, optional
        Certificates for a `scheduler` that wants TLS. By default those of Dask's own configuration.
    fallback : bool, default=True
        Whether a call goes on on this machine, with a :class:`RecoveryWarning`, when its Dask cluster cannot be
        reached, ends, or has no worker any more. False makes that an error.
    retries : int, default=2
        How often a task is run again whose worker died; the last time, if it was by itself before, while nothing else
        of the call runs. After that it is given up. Tasks of one batch are first run by themselves, even with 0.
    task_timeout : float, optional
        Seconds that one task may run. Then its worker is replaced and the task given up; its thread is left to itself
        with ``tier="threads"``. By default a task may run for ever.
    checkpoint : str or path, optional
        File in which the results of finished tasks are kept. The same script, run again, runs only what is not there.
        One file may serve many calls, and several processes at a time.
    idle_worker_timeout : float, default=300.0
        Seconds after which an idle process worker ends, and the cluster of ``scheduler="local"``.
    share_fits : bool, default=True
        Whether the common first steps of pipelines are fitted once for all candidates of a search (GridSearchCV and
        others that use scikit-learn's own function to fit and score), with the same results. A step with
        ``random_state=None`` is then drawn once, as with a pipeline's ``memory=``.
    share_fits_nbytes : int or str, optional
        Bytes that results of such steps may take at a time, as files in shared memory. By default a tenth of the
        machine's memory.
    progress : bool or "always", default=False
        Whether each outermost call shows a bar on standard error: what runs, how much of it is done, and how long the
        rest will take. True shows it in a terminal or a notebook, "always" writes it to files, too. There is none for
        calls with `verbose`, which print lines, with scikit-learn's callbacks, which draw their own, or ``n_jobs=1``.
    record : bool, default=True
        Whether the batches of each outermost call are recorded, so that ``last_report().save("run.html")`` can show
        who did what and when. It takes 0.5 kB for each, of the last 200,000, and 4 to 10 µs. The figures of reports are
        counted in any case.
    trace : str or path, optional
        File to which each outermost call of the process is added when it ends, in the Chrome trace-event format:
        https://ui.perfetto.dev shows it, ``python -m joblib_backends report`` prints it and makes pages of it. The
        first call of a process replaces the trace that is there; that of a process that still runs stays, and so does
        a file that is no trace.
    temp_folder, max_nbytes, mmap_mode
        As in :class:`joblib.Parallel`, which passes its own with every call. With the default mode "r" (and "c")
        each task sees a private, writable copy-on-write view; "r+" and "w+" share one writable copy among the
        tasks of a call; None places nothing.

    Raises
    ------
    ConfigurationError
        If a parameter, or its ``JOBLIB_BACKEND_<PARAMETER>`` variable, has a value that cannot be used.

    Notes
    -----
    A task that is given up gets the ``error_score`` of its search, with a warning, where that is a number. Any other
    call ends with :class:`WorkerLostError` or :class:`TaskTimeoutError`, which names it, when all other tasks are done.

    Thread-safe. What was placed and the workers that were started are kept for the next call while the ``with``
    block (or whoever holds the backend) lasts, and are gone after it.

    Examples
    --------
    >>> import joblib_backends
    >>> from joblib import Parallel, delayed, parallel_backend
    >>> with parallel_backend("hybrid", tier="threads"):
    ...     Parallel()(delayed(abs)(i) for i in range(-3, 0))
    [3, 2, 1]
    """

    supports_inner_max_num_threads = True
    supports_sharedmem = True
    supports_timeout = True
    supports_return_generator = True
    supports_retrieve_callback = False
    default_n_jobs = -1

    #: As the default of a process, joblib must not send prefer="threads" to another backend (activation.py).
    uses_threads = True

    def __init__(
        self,
        tier: str | None = None,
        *,
        scatter: list[Any] | None = None,
        client: Any = None,
        scheduler: str | os.PathLike[str] | None = None,
        inner_max_num_threads: int | None = None,
        nesting_level: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        given = {"tier": tier, "scatter": scatter, "client": client, "scheduler": scheduler, **options}
        given["inner_max_num_threads"] = inner_max_num_threads
        source = "JOBLIB_BACKEND_TIER" if tier is None else "tier"
        self.config = _with_known_tier(Config.from_options(_in_bytes(given)), source)
        self._given = frozenset(name for name, value in given.items() if value is not None)
        # joblib gives a level when it makes a backend for one Parallel object, or as the default. Such a one lives
        # too briefly to keep anything, and shares what the process keeps.
        self._context = Context.of_calls() if nesting_level is None else Context.of_process()
        self._bind_to_nothing()

    def _bind_to_nothing(self) -> None:
        self._parallel_ref: Callable[[], Any] = _no_parallel
        self._look_around()
        self._workers = 1
        self._nested: tuple[HybridBackend, None] | None = None
        self._call: Call | None = None
        self._own_pre_dispatch = _DEFAULT_PRE_DISPATCH

    def _look_around(self) -> None:
        self._call_config = _in_outer_task(self.config)
        self._facts = self._observe(self._call_config)

    def __repr__(self) -> str:
        call = f" {self._call!r}" if self._call else ""
        return f"<HybridBackend tier={self.config.tier!r} nesting_level={self.nesting_level}{call}>"

    def __reduce__(self) -> Any:
        config = self.config
        portable = Config(
            config.tier,
            idle_worker_timeout=config.idle_worker_timeout,
            cores=config.cores,
            retries=config.retries,
            share_fits=config.share_fits,
            share_fits_nbytes=config.share_fits_nbytes,
            workers=config.workers,
            priority=config.priority,
            wait_for_workers=config.wait_for_workers,
        )
        return _nested_backend, (portable, self.nesting_level)

    def close(self) -> None:
        """Let go now of what was placed and started for this backend, as the end of the ``with`` block does."""
        self._context.scope.release()
        self._context.warm.clear()

    # ---- joblib asks how many

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many batches can run at once for ``n_jobs``; joblib and scikit-learn call it at any time.

        Raises
        ------
        ConfigurationError
            If ``n_jobs`` is 0.
        """
        if n_jobs == 0:
            raise ConfigurationError(
                "n_jobs == 0 in Parallel has no meaning: use n_jobs=-1 for all cores, n_jobs=1 for a plain loop."
            )
        if self._parallel_ref is _no_parallel:
            # Asked ahead of a call, and perhaps in another task than the one for which this was made.
            self._look_around()
        n_jobs = self.default_n_jobs if n_jobs is None else n_jobs
        plan = choose_tier(self._facts)
        if n_jobs == 1 or plan.tier == "inline" or self._is_local_choice():
            return resolve_n_jobs(n_jobs, available_cores(self._call_config))
        try:
            capacity = load_tier(plan.tier).capacity(self._call_config)
        except ClusterUnavailableError:
            if not self._call_config.fallback:
                raise
            return resolve_n_jobs(n_jobs, available_cores(self._call_config))
        resolved = resolve_n_jobs(n_jobs, capacity)
        return min(resolved, capacity) if self._is_capped() else resolved

    def _is_local_choice(self) -> bool:
        """Whether any local tier may be chosen: none is loaded just to count the cores of this machine."""
        return self._facts.tier == "auto" and not self._facts.wants_cluster and not self._is_capped()

    def _is_capped(self) -> bool:
        # scikit-learn asks how many jobs a cluster runs and then wants so many threads of this machine.
        # And a task has its share of a cluster's slots, however many jobs are asked for.
        is_apart = self._facts.require == "sharedmem" or bool(self.nesting_level)
        return (is_apart and self._facts.wants_cluster) or (self.nesting_level or 0) >= _CAPPED_LEVEL

    def _observe(self, config: Config, prefer: str | None = None, require: str | None = None) -> Facts:
        return facts_of(config, self.nesting_level, prefer, require)

    # ---- joblib configures, starts and ends

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: str | None = None,
        require: str | None = None,
        **keywords: Any,
    ) -> int:
        """Bind to ``parallel`` at the first call, then return how many batches may run at once."""
        if self._parallel_ref() is not parallel:
            raise FallbackToBackend(self._bound_to(parallel))
        options = self._options_of_call(keywords)
        config = _in_outer_task(_with_known_tier(self.config.override(options), "tier"))
        _check_sharedmem(config, require, options)
        self._call_config = config
        self._facts = self._observe(config, prefer, require)
        if n_jobs != 1:
            self._leave_missing_cluster()
        workers = self.effective_n_jobs(n_jobs)
        if n_jobs == -1 and workers == 1 and choose_tier(self._facts).tier == "dask":
            # joblib runs a single job in this process, but a cluster of one slot may have what its tasks need, or grow.
            # Of two batches that are there, Dask runs one at a time.
            workers = 2
        if workers == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self._nested = (self._make_nested(workers), None)
        self._workers = workers
        return workers

    def _leave_missing_cluster(self) -> None:
        """Plan the call without its Dask cluster if that cannot be reached."""
        config, tier = self._call_config, choose_tier(self._facts).tier
        if tier != "dask":
            return
        self._context.leave_to_parent()
        try:
            # Held from now on: joblib asks for the capacity several times before a call opens the tier.
            held = load_tier(tier).hold(config)
            if held is not None:
                self._context.warm[tier] = held
            load_tier(tier).capacity(config)
        except ClusterUnavailableError as error:
            # What is on the cluster only cannot be had here.
            if not config.fallback or any(map(load_tier(tier).is_remote, config.scatter)):
                raise
            self._facts = dataclasses.replace(self._facts, cluster_is_lost=True)
            warn(f"The call runs on this machine (fallback=False makes this an error). {error}")

    def _bound_to(self, parallel: Any) -> HybridBackend:
        bound = object.__new__(type(self))  # not copy.copy, which would go through __reduce__
        bound.__dict__.update(self.__dict__)
        # Weak, or the cycle would keep the context's workers and files until the garbage collector comes by.
        bound._parallel_ref = weakref.ref(parallel)
        bound.parallel = weakref.proxy(parallel)
        bound.supports_retrieve_callback = parallel.return_as == "generator_unordered"
        return bound

    def _options_of_call(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Return what this call sets: joblib passes its own defaults too, which do not outdo our constructor's."""
        options = {name: value for name, value in keywords.items() if name not in _IGNORED_KEYWORDS}
        defaults = joblib_parallel.default_parallel_config
        for name in self._given & options.keys() & defaults.keys():
            if options[name] == _in_bytes({name: defaults[name].default_value})[name]:
                del options[name]
        if self.inner_max_num_threads is not None:
            options["inner_max_num_threads"] = self.inner_max_num_threads
        return options

    def _make_nested(self, workers: int) -> HybridBackend:
        """Return the backend of calls inside a task: its share of the cores, and one job where none is asked for."""
        config = self._call_config
        # The cores of this machine say nothing about those of a cluster's workers.
        cores = 1 if self._facts.wants_cluster else cores_per_task(available_cores(config), workers)
        tier = config.tier if config.tier in _INHERITED_TIERS else "auto"
        limit = None if config.share_fits_nbytes is None else config.share_fits_nbytes // workers
        inherited = Config(
            tier=tier,
            idle_worker_timeout=config.idle_worker_timeout,
            cores=cores,
            retries=config.retries,
            share_fits=config.share_fits,
            share_fits_nbytes=limit,
            workers=config.workers,
            priority=config.priority,
            wait_for_workers=config.wait_for_workers,
        )
        return _nested_backend(inherited, (self.nesting_level or 0) + 1, self._context)

    def get_nested_backend(self) -> tuple[Any, None]:
        """Return the backend, and n_jobs, for ``Parallel`` calls inside tasks; joblib asks once per batch."""
        assert self._nested is not None
        return self._nested

    def start_call(self) -> None:
        """Open a call."""
        self._context.leave_to_parent()
        # joblib keeps here what an aborted call of the same Parallel had not sent yet, and would send it with this one.
        self.parallel._ready_batches = queue.SimpleQueue()
        self._widen_pre_dispatch()
        config, parallel = self._call_config, self.parallel
        facts = dataclasses.replace(
            self._facts,
            caller_waits=parallel.return_as == "list",
            has_timeout=parallel.timeout is not None,
            has_task_timeout=config.task_timeout is not None,
            n_jobs=self._workers,
            cores=available_cores(config),
        )
        # What happens inside a task depends on what runs beside it: nothing is learned there.
        profile = None if self.nesting_level else Profile.shared()
        self._call = Call(
            config,
            self._workers,
            Pilot(facts, config, profile, parallel.n_tasks),
            self._context.scope,
            self._context.warm,
            return_as=parallel.return_as,
            more_to_come=functools.partial(_more_to_come, self._parallel_ref),
            is_lazy=functools.partial(_is_lazy, self._parallel_ref),
            take_more=functools.partial(_take_more, self._parallel_ref),
            dispatch_next=functools.partial(_dispatch_next, self._parallel_ref),
            checkpoint=self._open_checkpoint(),
            progress=self._progress_of_call(),
            # Calls inside a task are part of it.
            records=not self.nesting_level and config.record,
        )

    def _progress_of_call(self) -> Callable[[Tally], Progress] | None:
        # Calls inside a task are part of it; and where lines are printed, these tell.
        when, parallel = self._call_config.progress, self.parallel
        if not when or self.nesting_level or parallel.verbose:
            return None
        from .progress import Progress

        return functools.partial(Progress, when, n_tasks=parallel.n_tasks)

    def _open_checkpoint(self) -> CallCheckpoint | None:
        # Calls inside a task are part of it.
        path = None if self.nesting_level else self._call_config.checkpoint
        if path is None:
            return None
        from .checkpoint.call import CallCheckpoint, ContextCheckpoint

        shared = ContextCheckpoint.of(self._context.warm, path)
        return None if shared is None else CallCheckpoint(shared)

    def _widen_pre_dispatch(self) -> None:
        # joblib reads the attribute after start_call. It is set for each call, so it needs no setting back.
        is_local = self._is_local_choice()
        per_job = None if is_local else load_tier(choose_tier(self._facts).tier).pre_dispatch_per_job
        if self.parallel.pre_dispatch in (_DEFAULT_PRE_DISPATCH, self._own_pre_dispatch):
            self._own_pre_dispatch = _DEFAULT_PRE_DISPATCH if per_job is None else f"{per_job} * n_jobs"
            self.parallel.pre_dispatch = self._own_pre_dispatch

    def stop_call(self) -> None:
        """End the call, and keep its report if it is an outermost one."""
        call = self._call
        if call is not None:
            # Kept until it has ended: Ctrl-C inside of it leaves the rest to ``terminate``.
            report = call.end()
            self._call = None
            if not self.nesting_level:
                record(report)
                self._trace(report)

    def _trace(self, report: CallReport) -> None:
        path = self._call_config.trace
        if path is None:
            return
        from .timeline.trace_file import TraceFile

        try:
            written = TraceFile.add(path, report.to_dict(), report.timeline or Timeline())
            _log.debug("The call of %s was added to the trace %s", report.function, written)
            if written != Path(path).absolute():
                raise FileExistsError(
                    f"a process that runs is writing there, so the calls of this one are in {written}"
                )
        except Exception as error:
            # A call that is done is not lost over its picture, nor by a filter that makes the warning an error.
            text = f"The trace {os.fspath(path)!r} cannot be written: {error}. The call itself is done."
            with contextlib.suppress(EnvironmentWarning):
                warnings.warn(text, EnvironmentWarning, stacklevel=2)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Give up the call; the next ``start_call`` opens another, with the same settings."""
        if self._call is not None:
            self._call.abort()

    def terminate(self) -> None:
        """End what ``stop_call`` did not; joblib may call it more than once."""
        self.stop_call()

    # ---- joblib submits and retrieves

    def compute_batch_size(self) -> int:
        """Return how many tasks the next batches are to hold, with ``batch_size="auto"``."""
        if self._call is None:
            return 1
        # joblib cuts the end of a call into ten batches for each job. The calling thread alone is one job.
        self.parallel._cached_effective_n_jobs = 1 if self._call.runs_in_caller else self._workers
        return self._call.batch_size()

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        """Note that joblib begins to wait; it has handed over what it does before."""
        if self._call is not None and self.supports_retrieve_callback:
            # In this form it asks for no result before it is there.
            self._call.leave_slot()
        yield

    def submit(self, func: Callable[[], Any], callback: Callback | None = None) -> BatchFuture:
        """Start a batch. Called from the user's thread, and from the completion thread by joblib's callback."""
        call = self._call
        if call is None:
            raise RuntimeError("A batch was submitted to the hybrid backend outside of a call.")
        if callback is not None:
            callback = functools.partial(_call_back, self.parallel, callback)
        return call.submit(func, callback, self.get_nested_backend())

    def retrieve_result(self, out: BatchFuture | None, timeout: float | None = None) -> list[Any]:
        """Return the results of a batch; joblib calls it in the user's thread, in order."""
        assert self._call is not None
        return self._call.retrieve(out, timeout)

    def retrieve_result_callback(self, out: BatchFuture) -> list[Any]:
        """Return the results of a finished batch; joblib calls it from its callback (``generator_unordered``)."""
        return out.result()


def _more_to_come(parallel_ref: Callable[[], Any], caller_came: bool) -> bool:
    """Return whether the user's generator may still yield tasks.

    joblib learns it when it asks for more than there is. Before it does, it has taken fewer than it wanted to at first.
    """
    parallel = parallel_ref()
    if parallel is None or parallel._original_iterator is None:
        return parallel is not None and not caller_came
    return not caller_came or bool(parallel.n_dispatched_tasks >= parallel._pre_dispatch_amount)


def _take_more(parallel_ref: Callable[[], Any]) -> bool:
    """Take the next tasks of the input ahead of joblib's ``pre_dispatch``; return whether to go on with that."""
    parallel = parallel_ref()
    if parallel is None or parallel._aborting or parallel._original_iterator is None:
        return False
    if "".join(str(parallel.pre_dispatch).split()) not in _OPEN_PRE_DISPATCH:
        # The user has decided how much of the input may exist at a time.
        return False
    return _dispatch_next(parallel_ref)


def _dispatch_next(parallel_ref: Callable[[], Any]) -> bool:
    """Take the next tasks of the input now; return whether there may be more. ``submit`` is called for them."""
    parallel = parallel_ref()
    if parallel is None or parallel._aborting or parallel._original_iterator is None:
        return False
    with _failures_registered(parallel), parallel._lock:
        # Race: a callback in another thread may have come to the end of the input meanwhile.
        if parallel._original_iterator is not None:
            parallel.dispatch_next()
    _raise_failure(parallel)
    return parallel._original_iterator is not None


def _is_lazy(parallel_ref: Callable[[], Any]) -> bool:
    """Return whether to take a task from the input runs code of the user; to take one from a list does not."""
    return not isinstance(getattr(parallel_ref(), "_original_iterator", None), _PLAIN_ITERATORS)


def _call_back(parallel: Any, callback: Callback, future: BatchFuture) -> None:
    """Call joblib back, and raise what the user's generator of tasks raised meanwhile."""
    with _failures_registered(parallel):
        callback(future)
    _raise_failure(parallel)


@contextlib.contextmanager
def _failures_registered(parallel: Any) -> Iterator[None]:
    """Have joblib know what the user's generator of tasks raises in this block.

    joblib registers an ``Exception`` of the generator as a failed job and goes on; raised here, it ends what runs.
    Anything else (``sys.exit``, Ctrl-C) would leave joblib waiting for tasks that nobody dispatches any more, so it
    is registered the same way.
    """
    try:
        yield
    except BaseException as error:
        if parallel._aborting:
            raise
        job = joblib_parallel.BatchCompletionCallBack(0, 0, parallel)
        parallel._register_new_job(job)
        job._register_outcome({"result": error, "status": joblib_parallel.TASK_ERROR})
        raise


def _raise_failure(parallel: Any) -> None:
    """Raise what the user's generator of tasks raised, which joblib keeps as a job that failed."""
    if parallel._aborting and parallel.return_ordered:
        with parallel._lock:
            failed = [job for job in parallel._jobs if job.status == joblib_parallel.TASK_ERROR]
        if failed:
            raise failed[0]._result


def _no_parallel() -> None:
    """Stand for the reference to a ``Parallel`` object of a backend that is bound to none."""


def _nested_backend(config: Config, nesting_level: int | None, context: Context | None = None) -> HybridBackend:
    """Return a backend for calls inside tasks; called in the parent for each call, and where tasks run."""
    backend: HybridBackend = object.__new__(HybridBackend)
    # Not by __init__, which reads the environment: 100 µs of a warm call.
    ParallelBackendBase.__init__(backend, nesting_level=nesting_level)
    backend.config = config
    backend._given = frozenset()
    backend._context = context or Context.of_process()
    backend._bind_to_nothing()
    if nesting_level:
        backend.default_n_jobs = 1
    return backend


def _in_outer_task(config: Config) -> Config:
    """Return ``config`` with the Dask task that runs in this thread, if there is one."""
    if "distributed.worker" not in sys.modules:
        return config
    from .cluster.outer_task import of_this_thread

    outer_task = of_this_thread()
    return config if outer_task is None else dataclasses.replace(config, outer_task=outer_task)


def facts_of(config: Config, nesting_level: int | None, prefer: str | None = None, require: str | None = None) -> Facts:
    """Return what is known of a call before joblib says more of it."""
    return Facts(
        config.tier,
        prefer,
        require,
        _reason_for_cluster(config, nesting_level),
        cluster_was_given=config.client is not None or config.scheduler is not None,
        is_daemonic=is_daemonic(),
        is_nested=bool(nesting_level),
    )


def _reason_for_cluster(config: Config, nesting_level: int | None) -> str | None:
    """Return why Dask is to be used, or None: calls inside tasks stay where they are, unless they have room there."""
    if nesting_level:
        n_slots = config.outer_task.n_slots if config.outer_task is not None else None
        return f"the task may use {n_slots} slots of its Dask cluster" if n_slots and n_slots > 1 else None
    if config.client is not None:
        return "a Dask client was given"
    if config.scheduler is not None:
        return f"the Dask scheduler {os.fspath(config.scheduler)} was given"
    if "distributed" in sys.modules and load_tier("dask").is_available():
        return "a Dask client is active in this process"
    return None


def _with_known_tier(config: Config, source: str) -> Config:
    if config.tier not in tier_names():
        raise ConfigurationError.not_one_of(source, config.tier, tier_names())
    return config


def _in_bytes(options: dict[str, Any]) -> dict[str, Any]:
    """Return ``options`` with sizes like "10M" as numbers, as joblib does."""
    sizes = {name: options[name] for name in ("max_nbytes", "share_fits_nbytes") if isinstance(options.get(name), str)}
    in_bytes = {}
    for name, size in sizes.items():
        try:
            in_bytes[name] = memstr_to_bytes(size)
        except (ValueError, KeyError, IndexError) as error:
            raise ConfigurationError(
                f"{name} is {size!r}, but must be None, a number of bytes of at least 0, or a size such as '10M'."
            ) from error
    return {**options, **in_bytes} if sizes else options


def _check_sharedmem(config: Config, require: str | None, options: dict[str, Any]) -> None:
    """Refuse a contradiction that the user wrote in one place.

    A library's own ``require`` (RandomForest.predict) inside a context with tier="processes" is no contradiction:
    that call needs shared memory and runs on threads.
    """
    if require != "sharedmem" or config.tier == "auto" or load_tier(config.tier).shares_memory:
        return
    context = getattr(joblib_parallel._backend, "config", {})
    if "tier" in options or context.get("require") == "sharedmem":
        raise ConfigurationError(
            f"require='sharedmem' cannot be met with tier={config.tier!r}, whose workers have memory of their own: "
            "use tier='threads', or leave one of the two out."
        )
