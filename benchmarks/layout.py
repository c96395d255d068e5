"""Markdown tables, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]], n_text_columns: int = 1) -> str:
    """Return a table whose columns after the first ``n_text_columns`` are set to the right."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    rule = "|".join(
        "-" * (width + 2) if column < n_text_columns else "-" * (width + 1) + ":" for column, width in enumerate(widths)
    )
    body = (_line(line, widths, n_text_columns) for line in lines)
    return "\n".join([_line(head, widths, n_text_columns), f"|{rule}|", *body])


def _line(cells: Sequence[str], widths: list[int], n_text_columns: int) -> str:
    padded = [
        cell.ljust(width) if column < n_text_columns else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def seconds(value: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:#.3g} {unit}".replace(". ", " ")
    return f"{value * 1e9:.0f} ns"
