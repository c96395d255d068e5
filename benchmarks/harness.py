"""Time one workload on the rows of a suite, each measurement in a fresh process.

Who runs where: the parent (``benchmarks/run.py``) starts one child per measurement, row after row and round
after round, so that a slow minute of the machine hits every row alike; each round starts at another row, so that
none always follows the same one. The child (this file run as a script) builds the data, enters the row's backend,
runs the workload, and writes one JSON object as the last line of its standard output.

What is timed: *cold* is entering the backend (a Dask cluster included) and the first call; *warm* is the
median of the calls after it. Building the data and importing libraries is not timed. In the table, each is
the median over the rounds. Every answer is compared with the plain loop's, through ``joblib.hash``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import IO, Any

from reports import Reports
from rows import PLAIN
from suites import SUITES, Suite, Timed

HERE = Path(__file__).resolve().parent

#: Seconds after which a child counts as hung.
CHILD_TIMEOUT_S = 240

#: Variables that fix the threads of numerical libraries.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The measurements of one row, over all rounds.

    ``error`` says why there are none, or why they do not count; ``is_wrong`` that the answers were not the plain
    loop's.
    """

    cold: float = 0.0
    warm: float = 0.0
    cold_each: tuple[float, ...] = ()
    warm_each: tuple[float, ...] = ()
    digests: tuple[str, ...] = ()
    reports: tuple[dict[str, Any], ...] = ()
    error: str = ""
    is_wrong: bool = False


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
            tuple(sorted(self.digests)),
            tuple(self.reports),
        )


# The parent's side. ---------------------------------------------------------------------------------------


def measure(
    suite: Suite,
    workload: Timed,
    rows: Sequence[str],
    rounds: int,
    profile: str = "fresh",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Result]:
    """Run ``workload`` on each of ``rows`` in turn, ``rounds`` times, each in its own process.

    ``profile`` says whether what one process has learned and kept in the user's cache folder is there for the next
    one of the same workload ("kept") or whether every process starts with an empty folder ("fresh").
    """
    gathered = {row: Measurements() for row in rows}
    with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as kept:
        for turn in range(rounds):
            for row in _rotated(rows, turn):
                if not gathered[row].error:
                    progress(f"{workload.name}: round {turn + 1} of {rounds}, {row}")
                    with _cache_folder(profile, kept) as cache:
                        gathered[row].add(_run_child(suite, workload, row, cache))
    results = {row: measurements.result() for row, measurements in gathered.items()}
    return {row: _checked(result, results.get(PLAIN)) for row, result in results.items()}


def _rotated(rows: Sequence[str], by: int) -> list[str]:
    by %= max(len(rows), 1)
    return [*rows[by:], *rows[:by]]


@contextlib.contextmanager
def _cache_folder(profile: str, kept: str) -> Iterator[str]:
    if profile == "kept":
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-cache-", ignore_cleanup_errors=True) as fresh:
        yield fresh


def _checked(result: Result, plain: Result | None) -> Result:
    """Return ``result``, marked as wrong if its answers are not the plain loop's."""
    if result.error or plain is None or plain.error or result.digests == plain.digests:
        return result
    return replace(result, error="the answer differs from the plain loop's", is_wrong=True)


def _run_child(suite: Suite, workload: Timed, row: str, cache: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "harness.py"), suite.name, suite.modules()[workload.name], workload.name, row]
    # Files, not pipes: a worker that outlives the child would keep a pipe open, and us waiting for its end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command,
            env=_environment(suite, cache),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
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


def _environment(suite: Suite, cache: str) -> dict[str, str]:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB_")}
    for name in THREAD_VARIABLES:
        environment.pop(name, None)
    if suite.is_pinned:
        environment |= dict.fromkeys(THREAD_VARIABLES, "1")
    environment["XDG_CACHE_HOME"] = cache
    environment["PYTHONWARNINGS"] = "ignore"
    # Installed packages are compiled once, by pip.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # Workers of every kind must be able to import the tasks.
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent)))
    return environment


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """Kill the child, if it still runs, and the workers that it left: they would disturb the next row."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _lines(stream: IO[str]) -> list[str]:
    stream.seek(0)
    return stream.read().strip().splitlines()


# The child's side. ----------------------------------------------------------------------------------------


def _child(suite: Suite, workload: Timed, row: str) -> dict[str, Any]:
    import joblib

    gathered = Reports() if row.startswith("hybrid") else None
    if "dask" in row or row == "client.submit":
        import distributed  # noqa: F401
    run = workload.prepare(row)
    units = workload.units(row)

    seconds: list[float] = []
    digests, reports = set(), []
    start = perf_counter()
    # Only hybrid starts anything beside a call that runs.
    settled = start + (suite.settles_s if gathered else 0.0)
    with suite.rows[row]():
        while len(seconds) < 1 + workload.repeats and not suite.has_enough(seconds[1:]):
            answer = run()
            if not seconds or start > settled:
                seconds.append((perf_counter() - start) / units)
            digests.add(joblib.hash(answer))
            if gathered:
                reports.append(gathered.take())
            del answer
            start = perf_counter()
    return {"cold": seconds[0], "warm": seconds[1:], "digests": sorted(digests), "reports": reports}


if __name__ == "__main__":
    chosen = SUITES[sys.argv[1]]
    work = chosen.workload(name=sys.argv[3], theme=sys.argv[2])
    print(json.dumps(_child(chosen, work, sys.argv[4]), default=str), flush=True)
