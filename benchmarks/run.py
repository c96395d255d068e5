"""Run the benchmarks: ``python benchmarks/run.py [--suite auto|calls] [--only NAME] [--rounds N] [--save NAME]``.

Prints what came of the suite and its goals; ``--save`` keeps it in ``results/``. Exits with 1 if hybrid failed or a
row gave another answer than the plain loop, and with ``--strict`` also if a goal was missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calls_table import calls_table, goals
from compare import rows_of, verdicts
from harness import Result, measure
from machine import describe_machine, load_warning, machine_line
from plot import plot
from suites import SUITES, Suite
from table import PROFILES, auto_report, progress_line

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if something failed, else 0."""
    options = _parse(arguments)
    suite = SUITES[options.suite]
    names = _names(suite, options)
    if options.list:
        print("\n".join(names))
        return 0
    machine = describe_machine()
    print(machine_line(machine))
    print(load_warning(machine), flush=True)
    return (_run_auto if suite.name == "auto" else _run_calls)(suite, names, options, machine)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the hybrid backend beside joblib's own.")
    parser.add_argument("--suite", choices=("auto", "calls"), default="auto", help="which suite (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this workload; may be repeated")
    parser.add_argument("--rows", action="append", help="only rows that contain this text; may be repeated")
    parser.add_argument("--rounds", type=int, help="processes per row (default: 3, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="a fixed subset of the auto suite, one round")
    parser.add_argument("--profile", choices=PROFILES, default="fresh", help="what a process may have learned before")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json, .md and, of the auto suite, .svg")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a goal was missed")
    parser.add_argument("--list", action="store_true", help="print the names of the workloads")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - set(SUITES[options.suite].modules())
    if unknown:
        parser.error(f"no such workload in the suite {options.suite!r}: {', '.join(sorted(unknown))}")
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def _names(suite: Suite, options: argparse.Namespace) -> list[str]:
    if options.only:
        return list(options.only)
    return [name for name, work in _workloads(suite).items() if not options.quick or getattr(work, "quick", True)]


def _workloads(suite: Suite) -> dict[str, Any]:
    return {name: suite.workload(name, theme) for name, theme in suite.modules().items()}


def _wanted(rows: Sequence[str], options: argparse.Namespace) -> list[str]:
    wanted = options.rows
    return [row for row in rows if not wanted or row == "plain loop" or any(text in row for text in wanted)]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def _run_auto(suite: Suite, names: list[str], options: argparse.Namespace, machine: dict[str, Any]) -> int:
    document: dict[str, Any] = {
        "suite": suite.name,
        "machine": machine,
        "rounds": options.rounds,
        "profile": options.profile,
        "workloads": {},
    }
    rows, workloads = _wanted(list(suite.rows), options), _workloads(suite)
    for name in names:
        workload = workloads[name]
        results = measure(suite, workload, rows, options.rounds, options.profile, _progress)
        document["workloads"][name] = {
            **{key: getattr(workload, key) for key in ("about", "calls", "small")},
            "rows": _as_dicts(results),
        }
        print(progress_line(rows_of(document)[-1]), flush=True)
        if options.save:  # after each workload: an hour's work is not lost with its last minute
            _write_json(options.save, document)
    title = options.save or "auto"
    print("\n" + auto_report(title, document))
    if options.save:
        (RESULTS / f"{title}.md").write_text(auto_report(title, document))
        plot(document, RESULTS / f"{title}.svg")
        print(f"Saved {RESULTS / title}.json, .md and .svg")
    failed = any(
        result["error"] and (row == "hybrid" or result["is_wrong"])
        for measured in document["workloads"].values()
        for row, result in measured["rows"].items()
    )
    missed = any(verdict.is_reached is False for verdict in verdicts(document))
    return int(failed or (options.strict and missed))


def _run_calls(suite: Suite, names: list[str], options: argparse.Namespace, machine: dict[str, Any]) -> int:
    outcomes: dict[str, dict[str, Result]] = {}
    workloads = _workloads(suite)
    tables = []
    for name in names:
        workload = workloads[name]
        rows = _wanted(workload.rows, options)
        outcomes[name] = measure(suite, workload, rows, options.rounds, options.profile, _progress)
        tables.append(calls_table(workload, outcomes[name]))
        print(tables[-1], end="\n\n", flush=True)
    if options.save:
        measured = {name: _as_dicts(results) for name, results in outcomes.items()}
        _write_json(
            options.save,
            {"suite": suite.name, "machine": machine, "rounds": options.rounds, "workloads": measured},
        )
        how = f"Medians of {options.rounds} processes per row; numerical libraries have one thread per task."
        text = "\n\n".join([f"## {options.save}", machine_line(machine), how, *tables])
        (RESULTS / f"{options.save}.md").write_text(text + "\n")
        print(f"Saved {RESULTS / options.save}.json and .md")
    failed = any(result.error for results in outcomes.values() for result in results.values())
    missed = any(met is False for name, results in outcomes.items() for _, met in goals(workloads[name], results))
    return int(failed or (options.strict and missed))


def _as_dicts(results: dict[str, Result]) -> dict[str, Any]:
    return {row: dataclasses.asdict(result) for row, result in results.items()}


def _write_json(name: str, document: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
