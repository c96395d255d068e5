"""Run the benchmarks: ``python benchmarks/run.py [--only NAME] [--rounds N] [--save NAME]``.

Prints one table per workload and what came of its goals; ``--save`` keeps both next to this file. Exits
with 1 if a row failed or gave another answer than the plain loop, and with ``--strict`` also if a goal was
missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from harness import PEERS, PLAIN, STANDARD_ROWS, Result, Workload, measure  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

PACKAGES = ("joblib", "loky", "distributed", "scikit-learn", "numpy", "joblib-backends")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if something failed, else 0."""
    options = _parse(arguments)
    outcomes = {}
    print(machine_line(machine := describe_machine()), end="\n\n")
    for name in options.only or WORKLOADS:
        workload = WORKLOADS[name]
        rows = [row for row in workload.rows or STANDARD_ROWS if _is_wanted(row, options.rows)]
        outcomes[name] = measure(workload, rows, options.rounds, _progress)
        print(table(workload, outcomes[name]), end="\n\n", flush=True)
    if options.save:
        save(options.save, machine, options.rounds, outcomes)
    failed = any(result.error for results in outcomes.values() for result in results.values())
    missed = any(
        met is False for name, results in outcomes.items() for _, met in goals(WORKLOADS[name], results)
    )
    return int(failed or (options.strict and missed))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the hybrid backend beside joblib's own.")
    parser.add_argument(
        "--only", action="append", choices=WORKLOADS, help="only this workload; may be repeated"
    )
    parser.add_argument("--rows", action="append", help="only rows that contain this text; may be repeated")
    parser.add_argument("--rounds", type=int, default=5, help="processes per row (default: %(default)s)")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a goal was missed")
    return parser.parse_args(arguments)


def _is_wanted(row: str, wanted: list[str] | None) -> bool:
    return not wanted or row == PLAIN or any(text in row for text in wanted)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def table(workload: Workload, results: dict[str, Result]) -> str:
    """Return the results of one workload as a Markdown table with its goals."""
    head = (
        "backend",
        f"cold, a {workload.unit}",
        f"warm, a {workload.unit}",
        "warm / best peer",
        "warm / plain loop",
    )
    lines = [head, *(_cells(row, result, results) for row, result in results.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [f"### {workload.name}", "", workload.question, ""]
    rule = "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths))
    text += [_line(head, widths), f"|{rule}|", *(_line(line, widths) for line in lines[1:])]
    text += ["", *(f"- {_VERDICTS[met]}: {goal}" for goal, met in goals(workload, results))]
    text += [f"- failed: {row}: {result.error}" for row, result in results.items() if result.error]
    return "\n".join(text)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *numbers = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in numbers)]
    return f"| {' | '.join(padded)} |"


_VERDICTS = {True: "met", False: "MISSED", None: "not measured"}


def _cells(row: str, result: Result, results: dict[str, Result]) -> tuple[str, ...]:
    if result.error:
        return (row, "failed", "failed", "", "")
    peers = [results[peer].warm for peer in PEERS if peer in results and not results[peer].error]
    plain = results.get(PLAIN)
    against_peer = f"{result.warm / min(peers):.2f}" if peers and row.startswith("hybrid") else ""
    against_plain = f"{result.warm / plain.warm:.2f}" if plain and not plain.error else ""
    return (row, _seconds(result.cold), _seconds(result.warm), against_peer, against_plain)


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:#.3g} {unit}".replace(". ", " ")
    return f"{value * 1e9:.0f} ns"


def goals(workload: Workload, results: dict[str, Result]) -> list[tuple[str, bool | None]]:
    """Return each goal of ``workload`` in words, and whether it is met; None if it was not measured."""
    return [(str(goal), goal.is_met(results)) for goal in workload.goals]


def describe_machine() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    import numpy  # noqa: F401  (loads the BLAS that is listed)
    from threadpoolctl import threadpool_info

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "blas": [f"{pool['internal_api']} {pool['version']}" for pool in threadpool_info()],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Return the description of the machine as one line."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores (load {machine['load_average']:.1f} at the start), "
        f"Python {machine['python']}, {packages}; BLAS {', '.join(machine['blas'])}, one thread per task; "
        f"{machine['date']}"
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(name: str, machine: dict[str, Any], rounds: int, outcomes: dict[str, dict[str, Result]]) -> None:
    """Write ``outcomes`` with every single measurement as JSON, and their tables as Markdown."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    measured = {
        workload: {row: dataclasses.asdict(result) for row, result in results.items()}
        for workload, results in outcomes.items()
    }
    document = {"machine": machine, "rounds": rounds, "workloads": measured}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, default=sorted) + "\n")
    tables = [table(WORKLOADS[workload], results) for workload, results in outcomes.items()]
    text = "\n\n".join(
        [f"## {name}", machine_line(machine), f"Medians of {rounds} processes per row.", *tables]
    )
    (folder / f"{name}.md").write_text(text + "\n")
    print(f"Saved {folder / name}.json and .md")


if __name__ == "__main__":
    sys.exit(main())
