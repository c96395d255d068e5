"""What the Dask tier costs beside bare calls of a client and joblib's own dask backend, on one LocalCluster.

Usage: ``python benchmarks/dispatch.py [--save]``. All rows are of one run: the ways take turns within each repeat, and
the smallest of the repeats counts, for whatever else runs can only add. ``--save`` writes ``results/dispatch.md``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, LocalCluster, as_completed
from joblib import Parallel, delayed, parallel_config
from machine import describe_machine, machine_line
from sklearn.datasets import make_classification
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB

import joblib_backends  # noqa: F401  registers the backend

RESULTS = Path(__file__).resolve().parent / "results" / "dispatch.md"
N_REPEATS = 5
N_TASKS = 500
N_MB = 240


def main() -> None:
    """Measure, print, and save if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    lines = [f"Machine: {machine_line(describe_machine())}", ""]
    with started(2) as client:
        lines += _of_calls(client)
    with started(8) as client:
        lines += ["", *_of_data(client)]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULTS.write_text(text, encoding="utf-8")


class started:  # noqa: N801  used as a function
    """A client of so many worker processes of one thread."""

    def __init__(self, n_workers: int) -> None:
        self._cluster = LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=":0", memory_limit=0)
        self._client = Client(self._cluster)

    def __enter__(self) -> Client:
        self._client.wait_for_workers(len(self._cluster.workers))
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._cluster.close()


# ---- calls


def nothing(i: int) -> int:
    """Take no time."""
    return i


def _of_calls(client: Client) -> list[str]:
    def bare_pair() -> None:
        futures = [client.submit(nothing, i, pure=False) for i in range(2)]
        assert [future.result() for future in futures] == [0, 1]

    def bare_gather() -> None:
        assert client.gather([client.submit(nothing, i, pure=False) for i in range(N_TASKS)]) == list(range(N_TASKS))

    def bare_as_completed() -> None:
        futures = [client.submit(nothing, i, pure=False) for i in range(N_TASKS)]
        assert sorted(result for _, result in as_completed(futures, with_results=True)) == list(range(N_TASKS))

    def in_one_context(n: int, backend: str, **options: Any) -> float:
        """Return the seconds of a call in a context that is warm."""
        with parallel_config(backend, **options):
            call = Parallel(n_jobs=2, batch_size=1)
            call(delayed(nothing)(i) for i in range(4))
            began = time.perf_counter()
            call(delayed(nothing)(i) for i in range(n))
            return time.perf_counter() - began

    pairs = best(
        {
            "two bare `submit`, then `result`": bare_pair,
            "hybrid": lambda: in_one_context(2, "hybrid", client=client),
            "joblib's dask": lambda: in_one_context(2, "dask"),
        }
    )
    many = best(
        {
            "bare `submit` + `gather`": bare_gather,
            "bare `submit` + `as_completed`": bare_as_completed,
            "hybrid": lambda: in_one_context(N_TASKS, "hybrid", client=client),
            "joblib's dask": lambda: in_one_context(N_TASKS, "dask"),
        }
    )
    first = next(iter(pairs.values()))
    lines = ["| a warm call of two tasks | ms | / two bare calls |", "|---|---|---|"]
    lines += [f"| {name} | {seconds * 1e3:.1f} | {seconds / first:.2f} |" for name, seconds in pairs.items()]
    bare = min(many["bare `submit` + `gather`"], many["bare `submit` + `as_completed`"])
    lines += ["", f"| {N_TASKS} tasks, `batch_size=1` | tasks a second | of the better bare loop |", "|---|---|---|"]
    lines += [f"| {name} | {N_TASKS / seconds:.0f} | {bare / seconds:.2f} |" for name, seconds in many.items()]
    return lines


def best(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the least seconds of each way; what a way returns is its own measurement."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(N_REPEATS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            own = way()
            times[name].append(time.perf_counter() - began if own is None else own)
    return {name: min(all_[1:]) for name, all_ in times.items()}


# ---- data


def checksum(data: Any, i: int) -> float:
    """Read all of an array."""
    return float(data.sum()) + i


def at_once(folder: str, i: int) -> int:
    """Return how many tasks run while this one does."""
    mine = Path(folder) / f"{i}-{os.getpid()}"
    mine.touch()
    time.sleep(0.1)
    n = len(list(Path(folder).iterdir()))
    mine.unlink()
    return n


def _sent() -> int:
    """Return the bytes that this machine has sent to itself over TCP: client, scheduler and workers are all here."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


def _of_data(client: Client) -> list[str]:
    data = np.random.default_rng(0).standard_normal(N_MB * 125_000)
    rows = []
    for name, backend, options in (
        ("hybrid", "hybrid", {"client": client}),
        ("joblib's dask", "dask", {}),
        ("joblib's dask, `scatter=[X]`", "dask", {"scatter": [data]}),
    ):
        before, memory = _sent(), anonymous(client)
        peak = Peak(client)
        with parallel_config(backend, **options), peak:
            Parallel(n_jobs=8, batch_size=1)(delayed(checksum)(data, i) for i in range(64))
        sent = _sent() - before
        with parallel_config(backend, **options), tempfile.TemporaryDirectory() as folder:
            most = max(Parallel(n_jobs=3, batch_size=1)(delayed(at_once)(folder, i) for i in range(24)))
        before = _sent()
        again = search_again(backend, options)
        copies = max(0.0, peak.most - memory) / data.nbytes
        rows.append(f"| {name} | {sent / 1e6:.0f} MB | {copies:.1f} | {most} | {again / 1e6:.1f} MB |")
        client.restart()
    return [
        f"| {N_MB} MB array, 8 worker processes of one host | over TCP | copies in workers | at once with `n_jobs=3` "
        "| the same search again, over TCP |",
        "|---|---|---|---|---|",
        *rows,
    ]


def search_again(backend: str, options: dict[str, Any]) -> int:
    """Return the bytes over TCP of a search that ran before in the same context."""
    X, y = make_classification(20_000, 200, random_state=0)  # noqa: N806
    X = X.astype(np.float32)  # noqa: N806
    with parallel_config(backend, **options):
        for _ in range(2):
            before = _sent()
            GridSearchCV(GaussianNB(), {"var_smoothing": [1e-9, 1e-8, 1e-7]}, cv=3, n_jobs=8).fit(X, y)
            time.sleep(1)
    return _sent() - before


def anonymous(client: Client) -> float:
    """Return the bytes of workers that no file backs, in all."""

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    return float(sum(client.run(own).values()))


class Peak:
    """The most that :func:`anonymous` was within a block."""

    def __init__(self, client: Client) -> None:
        self.most = 0.0
        self._client = client
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.most = max(self.most, anonymous(self._client))


if __name__ == "__main__":
    main()
