"""The Dask tier, on a local cluster of two workers, beside the processes tier: what does a cluster cost?

Usage: ``python benchmarks/cluster.py [--rounds N] [--from SECONDS] [--save]``. It takes the workloads of the auto suite
that a plain loop works on for so long (default: half a second), with ``n_jobs=2``. The goal is for those of more than
one second. ``--save`` writes ``results/cluster.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare import geometric_mean
from harness import Result, measure
from layout import markdown_table, seconds
from machine import describe_machine, load_warning, machine_line
from rows import PLAIN
from suites import SUITES

RESULTS = Path(__file__).resolve().parent / "results"

PROCESSES, DASK = "hybrid processes", "hybrid dask"

#: The goal: the Dask tier takes at most so many times as long as processes, where a loop takes so many seconds.
GOAL = 1.15
GOAL_FROM_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per row (default: %(default)s)")
    parser.add_argument("--from", dest="least_s", type=float, default=0.5, help="seconds of a plain loop")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    print(machine_line(machine), load_warning(machine), sep="\n", flush=True)
    measured = _measure(options.rounds, options.least_s)
    text = "\n\n".join(
        part
        for part in (
            "## The Dask tier beside the processes tier",
            machine_line(machine),
            load_warning(machine),
            f"Medians of {options.rounds} processes per row, `n_jobs=2`; the Dask tier has a `LocalCluster` of two "
            "workers with one thread each.",
            _table(measured),
            _verdict(measured),
        )
        if part
    )
    print(f"\n{text}")
    if options.save:
        document = {
            "machine": machine,
            "rounds": options.rounds,
            "workloads": {name: _as_dicts(results) for name, results in measured.items()},
        }
        (RESULTS / "cluster.json").write_text(json.dumps(document, indent=1) + "\n")
        (RESULTS / "cluster.md").write_text(text + "\n")
    return int(any(result.error for results in measured.values() for result in results.values()))


def _measure(rounds: int, least_s: float) -> dict[str, dict[str, Result]]:
    """Return the results of those workloads that take long enough."""
    suite = SUITES["cluster"]
    measured = {}
    for name, theme in suite.modules().items():
        workload = suite.workload(name, theme)
        plain = measure(suite, workload, [PLAIN], 1)[PLAIN]
        if plain.error or plain.warm < least_s:
            continue
        measured[name] = measure(suite, workload, list(suite.rows), rounds)
        print(f"{name}: {_ratio(measured[name]):.2f}", flush=True)
    return measured


def _ratio(results: dict[str, Result]) -> float:
    ours, theirs = results[DASK], results[PROCESSES]
    return math.nan if ours.error or theirs.error else ours.warm / theirs.warm


def _table(measured: dict[str, dict[str, Result]]) -> str:
    head = ("workload", "plain loop", "processes", "Dask", "Dask / processes")
    return markdown_table(
        head,
        [
            (name, *(_cell(results[row]) for row in (PLAIN, PROCESSES, DASK)), f"{_ratio(results):.2f}")
            for name, results in measured.items()
        ],
    )


def _cell(result: Result) -> str:
    return f"✗ {result.error}" if result.error else seconds(result.warm)


def _verdict(measured: dict[str, dict[str, Result]]) -> str:
    long = {name: _ratio(results) for name, results in measured.items() if results[PLAIN].warm >= GOAL_FROM_S}
    if not long:
        return f"No workload took {GOAL_FROM_S:g} s."
    missed = {name: ratio for name, ratio in long.items() if not ratio <= GOAL}
    outcome = f"missed by {', '.join(missed)}" if missed else "reached"
    mean = geometric_mean([ratio for ratio in long.values() if not math.isnan(ratio)]) or math.nan
    return (
        f"Goal: at most {GOAL:g} where the plain loop takes {GOAL_FROM_S:g} s or more ({', '.join(long)}): {outcome}; "
        f"geometric mean {mean:.2f}."
    )


def _as_dicts(results: dict[str, Result]) -> dict[str, Any]:
    return {row: dataclasses.asdict(result) for row, result in results.items()}


if __name__ == "__main__":
    sys.exit(main())
