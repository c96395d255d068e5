"""The tables of the `calls` suite: one per workload, with its goals."""

from __future__ import annotations

from typing import Any

from layout import markdown_table, seconds
from rows import CALLS_PEERS, PLAIN

_VERDICTS = {True: "met", False: "MISSED", None: "not measured"}


def calls_table(workload: Any, results: dict[str, Any]) -> str:
    """Return the results of one workload as a Markdown table with its goals."""
    unit = workload.unit
    head = ("backend", f"cold, a {unit}", f"warm, a {unit}", "warm / best peer", "warm / plain loop")
    text = [f"### {workload.name}", "", workload.question, ""]
    text += [markdown_table(head, [_cells(row, result, results) for row, result in results.items()])]
    text += ["", *(f"- {_VERDICTS[met]}: {goal}" for goal, met in goals(workload, results))]
    text += [f"- failed: {row}: {result.error}" for row, result in results.items() if result.error]
    return "\n".join(text)


def _cells(row: str, result: Any, results: dict[str, Any]) -> tuple[str, ...]:
    if result.error:
        return (row, "failed", "failed", "", "")
    peers = [results[peer].warm for peer in CALLS_PEERS if peer in results and not results[peer].error]
    plain = results.get(PLAIN)
    against_peer = f"{result.warm / min(peers):.2f}" if peers and row.startswith("hybrid") else ""
    against_plain = f"{result.warm / plain.warm:.2f}" if plain and not plain.error else ""
    return (row, seconds(result.cold), seconds(result.warm), against_peer, against_plain)


def goals(workload: Any, results: dict[str, Any]) -> list[tuple[str, bool | None]]:
    """Return each goal of ``workload`` in words, and whether it is met; None if it was not measured."""
    return [(str(goal), goal.is_met(results)) for goal in workload.goals]
