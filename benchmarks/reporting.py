"""What it costs to record a call: each workload of the auto suite with ``record=True`` and with ``record=False``.

Usage: ``python benchmarks/reporting.py [NAME ...] [--save]``. The two take turns within one process, in changing order,
until each has run for two seconds or 60 times. What is given is the ratio of the two, turn by turn: its median, and
between which values the middle half of the turns lies; a row of ``off / off`` says what the same is worth if nothing
differs. Then the price of one task, in CPU time of the driver, from calls of 2,000 that do nothing; ``--tasks``
measures that alone. ``--save`` writes ``results/reporting.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

from machine import describe_machine, machine_line
from suites import SUITES

import joblib_backends  # noqa: F401  registers the backend

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "reporting.md"

#: Seconds that each way runs for, and turns, at most and at least.
BUDGET_S = 2.0
MOST_TURNS, FEWEST_TURNS = 60, 5

#: Of the calls that tell the price of a task.
N_TASKS = 2_000
N_CALLS = 31

GOAL = 1.02
GOAL_PER_TASK_S = 5e-6


def main() -> None:
    """Measure, print, and save if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--tasks", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_per_task(options.child[1:]) if options.child[0] == ":" else _ratios(options.child)))
        return
    lines = [f"Machine: {machine_line(describe_machine())}", ""]
    if not options.tasks:
        lines += [*_of_workloads(options.names or list(SUITES["auto"].modules())), ""]
    text = "\n".join([*lines, *_of_tasks()]) + "\n"
    print(text)
    if options.save:
        RESULTS.write_text(text, encoding="utf-8")


def _of_workloads(names: list[str]) -> list[str]:
    lines = [
        "| workload | seconds, off | on / off | middle half | off / off |",
        "|---|---|---|---|---|",
    ]
    ratios, nothings = [], []
    for name in names:
        found = _in_child(name)
        ratios.append(found["on"])
        nothings.append(found["off"])
        low, high = found["half"]
        lines.append(
            f"| {name} | {found['seconds']:.4f} | {found['on']:.3f} | {low:.3f} to {high:.3f} | {found['off']:.3f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    n_above = sum(ratio > GOAL for ratio in ratios)
    lines += [
        "",
        f"Goal: at most {GOAL}. Median of all rows {median(ratios):.4f} (off / off: {median(nothings):.4f}); "
        f"{len(ratios) - n_above} of {len(ratios)} rows are within it (off / off: "
        f"{sum(ratio <= GOAL for ratio in nothings)}).",
    ]
    return lines


def _of_tasks() -> list[str]:
    lines = [
        "| tier | task, off | more CPU time of the driver with recording | goal |",
        "|---|---|---|---|",
    ]
    for tier in ("inline", "threads", "processes"):
        found = _in_child(f":{tier}")
        verdict = "reached" if found["more"] <= GOAL_PER_TASK_S else "missed"
        lines.append(f"| {tier} | {found['off'] * 1e6:.1f} µs | {found['more'] * 1e6:.2f} µs | 5 µs, {verdict} |")
    return lines


def _in_child(what: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JOBLIB_BACKEND_PROFILE": str(Path(cache, "profile.json"))}
        command = [sys.executable, __file__, "--child", what]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=600)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _ratios(name: str) -> dict[str, Any]:
    """Return the ratios of one workload. Two calls come first, so that workers are there."""
    from joblib import parallel_backend

    suite = SUITES["auto"]
    run = suite.workload(name, suite.modules()[name]).prepare("hybrid")

    def seconds(record: bool) -> float:
        with parallel_backend("hybrid", record=record):
            start = perf_counter()
            run()
            return perf_counter() - start

    seconds(True), seconds(False)
    return _compared(seconds)


def _compared(seconds: Callable[[bool], float]) -> dict[str, Any]:
    on_off, off_off, plain, spent = [], [], [], 0.0
    while len(plain) < FEWEST_TURNS or (spent < BUDGET_S and len(plain) < MOST_TURNS):
        ways = [("on", True), ("off", False), ("again", False)]
        ways = ways if len(plain) % 2 else ways[::-1]
        times = {name: seconds(record) for name, record in ways}
        on_off.append(times["on"] / times["off"])
        off_off.append(times["again"] / times["off"])
        plain.append(times["off"])
        spent += times["off"]
    low, _, high = quantiles(on_off, n=4)
    return {"seconds": min(plain), "on": median(on_off), "half": (low, high), "off": median(off_off)}


def nothing() -> None:
    """Be a task."""


def _per_task(tier: str) -> dict[str, float]:
    """Return the seconds of a task without recording, and the CPU seconds that it takes the driver more with it.

    Recording is work of the driver alone, and its CPU time tells 1 µs, where the time that a call takes with two more
    processes on two cores comes and goes by 20.
    """
    from joblib import Parallel, delayed, parallel_backend

    tasks = [delayed(nothing)() for _ in range(N_TASKS)]

    def spent(record: bool) -> tuple[float, float]:
        with parallel_backend("hybrid", tier=tier, n_jobs=2, record=record):
            start, cpu_start = perf_counter(), process_time()
            Parallel(batch_size=1)(tasks)
            return (perf_counter() - start) / N_TASKS, (process_time() - cpu_start) / N_TASKS

    spent(True), spent(False)
    wall, more = [], []
    for turn in range(N_CALLS):
        both = {record: spent(record) for record in ((True, False) if turn % 2 else (False, True))}
        wall.append(both[False][0])
        more.append(both[True][1] - both[False][1])
    return {"off": median(wall), "more": median(more)}


if __name__ == "__main__":
    main()
