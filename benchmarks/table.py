"""The report of the `auto` suite as Markdown, drawn from its JSON document.

Usage: ``python benchmarks/table.py benchmarks/results/NAME.json`` prints the tables of the README again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compare import COLD, PEERS, WARM, Row, Verdict, geometric_mean, rows_of, verdicts
from layout import markdown_table, seconds
from machine import load_warning, machine_line
from rows import HYBRID

ALL_ROWS = (*PEERS, HYBRID)
PROFILES = {
    "fresh": "every process starts without a profile",
    "kept": "the profile of earlier processes of a workload is kept",
}
_OUTCOMES = {True: "reached", False: "MISSED", None: "not measured"}


def auto_report(name: str, document: dict[str, Any]) -> str:
    """Return the whole report."""
    rows = rows_of(document)
    failures = _failures(rows)
    parts = [
        f"## {name}",
        machine_line(document["machine"]),
        load_warning(document["machine"]),
        f"Medians of {document['rounds']} processes per row; {PROFILES[document['profile']]}; numerical libraries have "
        f"the threads that the backend leaves them. Best of each line in bold; ✗: see below; * small: a loop wins.",
        "### Warm: a later call in the same context",
        times_table(rows, WARM),
        "### Cold: entering the context and the first call",
        times_table(rows, COLD),
        "### One choice for all code: time / best peer",
        choices_by_hand_table(rows),
        "### Goals",
        goals_table(verdicts(document)),
        "### What hybrid chose",
        "Of each run the longest `Parallel` call; seconds as predicted, by the last warm one, and as measured.",
        choices_table(rows),
        "### Rows that failed or answered differently" if failures else "",
        "\n".join(failures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def times_table(rows: list[Row], when: str) -> str:
    """Return the times of all rows and hybrid's ratios."""
    head = ("workload", *ALL_ROWS, "hybrid / best peer", "hybrid / loky")
    return markdown_table(head, [_times(row, when) for row in rows])


def summary_table(rows: list[Row]) -> str:
    """Return hybrid beside the plain loop and the best peer, warm and cold: the table of the README."""
    head = ("workload", "best peer", "its time", "hybrid", "ratio", "cold: best peer", "its time", "hybrid", "ratio")
    return markdown_table(head, [(_name(row), *_beside_best(row, WARM), *_beside_best(row, COLD)) for row in rows])


def choices_by_hand_table(rows: list[Row]) -> str:
    """Return what each choice costs who makes it for all code, against the best peer of each workload."""
    head = ("always", "warm: geometric mean", "worst", "cold: geometric mean", "worst")
    return markdown_table(head, [(name, *_regret(rows, name, WARM), *_regret(rows, name, COLD)) for name in ALL_ROWS])


def _regret(rows: list[Row], name: str, when: str) -> tuple[str, str]:
    ratios = [ratio for row in rows if (ratio := row.beside_best(name, when)) is not None]
    return _number(geometric_mean(ratios)), _number(max(ratios, default=None))


def _beside_best(row: Row, when: str) -> tuple[str, str, str, str]:
    best, ours = row.best_peer(when), row.seconds(HYBRID, when)
    return (
        best[0] if best else "",
        seconds(best[1]) if best else "",
        "✗" if ours is None else seconds(ours),
        _number(row.against_best(when)),
    )


def _times(row: Row, when: str) -> tuple[str, ...]:
    times = {name: row.seconds(name, when) for name in ALL_ROWS}
    best = min((taken for taken in times.values() if taken is not None), default=None)
    cells = (_cell(taken, best, row.measured["rows"].get(name)) for name, taken in times.items())
    ratios = (_number(ratio) for ratio in (row.against_best(when), row.against("loky", when)))
    return (_name(row), *cells, *ratios)


def _cell(taken: float | None, best: float | None, result: Any) -> str:
    if taken is None:
        return "✗" if result else ""
    return f"**{seconds(taken)}**" if taken == best else seconds(taken)


def _name(row: Row) -> str:
    return row.name + (" *" if row.is_small else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def goals_table(found: list[Verdict]) -> str:
    """Return the goals, what was measured, and whether they are reached."""
    lines = [
        (verdict.goal, _OUTCOMES[verdict.is_reached], verdict.where, f"{verdict.limit:g}", _number(verdict.measured))
        for verdict in found
    ]
    return markdown_table(("goal", "outcome", "where", "limit", "measured"), lines, n_text_columns=3)


def choices_table(rows: list[Row]) -> str:
    """Return, per workload, the tiers of the first and the last run, and the last plan beside what came of it."""
    head = ("workload", "cold", "warm", "reason (warm)", "predicted", "measured")
    return markdown_table(head, [line for row in rows if (line := _choice(row))], n_text_columns=4)


def _choice(row: Row) -> tuple[str, ...] | None:
    reports = [report for report in row.measured["rows"].get(HYBRID, {}).get("reports", ()) if report]
    if not reports:
        return None
    first, last = reports[0], reports[-1]
    reason = str(last.get("reason", "")).replace("|", "\\|")
    times = (_predicted(last.get("predicted_seconds")), _predicted(last.get("seconds")))
    return (_name(row), first.get("tier", ""), last.get("tier", ""), reason, *times)


def _predicted(value: Any) -> str:
    """Return a number of seconds as text; whatever else a report may hold, as it is."""
    if value is None:
        return ""
    return seconds(value) if isinstance(value, int | float) else str(value)


def progress_line(row: Row) -> str:
    """Return one workload as one line, to be printed as soon as it is measured."""
    parts = [f"{name} {_brief(row, name)}" for name in ALL_ROWS if name in row.measured["rows"]]
    ratios = f"hybrid / best: warm {_number(row.against_best(WARM))}, cold {_number(row.against_best(COLD))}"
    return "\n".join([f"{_name(row)}: {'; '.join(parts)}; {ratios}", *_failures([row])])


def _brief(row: Row, name: str) -> str:
    warm, cold = (row.seconds(name, when) for when in (WARM, COLD))
    return "✗" if warm is None or cold is None else f"{seconds(warm)} ({seconds(cold)} cold)"


def _failures(rows: list[Row]) -> list[str]:
    return [
        f"- {row.name}, {name}: {result['error']}"
        for row in rows
        for name, result in row.measured["rows"].items()
        if result["error"]
    ]


if __name__ == "__main__":
    saved = json.loads(Path(sys.argv[1]).read_text())
    tables = (choices_by_hand_table(rows_of(saved)), goals_table(verdicts(saved)), summary_table(rows_of(saved)))
    print(*tables, sep="\n\n")
