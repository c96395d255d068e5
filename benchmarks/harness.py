"""Time one workload on joblib's backends and on every tier of ours, each run in a fresh process.

Who runs where: the parent (``benchmarks/run.py``) starts one child per measurement, row after row and round
after round, so that a slow minute of the machine hits every row alike. The child (this file run as a script)
builds the data, enters the row's backend, runs the workload, and writes one JSON object as the last line of
its standard output.

What is timed: *cold* is entering the backend (a Dask cluster included) and the first call; *warm* is the
median of the calls after it. Building the data and importing libraries is not timed. In the table, each is
the median over the rounds. Every answer is compared with the plain loop's, through ``joblib.hash``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import IO, Any

HERE = Path(__file__).resolve().parent

#: Seconds after which a child counts as hung.
CHILD_TIMEOUT_S = 600

#: Numerical libraries get one thread in every row, or oversubscription is what is measured.
PINNED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Goal:
    """``row`` is at least ``times`` as fast as ``than``; a workload states what it is meant to show."""

    row: str
    than: str
    times: float = 1.0
    when: str = "warm"

    def __str__(self) -> str:
        return f"{self.row} at least {self.times:g} times as fast as {self.than} ({self.when})"

    def is_met(self, results: dict[str, Result]) -> bool | None:
        """Return whether ``results`` meet the goal, or None when a row is missing or failed."""
        pair = [results.get(name) for name in (self.row, self.than)]
        if any(result is None or result.error for result in pair):
            return None
        ours, theirs = (getattr(result, self.when) for result in pair)
        return bool(ours * self.times <= theirs)


@dataclass(frozen=True)
class NothingMoved:
    """The calls of ``row`` after the first move no bytes, by the backend's own report."""

    row: str

    def __str__(self) -> str:
        return f"{self.row} moves nothing from its second call on"

    def is_met(self, results: dict[str, Result]) -> bool | None:
        """Return whether ``results`` meet the goal, or None when the row is missing or failed."""
        result = results.get(self.row)
        if result is None or result.error or len(result.reports) < 2:
            return None
        return all(report["nbytes_moved"] == 0 for report in result.reports[1:])


@dataclass(frozen=True)
class Workload:
    """What is run on each row.

    Parameters
    ----------
    name : str
        Name on the command line and in the files.
    question : str
        What the numbers decide.
    run : callable
        Called with what ``setup`` returned, under the row's backend; uses it through ``joblib.Parallel``
        and returns an answer that does not depend on where it ran.
    plain : callable
        The same without joblib, for the same answer.
    setup : callable
        Called with the name of the row; builds the data. Not timed.
    repeats : int
        Warm calls in each process.
    tasks : callable
        Tasks in one call on a row, when the table is to show seconds per task instead of per call.
    rows : tuple of str or None
        Rows that take part; None is all of ``STANDARD_ROWS``.
    goals : tuple
        What is meant to hold.
    """

    name: str
    question: str
    run: Callable[[Any], Any]
    plain: Callable[[Any], Any]
    setup: Callable[[str], Any] = str
    repeats: int = 5
    tasks: Callable[[str], int] | None = None
    rows: tuple[str, ...] | None = None
    goals: tuple[Goal | NothingMoved, ...] = ()

    @property
    def unit(self) -> str:
        """Return what one number in the table is the time of."""
        return "task" if self.tasks else "call"


@dataclass(frozen=True)
class Result:
    """The measurements of one row, over all rounds."""

    cold: float = 0.0
    warm: float = 0.0
    cold_each: tuple[float, ...] = ()
    warm_each: tuple[float, ...] = ()
    digests: frozenset[str] = frozenset()
    reports: tuple[dict[str, Any], ...] = ()
    error: str = ""


@dataclass
class Measurements:
    """What one row gathers while the rounds go on."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    reports: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def add(self, answer: dict[str, Any]) -> None:
        """Add what one child reported; a row that failed once has failed."""
        self.error = self.error or answer.get("error", "")
        if not self.error:
            self.cold.append(answer["cold"])
            self.warm.append(median(answer["warm"]))
            self.digests.update(answer["digests"])
            self.reports = answer["reports"]

    def result(self) -> Result:
        """Return the medians."""
        if self.error or not self.cold:
            return Result(error=self.error or "not run")
        return Result(
            median(self.cold),
            median(self.warm),
            tuple(self.cold),
            tuple(self.warm),
            frozenset(self.digests),
            tuple(self.reports),
        )


# Rows: one context manager each, that makes a backend the active one. -------------------------------------


@contextlib.contextmanager
def _joblib(backend: str, n_jobs: int = 2) -> Iterator[None]:
    from joblib import parallel_config

    with parallel_config(backend, n_jobs=n_jobs):
        yield


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """Yield the client of a local cluster of two workers with one thread each."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextlib.contextmanager
def _joblib_dask() -> Iterator[None]:
    with _cluster(), _joblib("dask"):
        yield


@contextlib.contextmanager
def _hybrid(tier: str) -> Iterator[None]:
    from joblib import parallel_config

    with contextlib.ExitStack() as stack:
        options = {"client": stack.enter_context(_cluster())} if tier == "dask" else {}
        stack.enter_context(parallel_config("hybrid", n_jobs=2, tier=tier, **options))
        yield


PLAIN = "plain loop"
TIERS = ("auto", "inline", "threads", "processes", "dask")

#: name -> the context in which the workload runs. "client.submit" is for workloads that ask for it.
ROWS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    PLAIN: contextlib.nullcontext,
    "sequential": lambda: _joblib("sequential", n_jobs=1),
    "loky": lambda: _joblib("loky"),
    "threading": lambda: _joblib("threading"),
    "dask": _joblib_dask,
    "client.submit": _cluster,
    **{f"hybrid {tier}": lambda tier=tier: _hybrid(tier) for tier in TIERS},  # type: ignore[misc]
}
PEERS = ("loky", "threading", "dask")
STANDARD_ROWS = (PLAIN, *PEERS, *(f"hybrid {tier}" for tier in TIERS))


# The parent's side. ---------------------------------------------------------------------------------------


def measure(
    workload: Workload, rows: Sequence[str], rounds: int, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Result]:
    """Run ``workload`` on each of ``rows`` in turn, ``rounds`` times, each in its own process."""
    gathered = {row: Measurements() for row in rows}
    for turn in range(rounds):
        for row, measurements in gathered.items():
            if not measurements.error:
                progress(f"{workload.name}: round {turn + 1} of {rounds}, {row}")
                measurements.add(_run_child(workload.name, row))
    results = {row: measurements.result() for row, measurements in gathered.items()}
    return {row: _checked(result, results.get(PLAIN)) for row, result in results.items()}


def _checked(result: Result, plain: Result | None) -> Result:
    """Return ``result``, marked as failed if its answers are not the plain loop's."""
    if result.error or plain is None or plain.error or result.digests == plain.digests:
        return result
    return dataclasses.replace(result, error="the answer differs from the plain loop's")


def _run_child(workload: str, row: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "harness.py"), workload, row]
    # Workers of every kind must be able to import the tasks.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB_")}
    environment |= PINNED
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent)))
    # Files, not pipes: a worker that outlives the child would keep a pipe open, and us waiting for its end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            child.wait(CHILD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {CHILD_TIMEOUT_S} seconds"}
        finally:
            _end_session(child)
        lines, reasons = (_lines(stream) for stream in (out, err))
    if child.returncode or not lines:
        return {"error": f"exit code {child.returncode}: {(reasons or ['no output'])[-1]}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """Kill the child, if it still runs, and the workers that it left: they would disturb the next row."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _lines(stream: IO[str]) -> list[str]:
    stream.seek(0)
    return stream.read().strip().splitlines()


# The child's side. ----------------------------------------------------------------------------------------


def _child(workload_name: str, row: str) -> dict[str, Any]:
    import joblib
    from workloads import WORKLOADS

    workload: Workload = WORKLOADS[workload_name]
    last_report = _report_of_hybrid() if row.startswith("hybrid") else None
    if "dask" in row or row == "client.submit":
        import distributed  # noqa: F401
    state = workload.setup(row)
    run = workload.plain if row == PLAIN else workload.run
    calls = workload.tasks(row) if workload.tasks else 1

    seconds, digests, reports = [], [], []
    start = perf_counter()
    with ROWS[row]():
        for _ in range(1 + workload.repeats):
            answer = run(state)
            seconds.append((perf_counter() - start) / calls)
            digests.append(joblib.hash(answer))
            if last_report:
                reports.append(_as_dict(last_report()))
            start = perf_counter()
    return {"cold": seconds[0], "warm": seconds[1:], "digests": digests, "reports": reports}


def _report_of_hybrid() -> Callable[[], Any]:
    from joblib_backends import last_report

    return last_report


def _as_dict(report: Any) -> dict[str, Any]:
    names = (
        "function",
        "tier",
        "reason",
        "n_jobs",
        "tasks",
        "batches",
        "seconds",
        "nbytes_moved",
        "nbytes_saved",
    )
    return {name: getattr(report, name) for name in names}


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:3]), default=str), flush=True)
