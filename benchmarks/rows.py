"""The rows: one context manager each, that makes a backend the active one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def _joblib(backend: str, n_jobs: int) -> Iterator[None]:
    from joblib import parallel_config

    with parallel_config(backend, n_jobs=n_jobs):
        yield


@contextlib.contextmanager
def _cluster(n_workers: int) -> Iterator[Any]:
    """Yield the client of a local cluster whose workers have one thread each."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextlib.contextmanager
def _joblib_dask(n_workers: int) -> Iterator[None]:
    with _cluster(n_workers), _joblib("dask", n_workers):
        yield


@contextlib.contextmanager
def _joblib_dask_on_all_cores() -> Iterator[None]:
    from joblib import cpu_count

    with _cluster(cpu_count()), _joblib("dask", -1):
        yield


@contextlib.contextmanager
def _hybrid(tier: str, n_jobs: int) -> Iterator[None]:
    from joblib import parallel_config

    with contextlib.ExitStack() as stack:
        options = {"client": stack.enter_context(_cluster(n_jobs))} if tier == "dask" else {}
        stack.enter_context(parallel_config("hybrid", n_jobs=n_jobs, tier=tier, **options))
        yield


PLAIN = "plain loop"
HYBRID = "hybrid"
TIERS = ("auto", "inline", "threads", "processes", "dask")

#: The rows of the `auto` suite: all cores, as n_jobs=-1 asks for.
AUTO_ROWS: dict[str, Context] = {
    PLAIN: contextlib.nullcontext,
    "threading": lambda: _joblib("threading", -1),
    "loky": lambda: _joblib("loky", -1),
    "multiprocessing": lambda: _joblib("multiprocessing", -1),
    "dask": _joblib_dask_on_all_cores,
    HYBRID: lambda: _hybrid("auto", -1),
}

#: The rows of the `cluster` suite: what an idle cluster of this machine costs beside its processes.
CLUSTER_ROWS: dict[str, Context] = {
    PLAIN: contextlib.nullcontext,
    "hybrid processes": lambda: _hybrid("processes", 2),
    "hybrid dask": lambda: _hybrid("dask", 2),
}

#: The rows of the `calls` suite: two jobs on every machine. "client.submit" is for workloads that ask for it.
CALLS_ROWS: dict[str, Context] = {
    PLAIN: contextlib.nullcontext,
    "sequential": lambda: _joblib("sequential", 1),
    "loky": lambda: _joblib("loky", 2),
    "threading": lambda: _joblib("threading", 2),
    "dask": lambda: _joblib_dask(2),
    "client.submit": lambda: _cluster(2),
    **{f"hybrid {tier}": lambda tier=tier: _hybrid(tier, 2) for tier in TIERS},  # type: ignore[misc]
}
CALLS_PEERS = ("loky", "threading", "dask")
CALLS_STANDARD_ROWS = (PLAIN, *CALLS_PEERS, *(f"hybrid {tier}" for tier in TIERS))
