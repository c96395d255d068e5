"""How much can one client and one scheduler do? Our tier on hundreds of workers: throughput, memory, fairness.

Scheduler, workers and client are three processes that talk over TCP (``cluster_processes.py``), new for each row. All
of them share the cores of this machine, so the rate of tasks is what their CPU time adds up to; the CPU seconds of each
per task are what carries over to a cluster whose scheduler has a core for itself (``cluster_simulation.py``).

Usage: ``python benchmarks/cluster_size.py [--tasks 100000] [--workers 10 100 300 500] [--save]``. ``--save`` writes
``results/cluster-size.json`` and ``.md``; ``table`` in the place of the options writes the ``.md`` again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Final

import psutil
from cluster_processes import Gauge, LargeCluster, bytes_over_loopback, watched, where
from layout import markdown_table, seconds
from machine import describe_machine, load_warning, machine_line

RESULTS: Final = Path(__file__).resolve().parent / "results" / "cluster-size.json"

#: joblib's own backend has up to all tasks on the cluster, and looks at each by itself.
_N_TASKS_OF_JOBLIB: Final = 5_000

#: Workers, and seconds of a task, of the rows that say from which length on the cluster is busy.
_LENGTHS: Final = ((100, 0.03), (100, 0.1), (100, 0.3), (100, 1.0), (300, 0.3), (300, 1.0), (300, 3.0))
_TASKS_PER_WORKER: Final = 20

#: Workers, and seconds of a task, of the two calls that run at the same time; tasks of the long and of the short one.
_FAIR: Final = (50, 0.25, 3_000, 300)

_N_ROUND_TRIPS: Final = 20
_IDLE_S: Final = 3.0
_PART_NBYTES: Final = 1 << 24
_N_PARTS: Final = 16

#: What two measurements of one row have in common; not how many tasks.
_NAMES_A_ROW: Final = ("what", "way", "n_workers", "task_s")

#: Seconds that a row may take in all.
_ROW_S: Final = 1_800.0


# ---- one row, in a process of its own


def run_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured of a row, as its client sees it."""
    from distributed import Client

    with Client(row["address"], set_as_default=row["way"] in _BARE_WAYS) as client:
        return {"calls": _calls, "fairness": _fairness, "transfer": _transfer}[row["what"]](client, row)


def _calls(client: Any, row: dict[str, Any]) -> dict[str, Any]:
    run = _WAYS[row["way"]]
    began = time.perf_counter()
    run(client, 1, 0.0)
    figures: dict[str, Any] = {"first_call_s": time.perf_counter() - began}
    figures["round_trip_s"] = median(_timed(lambda: run(client, 1, 0.0)) for _ in range(_N_ROUND_TRIPS))
    # All have run something: what a worker does at its first task is no part of the rest.
    run(client, 2 * row["n_workers"], 0.0)
    figures["idle_cpu_share"] = _idle_cpu(row["pids"])
    gauges, sent = {name: Gauge(pid) for name, pid in row["pids"].items()}, bytes_over_loopback()
    gauges["client"] = Gauge(os.getpid())
    busy = _busy_s()
    with watched(gauges):
        start = time.time()
        results = run(client, row["n_tasks"], row["task_s"])
        wall_s = time.time() - start
    figures["processes"] = {name: gauge.figures(row["n_tasks"]) for name, gauge in gauges.items()}
    # Where other work ran, less than all cores was there for this.
    own_s = sum(gauge.cpu_s for gauge in gauges.values())
    figures["others_cpu_share"] = max(0.0, _busy_s() - busy - own_s) / wall_s
    figures["bytes_per_task"] = (bytes_over_loopback() - sent) / row["n_tasks"]
    return {**figures, "wall_s": wall_s, **_tenths(results, start), **_shares(results, row["n_workers"])}


def _busy_s() -> float:
    """Return the CPU seconds that all processes of the machine have used."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _idle_cpu(pids: dict[str, int]) -> dict[str, float]:
    gauges = {name: Gauge(pid) for name, pid in pids.items()}
    time.sleep(_IDLE_S)
    return {name: gauge.cpu_s / _IDLE_S for name, gauge in gauges.items()}


def _tenths(results: Sequence[tuple[int, float]], start: float) -> dict[str, Any]:
    """Return the rate in each tenth of the tasks, in the order in which they ended."""
    ends = sorted(end for _, end in results)
    marks = [start, *(ends[len(ends) * tenth // 10 - 1] for tenth in range(1, 11))]
    return {"rates": [len(ends) / 10 / (after - before) for before, after in itertools.pairwise(marks)]}


def _shares(results: Sequence[tuple[int, float]], n_workers: int) -> dict[str, Any]:
    counts = Counter(worker for worker, _ in results)
    shares = sorted(counts[worker] for worker in range(n_workers))
    return {"per_worker": {"min": shares[0], "median": median(shares), "max": shares[-1], "jain": jain(shares)}}


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index: 1 where all have the same, 1/n where one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def _hybrid(client: Any, n_tasks: int, task_s: float) -> list[tuple[int, float]]:
    from joblib import Parallel, delayed, parallel_config

    import joblib_backends  # noqa: F401  registers the backend

    with parallel_config("hybrid", client=client, tier="dask", wait_for_workers=120):
        found: list[tuple[int, float]] = Parallel(n_jobs=-1, batch_size=1)(
            delayed(where)(i, task_s) for i in range(n_tasks)
        )
    return found


def _joblib(client: Any, n_tasks: int, task_s: float) -> list[tuple[int, float]]:
    from joblib import Parallel, delayed, parallel_config

    with parallel_config("dask"):
        found: list[tuple[int, float]] = Parallel(n_jobs=-1, batch_size=1)(
            delayed(where)(i, task_s) for i in range(n_tasks)
        )
    return found


def _bare(client: Any, n_tasks: int, task_s: float) -> list[tuple[int, float]]:
    """Send all at once."""
    found: list[tuple[int, float]] = client.gather(client.map(where, range(n_tasks), seconds=task_s, pure=False))
    return found


def _windowed(client: Any, n_tasks: int, task_s: float) -> list[tuple[int, float]]:
    """Have as many on the cluster as our tier has, and send one for each that ends."""
    from distributed import as_completed

    n_first = min(n_tasks, 10 * len(client.nthreads()))
    sequence = as_completed(client.map(where, range(n_first), seconds=task_s, pure=False), with_results=True)
    results, n_sent = [], n_first
    for batch in sequence.batches():
        results += [result for _, result in batch]
        n_next = min(len(batch), n_tasks - n_sent)
        sequence.update(client.map(where, range(n_sent, n_sent + n_next), seconds=task_s, pure=False))
        n_sent += n_next
    return results


_WAYS: Final = {"hybrid": _hybrid, "bare": _bare, "windowed": _windowed, "joblib": _joblib}


#: Ways that look for a client themselves.
_BARE_WAYS: Final = ("windowed", "joblib")


def _fairness(client: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Return when a short call ends by itself, and beside a long one that began before it."""
    from distributed import Client

    _hybrid(client, 2 * row["n_workers"], 0.0)
    figures: dict[str, Any] = {"alone_s": _timed(lambda: _hybrid(client, row["n_short"], row["task_s"]))}
    other = client if row["way"] == "one client" else Client(row["address"], set_as_default=False)
    ends: dict[str, list[float]] = {}
    long = threading.Thread(
        target=lambda: ends.__setitem__("long", [end for _, end in _hybrid(client, row["n_long"], row["task_s"])])
    )
    long.start()
    time.sleep(row["delay_s"])
    start = time.time()
    ends["short"] = [end for _, end in _hybrid(other, row["n_short"], row["task_s"])]
    end = time.time()
    long.join()
    if other is not client:
        other.close()
    n_of_long = sum(start < moment < end for moment in ends["long"])
    figures |= {"beside_s": end - start, "first_after_s": min(ends["short"]) - start}
    return {
        **figures,
        "share": row["n_short"] / (row["n_short"] + n_of_long),
        "long_went_on_s": max(ends["long"]) - end,
    }


def _transfer(client: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes a second from client to worker by way of the scheduler, and from worker to worker."""
    first, second = sorted(client.nthreads())[:2]
    part = os.urandom(_PART_NBYTES)
    nbytes = _PART_NBYTES * _N_PARTS

    def send() -> list[Any]:
        return [client.scatter([part], workers=[first], hash=False)[0] for _ in range(_N_PARTS)]

    began = time.perf_counter()
    parts = send()
    by_scheduler_s = time.perf_counter() - began

    def fetch() -> None:
        # One after the other, as ``spread.py`` has them fetched.
        for sent in parts:
            assert client.submit(len, sent, workers=[second], pure=False).result() == _PART_NBYTES

    return {"by_scheduler_per_s": nbytes / by_scheduler_s, "worker_to_worker_per_s": nbytes / _timed(fetch)}


def _choice_s(n_workers: int) -> float:
    """Return the seconds in which the scheduler finds the least busy of so many idle workers, as it does per task."""
    from distributed.scheduler import SchedulerState

    idle = {_Worker(processing={}, nthreads=1) for _ in range(n_workers)}
    state = SimpleNamespace(idle_task_count=idle, WORKER_SATURATION=1.1, validate=False)
    return min(_timed(lambda: SchedulerState.decide_worker_rootish_queuing_enabled(state)) for _ in range(20))


class _Worker(SimpleNamespace):
    """What may be in a set, as the scheduler's own notes of a worker."""

    __hash__ = object.__hash__


# ---- all rows


def _rows(n_tasks: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
    ways = [("hybrid", size, n_tasks) for size in sizes] + [("bare", size, n_tasks) for size in sizes]
    ways += [("windowed", 100, n_tasks), ("joblib", 100, min(n_tasks, _N_TASKS_OF_JOBLIB))]
    rows = [
        {"what": "calls", "way": way, "n_workers": size, "n_tasks": n, "task_s": 0.0}
        for way, size, n in sorted(ways, key=lambda way: way[1])
    ]
    for size, task_s in _LENGTHS:
        n_long = size * _TASKS_PER_WORKER
        rows.append({"what": "calls", "way": "hybrid", "n_workers": size, "n_tasks": n_long, "task_s": task_s})
    n_workers, task_s, n_long, n_short = _FAIR
    for way in ("one client", "two clients"):
        rows.append(
            {"what": "fairness", "way": way, "n_workers": n_workers, "task_s": task_s, "n_long": n_long}
            | {"n_short": n_short, "delay_s": 4.0}
        )
    rows.append({"what": "transfer", "way": "-", "n_workers": 2})
    return [*rows, {"what": "choice", "way": "-", "n_workers": 10_000}]


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Run a row on a cluster of its own."""
    if row["what"] == "choice":
        return {**row, "choice_s": _choice_s(row["n_workers"])}
    with LargeCluster(row["n_workers"]) as cluster:
        asked = {**row, "address": cluster.address, "pids": cluster.pids}
        child = [sys.executable, __file__, "row", json.dumps(asked)]
        output = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True, timeout=_ROW_S).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {**row, **figures}


def _measure_into(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Put what was measured of a row in the place of what is known of it; one that fails costs no other."""
    try:
        found = measure(row)
    except (subprocess.SubprocessError, RuntimeError) as error:
        print(f"No result: {error}", file=sys.stderr, flush=True)
        return
    rows[:] = [one for one in rows if any(one.get(name) != row.get(name) for name in _NAMES_A_ROW)] + [found]


# ---- the report


def report(document: dict[str, Any]) -> str:
    """Return the tables."""
    rows = document["rows"]
    calls = [row for row in rows if row["what"] == "calls"]
    short, long = ([row for row in calls if bool(row["task_s"]) is is_long] for is_long in (False, True))
    parts = [
        "## cluster-size",
        f"Machine: {machine_line(document['machine'])}",
        load_warning(document["machine"]),
        "Client, scheduler and all workers share these cores. *bare*: `client.map` of all tasks, then `gather`; "
        "*windowed*: `client.map` of ten per worker, then one for each that ends; *joblib*: joblib's own dask backend. "
        "`batch_size=1` throughout. Tenths: of the tasks, in the order in which they ended.",
        "### Tasks that take no time",
        markdown_table(
            ("workers", "way", "tasks", "tasks/s", "first tenth", "fifth", "last", "client", "scheduler", "workers"),
            [_rate_line(row) for row in short],
            n_text_columns=2,
        ),
        "The last three: CPU milliseconds per task, of all workers together.",
        markdown_table(
            (
                *("workers", "way", "client MiB", "B/task", "scheduler MiB", "B/task"),
                *("B over TCP/task", "round trip", "first call"),
            ),
            [_memory_line(row) for row in short],
            n_text_columns=2,
        ),
        "MiB: the peak of the resident memory; B/task: by how much it grew from before the call to its end, results "
        "included (128 bytes a task). *First call*: which also gives the workers the package.",
        markdown_table(
            ("workers", "way", "fewest tasks", "median", "most", "Jain's index"),
            [_share_line(row) for row in short],
            n_text_columns=2,
        ),
        "### From which length on a cluster is busy",
        markdown_table(
            ("workers", "a task", "tasks", "wall", "tasks/s", "efficiency"), [_length_line(row) for row in long]
        ),
        "Efficiency: the time of all tasks over that of all workers.",
        *_fairness_part([row for row in rows if row["what"] == "fairness"]),
        *_transfer_part([row for row in rows if row["what"] == "transfer"]),
        *_choice_part([row for row in rows if row["what"] == "choice"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rate_line(row: dict[str, Any]) -> tuple[str, ...]:
    rates = [f"{row['rates'][tenth]:.0f}" for tenth in (0, 4, 9)]
    cpu = [f"{row['processes'][name]['cpu_ms_per_task']:.2f}" for name in ("client", "scheduler", "workers")]
    return str(row["n_workers"]), row["way"], str(row["n_tasks"]), f"{row['n_tasks'] / row['wall_s']:.0f}", *rates, *cpu


def _memory_line(row: dict[str, Any]) -> tuple[str, ...]:
    cells = []
    for name in ("client", "scheduler"):
        process = row["processes"][name]
        cells += [f"{process['peak_mib']:.0f}", f"{process['grown_bytes_per_task']:.0f}"]
    times = seconds(row["round_trip_s"]), seconds(row["first_call_s"])
    return str(row["n_workers"]), row["way"], *cells, f"{row['bytes_per_task']:.0f}", *times


def _share_line(row: dict[str, Any]) -> tuple[str, ...]:
    shares = row["per_worker"]
    counts = (f"{shares[name]:.0f}" for name in ("min", "median", "max"))
    return str(row["n_workers"]), row["way"], *counts, f"{shares['jain']:.3f}"


def efficiency(row: dict[str, Any]) -> float:
    """Return the part of the workers' time in which they ran tasks."""
    return float(row["n_tasks"] * row["task_s"] / (row["n_workers"] * row["wall_s"]))


def _length_line(row: dict[str, Any]) -> tuple[str, ...]:
    rate = f"{row['n_tasks'] / row['wall_s']:.0f}"
    return (
        str(row["n_workers"]),
        seconds(row["task_s"]),
        str(row["n_tasks"]),
        seconds(row["wall_s"]),
        rate,
        f"{efficiency(row):.2f}",
    )


def _fairness_part(rows: Sequence[dict[str, Any]]) -> Sequence[str]:
    if not rows:
        return []
    one = rows[0]
    about = (
        f"A call of {one['n_short']} tasks that begins {one['delay_s']:g} s after one of {one['n_long']} has, of "
        f"{seconds(one['task_s'])} each, on {one['n_workers']} workers. *Share*: its part of the tasks that ended "
        "while it ran."
    )
    lines = [
        (
            row["way"],
            seconds(row["alone_s"]),
            seconds(row["beside_s"]),
            seconds(row["first_after_s"]),
            f"{row['share']:.2f}",
            seconds(row["long_went_on_s"]),
        )
        for row in rows
    ]
    head = ("calls from two threads", "alone", "beside the long one", "first result", "share", "the long one ended")
    return ["### Two calls at the same time", about, markdown_table(head, lines)]


def _transfer_part(rows: Sequence[dict[str, Any]]) -> Sequence[str]:
    return [
        "### Data\n\nIn parts of 16 MiB: client to worker, through the scheduler, "
        f"{row['by_scheduler_per_s'] / 1e6:.0f} MB/s; worker to worker {row['worker_to_worker_per_s'] / 1e6:.0f} MB/s "
        "(both workers in one process)."
        for row in rows
    ]


def _choice_part(rows: Sequence[dict[str, Any]]) -> Sequence[str]:
    return [
        f"### Idle workers\n\nTo find the least busy of {row['n_workers']} idle workers takes the scheduler "
        f"{seconds(row['choice_s'])}, for each task."
        for row in rows
    ]


def main() -> None:
    """Measure, print, and save if that is asked for."""
    if sys.argv[1:2] == ["row"]:
        print(json.dumps(run_row(json.loads(sys.argv[2]))))
        return
    if sys.argv[1:] == ["table"]:
        RESULTS.with_suffix(".md").write_text(report(json.loads(RESULTS.read_text())), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 300, 500])
    parser.add_argument("--only", default="", metavar="WORD", help="rows of that kind or way; others are kept")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text())["rows"] if options.only and RESULTS.exists() else []
    document: dict[str, Any] = {"machine": describe_machine(), "rows": kept}
    for row in _rows(options.tasks, options.workers):
        if options.only in (row["what"], row["way"], ""):
            print(f"{time.strftime('%X')} {row}", file=sys.stderr, flush=True)
            _measure_into(document["rows"], row)
            if options.save:
                # Each row, for all of them take most of an hour.
                RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = report(document)
    print(text)
    if options.save:
        RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
